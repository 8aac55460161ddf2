"""What a result was made with: versions, machine, date."""

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch

_PACKAGES = ("eckart", "torch", "transformers", "safetensors", "tokenizers", "numpy")


def describe() -> dict[str, Any]:
    """Return date, versions and machine as JSON values; no names of hosts, users or paths."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "accelerator": None if accelerator is None else str(accelerator),
        },
    }
