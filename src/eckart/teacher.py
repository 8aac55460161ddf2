"""The dense model's next-token distributions, computed, or read from a cache on disk."""

import contextlib
import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import models
from .divergence import Chances, chances
from .errors import StoreError

LARGEST = 256
"""How many entries of a distribution are kept on disk when nothing else is said."""
Around = Callable[[], contextlib.AbstractContextManager[Any]]


def digest_bytes(values: bytes) -> str:
    """Return a digest of `values`."""
    return hashlib.blake2b(values, digest_size=16).hexdigest()


def digest(model: Any) -> str:
    """Return a digest of all weights of `model`, and of its class."""
    found = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, tensor in sorted(models.state_tensors(model).items()):
        raw = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(raw.numpy().tobytes())
    return found.hexdigest()


@dataclass(slots=True)
class Teacher:
    """The distributions of `model` on windows of text, each kept as its `largest` entries (None: whole).

    Args:
        model: the dense model, which is not changed.
        temperature: of the distributions.
        largest: see eckart.healing.Healing.
        cache: a folder; a distribution that is there is not computed again.
        around: a context to compute in ...
        precision: ... and what it multiplies in, which the cache tells apart.
    """

    model: Any
    temperature: float = 1.0
    largest: int | None = None
    cache: Path | None = None
    around: Around = contextlib.nullcontext
    precision: torch.dtype = torch.float32
    _folder: Path | None = None

    def __post_init__(self) -> None:
        if self.cache is not None:
            self.largest = self.largest or LARGEST
            kind = str(self.precision).removeprefix("torch.")
            self._folder = self.cache / f"{digest(self.model)}-{self.temperature:g}-{self.largest}-{kind}"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"the cache {self.cache} cannot be written: {error}") from error

    @torch.no_grad()
    def chances(self, window: Tensor) -> Chances:
        """Return the distributions after each token of `window` (seq_len,) but the last.

        Raises:
            StoreError: the cache cannot be read or written.
        """
        if self._folder is None:
            return self._computed(window)
        ids = digest_bytes(window.to("cpu", torch.int64).numpy().tobytes())
        file = self._folder / f"{ids}.safetensors"
        if not file.exists():
            found = self._computed(window)
            _write(file, found)
            return _half(found)
        return _read(file, window.device)

    def _computed(self, window: Tensor) -> Chances:
        with self.around():
            logits = self.model(input_ids=window[None], use_cache=False).logits[0, :-1]
        return chances(logits, self.temperature, self.largest)


def _half(found: Chances) -> Chances:
    """Return `found` as it comes back from disk, so that a run with a cold cache is one with a warm one."""
    return Chances(found.log.to(torch.float16).float(), found.ids)


def _write(file: Path, found: Chances) -> None:
    tensors = {"log": found.log.to("cpu", torch.float16)}
    if found.ids is not None:
        tensors["ids"] = found.ids.to("cpu", torch.int32)
    partial = file.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StoreError(f"the cache cannot be written: {error}") from error


def _read(file: Path, device: torch.device) -> Chances:
    try:
        tensors = load_file(file, device=str(device))
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file} of the cache cannot be read ({error}): delete it") from error
    ids = tensors.get("ids")
    return Chances(tensors["log"].float(), None if ids is None else ids.to(torch.int64))
