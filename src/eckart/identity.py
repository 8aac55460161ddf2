"""What makes a model the model that it is, as hashes: tensors, config, code and the libraries that run it."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import __version__, losses, models

_KNOWN_CODE = ("torch", "transformers", "eckart", "builtins")
_NAMES = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")
_AT_ONCE = 1 << 26


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.detach().reshape(-1)
        for part in torch.split(flat, _AT_ONCE):
            found.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def of_source(source: str) -> str:
    """Return the hash of a file, or of the files of a folder; the name of what is neither.

    Links are followed. Hidden files and folders inside of it do not count.
    """
    path = Path(source)
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        return source
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return hashlib.sha256("".join(f"{file.name} {_of_file(file)}\n" for file in files).encode()).hexdigest()


def _of_file(file: Path) -> str:
    with file.open("rb") as opened:
        found = hashlib.sha256()
        while part := opened.read(_AT_ONCE):
            found.update(part)
    return found.hexdigest()


def of_model(model: nn.Module) -> dict[str, Any]:
    """Return all of `model` that can change what it computes, as JSON values.

    The content of every weight, the config, the tree of modules, code that is neither of torch nor of
    transformers, versions of these and of eckart, dtype and kind of device. Not where it came from.
    """
    config: Any = getattr(model, "config", None)
    known = {} if config is None else config.to_dict()
    own = {key: value for key, value in known.items() if key not in _NAMES}
    return {
        "class": type(model).__qualname__,
        "tree": hashlib.sha256(str(model).encode()).hexdigest(),
        "config": hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest(),
        "attention": str(getattr(config, "_attn_implementation", None)),
        "code": _code(model),
        "tensors": of_tensors(models.state_tensors(model)),
        "dtype": str(losses.dtype_of(model)),
        "device": losses.device_of(model).type,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }


def _code(model: nn.Module) -> str:
    """Return the hash of the files of the modules' classes that come with the model."""
    foreign = {
        kind for kind in map(type, model.modules()) if kind.__module__.split(".")[0] not in _KNOWN_CODE
    }
    files = {file for kind in foreign if (file := _file(kind)) is not None}
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(file.read_bytes())
    return found.hexdigest()


def _file(kind: type) -> Path | None:
    try:
        file = inspect.getsourcefile(kind)
    except TypeError:
        return None
    return None if file is None or not Path(file).is_file() else Path(file)
