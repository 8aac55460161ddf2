"""The work folder of a run: what is finished, keyed by everything that can change the result."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import appearing
from ..errors import StoreError

_KEY = "key.json"


@dataclass(frozen=True, slots=True)
class Work:
    """A folder of finished parts; each appears by rename, so what is there is whole."""

    folder: Path

    @classmethod
    def opened(cls, folder: Path, key: Mapping[str, Any]) -> "Work":
        """Open the folder of the run with this `key`, made where there is none.

        Args:
            folder: where to work.
            key: names and JSON values of all that can change the result.

        Raises:
            StoreError: it belongs to a run that differs, with the names of what differs; or it cannot be
                written.
        """
        wanted = json.loads(json.dumps(dict(key)))
        file = folder / _KEY
        if file.exists():
            known = _read_json(file)
            different = sorted(name for name in {*known, *wanted} if known.get(name) != wanted.get(name))
            if different:
                changes = [f"{n} ({_short(known.get(n))}, now {_short(wanted.get(n))})" for n in different]
                raise StoreError(
                    f"{folder} holds an unfinished run that differs in {', '.join(changes)}: go on with what "
                    "it was started with, choose another --out, or delete it"
                )
            return cls(folder)
        if folder.exists() and any(folder.iterdir()):
            raise StoreError(f"{folder} is not the work folder of a run: choose another --out, or delete it")
        work = cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the work folder {folder} cannot be made: {error}") from error
        work.write_json("key", wanted)
        return work

    def has(self, name: str) -> bool:
        """Tell whether the part `name` is finished."""
        return (self.folder / name).exists()

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write `values` as the part `name`.json.

        Raises:
            StoreError: it cannot be written.
        """
        with appearing(self.folder / f"{name}.json") as partial:
            partial.write_text(json.dumps(values), encoding="utf-8")

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the part `name`.json.

        Raises:
            StoreError: it cannot be read.
        """
        return _read_json(self.folder / f"{name}.json")

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write `tensors` as the part `name`.safetensors.

        Raises:
            StoreError: it cannot be written.
        """
        own = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with appearing(self.folder / f"{name}.safetensors") as partial:
            save_file(own, partial, dict(metadata))

    def read_tensors(
        self, name: str, only: Iterable[str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors of the part `name`.safetensors, or some of them, and its metadata.

        Raises:
            StoreError: it cannot be read.
        """
        file = self.folder / f"{name}.safetensors"
        try:
            with safe_open(file, framework="pt") as opened:
                wanted = opened.keys() if only is None else only
                return {key: opened.get_tensor(key) for key in wanted}, dict(opened.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{file} cannot be read ({error}): delete the work folder") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read ({error}): delete the work folder") from error
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
