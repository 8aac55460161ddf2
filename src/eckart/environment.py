"""What a result was made with: versions, machine, date."""

import os
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_CPUS = Path("/proc/cpuinfo")
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
            "processor_model": _processor_model(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "accelerator": None if accelerator is None else str(accelerator),
            "accelerator_model": _accelerator_model(),
        },
    }


def name_of(word: str) -> str:
    """Return the last part of what is a path here or an absolute one, and else (a hub id) all of it."""
    path = Path(word)
    return path.name if path.is_absolute() or path.exists() else word


def command() -> list[str]:
    """Return the words that this program was started by, without folders."""
    return [name_of(word) for word in sys.argv]


def _processor_model() -> str | None:
    """Return what the CPU calls itself, or None where it does not say."""
    if _CPUS.is_file():
        named = (
            line for line in _CPUS.read_text(encoding="utf-8").splitlines() if line.startswith("model name")
        )
        found = next(named, "").partition(":")[2].strip()
        return found or None
    return platform.processor() or None


def _accelerator_model() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
