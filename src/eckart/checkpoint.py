"""A run's state in one safetensors file, so that it can go on after an interruption."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import StoreError


@contextmanager
def appearing(file: Path, what: str = "") -> Iterator[Path]:
    """Give a path to write to, which becomes `file` by rename when the body ends well, else vanishes.

    Raises:
        StoreError: it cannot be written; `what` is how the message calls it.
    """
    partial = file.with_name(f"{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{what}{file} cannot be written: {error}") from error
    finally:
        if file.parent.is_dir():
            partial.unlink(missing_ok=True)


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
        own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        metadata = {"state": json.dumps({**state, "key": self.key})}
        with appearing(self.file, "the checkpoint ") as partial:
            save_file(own, partial, metadata)

    def delete(self) -> None:
        """Delete the file, and its folder if it is empty then."""
        self.file.unlink(missing_ok=True)
        if self.file.parent.is_dir() and not any(self.file.parent.iterdir()):
            self.file.parent.rmdir()
