"""Tables and the plot of benchmarks/adapters.py."""

from pathlib import Path
from typing import Any


def show(rows: list[dict[str, Any]], out: Path) -> None:
    print(len(rows), out)
