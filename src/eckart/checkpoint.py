"""A run's state in one safetensors file, so that it can go on after an interruption."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import StoreError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a run keeps its state.

    Args:
        file: the file, which appears by rename.
        key: what the run was started with; a file with another key is refused.
    """

    file: Path
    key: str

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return the state and its tensors on the CPU, None where there is no file.

        Raises:
            StoreError: it cannot be read, or belongs to a run with other settings.
        """
        if not self.file.exists():
            return None
        try:
            with safe_open(self.file, framework="pt") as opened:
                state = json.loads(opened.metadata()["state"])
                key = state.pop("key")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"the checkpoint {self.file} cannot be read ({error}): delete it") from error
        if key != self.key:
            raise StoreError(
                f"the checkpoint {self.file} is of a run with other settings, models or text: go on with "
                "those, choose another --out, or delete it"
            )
        return state, tensors

    def write(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace what is there.

        Raises:
            StoreError: it cannot be written.
        """
        partial = self.file.with_suffix(".partial")
        own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        metadata = {"state": json.dumps({**state, "key": self.key})}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file(own, partial, metadata)
            partial.replace(self.file)
        except (OSError, SafetensorError) as error:
            if self.file.parent.is_dir():
                partial.unlink(missing_ok=True)
            raise StoreError(f"the checkpoint {self.file} cannot be written: {error}") from error

    def delete(self) -> None:
        """Delete the file, and its folder if it is empty then."""
        self.file.unlink(missing_ok=True)
        if self.file.parent.is_dir() and not any(self.file.parent.iterdir()):
            self.file.parent.rmdir()
