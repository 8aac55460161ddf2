"""Peak memory of this process and of a device, so far and of a stretch of work."""

import ctypes
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""
_MAPPED = 128 * 1024


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Return the peak bytes so far: "ram" of the process, and "device" where the device keeps count."""
    found = {"ram": _peak_of_process()}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found


def _peak_of_process() -> int:
    if sys.platform == "win32":
        import psutil  # accelerate brings it

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Return freed memory to the system where the C library can: glibc keeps holes between live blocks."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def map_large_blocks() -> bool:
    """Let every block of 128 kB and more leave the process when it is freed; tell whether this can be had.

    glibc starts so, but raises the limit up to 32 MB as blocks are freed, and then keeps holes between live
    tensors: the peak of a training step may be half as much again as what lives. What it costs is time, since
    the system clears every page that it gives out. It holds for the whole process, to its end.
    """
    if sys.platform != "linux":
        return False
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    return setting is not None and bool(setting(_MMAP_THRESHOLD, _MAPPED))


class Watermark:
    """The most memory in use since this was made: on a device that keeps count, else of this process.

    Args:
        device: where the work is done.

    `resting` is what was in use then, in bytes. Where `exact` is False, the system could not forget an
    earlier peak of the process, which `peak` may then return.
    """

    def __init__(self, device: torch.device) -> None:
        give_back()
        self.device, self.exact = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.resting = torch.cuda.memory_allocated(device)
        else:
            self.exact = _forget_peak()
            self.resting = resident()

    def peak(self) -> int:
        """Return the peak so far, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM") if self.exact else _peak_of_process()


def _forget_peak() -> bool:
    try:
        _CLEAR.write_text("5", encoding="ascii")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    if _STATUS.is_file():
        return _status("VmRSS")
    import psutil  # type: ignore[import-untyped]  # accelerate brings it

    return int(psutil.Process().memory_info().rss)


def _status(key: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))
