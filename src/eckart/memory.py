"""Peak memory of this process and of a device."""

import ctypes
import sys

import torch


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
