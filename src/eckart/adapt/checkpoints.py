"""The tensors of a model one at a time, from its files; nothing is loaded that is not asked for."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from .. import hub, models, plugin
from ..errors import ModelError, StoreError
from ..skeleton import read_shapes

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Names, shapes and dtypes of the tensors of `source`, and a way to read one.

    `how` says where they come from: "files", or "memory" where the model had to be loaded.
    """

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype | str]
    how: str
    read: Callable[[str], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most parameters have.

        Raises:
            ModelError: there is none.
        """
        counts: dict[torch.dtype, int] = {}
        for name, kind in self.dtypes.items():
            if isinstance(kind, torch.dtype) and kind.is_floating_point:
                counts[kind] = counts.get(kind, 0) + torch.Size(self.shapes[name]).numel()
        if not counts:
            raise ModelError(f"{self.source} holds no floating-point tensors")
        return max(counts, key=lambda kind: counts[kind])


def open_checkpoint(source: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model for reading tensor by tensor.

    A folder or hub id with safetensors, in one file or in shards, is read from its files. A GGUF file and
    a folder that eckart compressed have no tensors under the names of the dense model: they are loaded,
    and made dense.

    Raises:
        ModelError: there is no such model, it is a pickle, or stored in a quantised form.
        StoreError: a file is damaged or missing.
    """
    name = str(source)
    hub.check_source(name)
    config = None if hub.is_gguf(name) else hub.load_config(name, trust_remote_code=trust_remote_code)
    if config is None or getattr(config, "quantization_config", None) is not None:
        model = hub.load(name, trust_remote_code=trust_remote_code).model
        return of_model(plugin.densify(model), name)
    return _of_files(name, _files(name))


def by_module(found: Checkpoint, *, trust_remote_code: bool = False) -> Checkpoint:
    """Return `found` with the names that the modules of its model have.

    Files may call tensors by older names, which transformers translates: such a model is loaded, if the
    number of parameters says that it is all there under other names.
    """
    if found.how != "files":
        return found
    skeleton = hub.skeleton(found.source, trust_remote_code=trust_remote_code)
    wanted = {name: tuple(tensor.shape) for name, tensor in models.state_tensors(skeleton).items()}
    known = set(skeleton.state_dict())
    sizes = [sum(torch.Size(shape).numel() for shape in held.values()) for held in (wanted, found.shapes)]
    if not set(wanted) - set(found.shapes) or set(found.shapes) <= known or sizes[0] != sizes[1]:
        return found
    model = hub.load(found.source, trust_remote_code=trust_remote_code).model
    return of_model(model, found.source)


def of_model(model: Any, source: str) -> Checkpoint:
    """Return the tensors of a model in memory, tied ones once."""
    tensors = {name: tensor.detach() for name, tensor in models.state_tensors(model).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes: dict[str, torch.dtype | str] = {name: tensor.dtype for name, tensor in tensors.items()}
    return Checkpoint(source, shapes, dtypes, "memory", lambda name: tensors[name].cpu())


def _files(source: str) -> dict[str, Path]:
    """Return the file of every tensor, None of them opened yet where an index says it."""
    one = _found(source, _ONE)
    if one is not None:
        return dict.fromkeys(read_shapes(one), one)
    index = _found(source, _INDEX)
    if index is None:
        kind = "weights as a pickle alone, which is not read" if _has_pickle(source) else f"no {_ONE}"
        raise ModelError(f"{source} has {kind}: load it with transformers and save_pretrained it")
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise StoreError(f"{index} is not an index of shards: {error}") from error
    shards = {shard: _shard(source, shard) for shard in dict.fromkeys(names.values())}
    return {name: shards[shard] for name, shard in names.items()}


def _found(source: str, name: str) -> Path | None:
    try:
        found = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {name} of {source}: {error}") from error
    return None if found is None else Path(found)


def _shard(source: str, shard: str) -> Path:
    found = None if Path(shard).name != shard else _found(source, shard)
    if found is None:
        raise StoreError(f"{source}: its index names {shard}, which is not there; the folder is incomplete")
    return found


def _has_pickle(source: str) -> bool:
    folder = Path(source)
    return folder.is_dir() and any(folder.glob("pytorch_model*.bin"))


def _of_files(source: str, files: Mapping[str, Path]) -> Checkpoint:
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype | str] = {}
    for file in dict.fromkeys(files.values()):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    shapes[name] = tuple(part.get_shape())
                    dtypes[name] = _DTYPES.get(part.get_dtype(), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{file} is not a readable safetensors file: {error}") from error
    missing = [name for name in files if name not in shapes]
    if missing:
        raise StoreError(f"{source}: its index names {missing[0]}, which no shard holds")

    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
        return found

    return Checkpoint(source, shapes, dtypes, "files", read)
