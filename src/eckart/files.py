"""Output files: known to be writable before the work, not after it."""

import os
from pathlib import Path

from .errors import StoreError


def check_new(out: Path, overwrite: bool, option: str = "--out") -> None:
    """Raise StoreError unless the file `out` can be written."""
    if out.is_dir() or (out.exists() and not overwrite):
        advice = (
            "name a file" if out.is_dir() else f"choose another {option}, or pass --overwrite to replace it"
        )
        raise StoreError(f"{out} exists: {advice}")
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StoreError(f"{out} cannot be written: {parent} is not a folder that can be written to")
