"""Peak memory of this process and of a device."""

import resource
import sys

import torch


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Return the peak bytes so far: "ram" of the process, and "device" where the device keeps count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"ram": peak if sys.platform == "darwin" else peak * 1024}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found
