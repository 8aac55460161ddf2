"""The weight files of a model, of which only what is asked for is read."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ..errors import ModelError, StoreError
from ..quiet import without_bars

_SAMPLES, _SAMPLE_BYTES = 32, 4096


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor of a checkpoint is, and its bytes."""

    file: Path
    key: str
    bytes: int


class Shards:
    """The safetensors files of one model, and which tensor of `model` is made of which of theirs.

    Args:
        model: a skeleton, whose parameters may be on the meta device, in the dtype to compute in.
        folder: that holds the files.

    Raises:
        StoreError: a file cannot be read, is cut short, or a weight of the model is in none.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise ModelError(f"{folder} holds no .safetensors files: only those can be read in parts")
        self.read_bytes = 0
        self._mapping = get_model_conversion_mapping(model)
        self._places: dict[str, list[_Place]] = {}
        state, tied = model.state_dict(), getattr(model, "all_tied_weights_keys", None) or {}
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        for file in self.files:
            for key, size in _entries(file).items():
                name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
                if name not in state and key in state:
                    name = key
                self._places.setdefault(name, []).append(_Place(file, key, size))
        # A converter names what it makes by the first of its targets.
        made = {target for converter in converters for target in converter.target_patterns}
        lacking = [
            name
            for name in state
            if name not in self._places and name not in tied and not any(part in name for part in made)
        ]
        if lacking:
            raise StoreError(
                f"{len(lacking)} weights of {type(model).__name__} are in none of the {len(self.files)} "
                f".safetensors files of {folder}, first {lacking[0]}: the folder is damaged or incomplete"
            )

    def names(self) -> list[str]:
        """Return the names, in the model, of what the files hold."""
        return list(self._places)

    def load(self, model: Any, wanted: Iterable[str]) -> None:
        """Put the weights called `wanted` into `model`, on the CPU, in the dtype that they have there.

        Raises:
            StoreError: a file cannot be read.
        """
        places = [place for name in wanted for place in self._places.get(name, ())]
        by_file: dict[Path, list[_Place]] = {}
        for place in places:
            by_file.setdefault(place.file, []).append(place)
        found: dict[str, Tensor] = {}
        for file, inside in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    # A copy: a view into the mapped file would keep its pages in memory.
                    found |= {place.key: opened.get_tensor(place.key).clone() for place in inside}
            except (OSError, SafetensorError) as error:
                raise StoreError(f"{file} cannot be read: {error}; what is finished is kept") from error
        self.read_bytes += sum(place.bytes for place in places)
        self.put(model, found)

    def put(self, model: Any, found: dict[str, Tensor]) -> None:
        """Put tensors that go by their names in the files, or in the model, into `model`.

        Raises:
            StoreError: they do not fit.
        """
        config = LoadStateDictConfig(
            device_map={"": "cpu"}, dtype=model.dtype, weight_mapping=list(self._mapping)
        )
        with without_bars():
            info, _ = convert_and_load_state_dict_in_model(model, found, config)
        problems = [*info.conversion_errors.values(), *map(str, info.mismatched_keys), *info.error_msgs]
        if problems:
            raise StoreError(f"weights do not fit {type(model).__name__}: {problems[0]}")

    def fingerprint(self) -> list[str]:
        """Return what tells these files from others: names, sizes, and hashes of headers and samples."""
        return [f"{file.name} {file.stat().st_size} {_sampled(file)}" for file in self.files]


def local(source: str) -> Path:
    """Return the folder of the model at `source`: itself, or what the hub's cache holds of it.

    Raises:
        ModelError: it is neither, or a .gguf file.
    """
    if source.endswith(".gguf"):
        raise ModelError(
            f"{source}: a GGUF file can only be read as a whole. Leave out --memory, or write it as a folder "
            "first: eckart.save(eckart.load(...), tokenizer, FOLDER)"
        )
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"cannot get {source}: {str(error).splitlines()[0]}") from error


def _entries(file: Path) -> Mapping[str, int]:
    """Return the bytes of every tensor in `file`."""
    try:
        with safe_open(file, framework="pt") as opened:
            found = {}
            for key in opened.keys():  # noqa: SIM118
                part = opened.get_slice(key)
                size = torch.Size(part.get_shape()).numel()
                found[key] = size * _ITEMSIZE.get(part.get_dtype(), 1)
            return found
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{file} is no whole safetensors file ({error}): it was cut short or damaged, get it again"
        ) from error


_ITEMSIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}


def _sampled(file: Path) -> str:
    digest = hashlib.sha256()
    size = file.stat().st_size
    with file.open("rb") as opened:
        digest.update(opened.read(_SAMPLE_BYTES))
        for index in range(_SAMPLES):
            opened.seek(index * max(0, size - _SAMPLE_BYTES) // _SAMPLES)
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def total_bytes(files: Sequence[Path]) -> int:
    """Return the bytes of `files`."""
    return sum(file.stat().st_size for file in files)
