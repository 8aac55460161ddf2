"""Models in and out: a hub id, a folder or a GGUF file becomes a model; a model becomes a folder."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from . import models, plugin, stores, tasks
from .declaration import NAME
from .errors import ConfigError, ModelError, StoreError
from .tasks import Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFETENSORS = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
}  # fmt: skip
_ORDER = ("bool", "uint8", "int8", "int16", "float16", "bfloat16", "int32", "float32", "float64", "int64")
_WEIGHT_FILES = ("*.safetensors", "*.gguf", "pytorch_model*.bin")
MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with what prepares its inputs (a tokenizer, an image processor), and where it came from.

    `task` is the name of what it was loaded for (eckart.tasks), `stored` is the dtype of the weights at the
    source, `bytes` the size of its weight files (None when they are not at hand).
    """

    model: Any
    tokenizer: Any
    source: str
    stored: torch.dtype
    bytes: int | None
    task: str = tasks.CAUSAL


def dtype(name: str) -> torch.dtype:
    """Return the torch dtype called `name`.

    Raises:
        ConfigError: it is not one of DTYPES.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: legal are {', '.join(DTYPES)}")
    return DTYPES[name]


def device(name: str | None) -> torch.device:
    """Return the device called `name`; None picks cuda, mps or cpu, the first that is there.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} is not usable here: {error}") from error
    return found


def compute_dtype(stored: torch.dtype, place: torch.device) -> torch.dtype:
    """Return the dtype to compute in: the stored one, but float32 on a CPU, which is slow in the others."""
    return torch.float32 if place.type == "cpu" else stored


def is_gguf(source: str) -> bool:
    """Tell whether `source` names a GGUF file."""
    return source.endswith(".gguf")


def check_source(source: str) -> None:
    """Raise ModelError if `source` is a path by its looks and nothing is there."""
    path = Path(source)
    first = path.parts[0] if len(path.parts) > 1 else ""
    looks_local = is_gguf(source) or source.startswith((".", "/", "~")) or source.count("/") > 1
    looks_local = looks_local or (first != "" and Path(first).is_dir())
    if looks_local and not path.exists():
        raise ModelError(f"no model at {source}: give a folder, a .gguf file or a hub id")
    if path.is_file() and not is_gguf(source):
        raise ModelError(f"{source} is a file: give a folder, a .gguf file or a hub id")


def _where(source: str) -> tuple[str, dict[str, str]]:
    if not is_gguf(source):
        return source, {}
    path = Path(source)
    return str(path.parent), {"gguf_file": path.name}


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of `source` without reading weights.

    Raises:
        ModelError: it cannot be had.
    """
    check_source(source)
    where, extra = _where(source)
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"cannot read the config of {source}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _refuse_other_tasks(config: Any, source: str) -> None:
    kind = type(config).__name__.removesuffix("Config")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source} is a {kind}, an encoder-decoder: only causal language models are treated")
    known = type(config) in AutoModelForCausalLM._model_mapping
    if not known and not getattr(config, "auto_map", None):
        raise ModelError(f"{source} is a {kind}, which transformers has no causal language model for")


def task_of(config: Any, source: str, wanted: str) -> Task:
    """Return the task called `wanted`, or, for auto, the one that the model of `config` was stored for.

    Raises:
        ConfigError: there is no such task.
        ModelError: there is no model of this kind for it.
    """
    if wanted == tasks.CAUSAL:
        _refuse_other_tasks(config, source)
    elif wanted == tasks.AUTO:
        return tasks.of_config(config, source)
    else:
        tasks.check(tasks.get(wanted), config, source)
    return tasks.get(wanted)


def skeleton(source: str, *, task: str = tasks.CAUSAL, trust_remote_code: bool = False) -> Any:
    """Return the model of `source` on the meta device: structure and shapes, no weights."""
    config = load_config(source, trust_remote_code=trust_remote_code)
    found = task_of(config, source, tasks.CAUSAL if is_gguf(source) else task)
    _refuse_quantised(config, source)
    with torch.device("meta"):
        return found.loader.from_config(config, trust_remote_code=trust_remote_code)


def check_plain(config: Any, source: str) -> None:
    """Raise ModelError unless `config` is that of a causal language model that is not compressed yet."""
    _refuse_other_tasks(config, source)
    _refuse_quantised(config, source)


def _quantised(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def _refuse_quantised(config: Any, source: str) -> None:
    method = _quantised(config)
    if method not in (None, "gguf"):
        advice = "eckart.densify it first" if method == NAME else "give the unquantised model"
        raise ModelError(f"{source} is already stored as {method!r}: {advice}")


def load(
    source: str,
    *,
    compute: torch.dtype | None = None,
    place: torch.device | None = None,
    trust_remote_code: bool = False,
    low_rank: bool = True,
    task: str = tasks.CAUSAL,
) -> Loaded:
    """Load a model and its tokenizer, or what else prepares its inputs.

    Weights come from safetensors or GGUF, never from a pickle.

    Args:
        source: a hub id, a folder, or a .gguf file (its weights are dequantised).
        compute: dtype of the model in memory; default: float32 on a CPU, else as stored.
        place: device; default: the CPU.
        trust_remote_code: run the code that the model brings along.
        low_rank: False refuses a folder that is compressed already.
        task: what to load it for, a name of eckart.tasks.TASKS; auto: what it was stored for.

    Raises:
        ModelError: it cannot be read, or is already compressed and must not be.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    found = task_of(config, source, tasks.CAUSAL if is_gguf(source) else task)
    if not (low_rank and _quantised(config) == NAME):
        _refuse_quantised(config, source)
    place = place or torch.device("cpu")
    where, extra = _where(source)
    stored = torch.bfloat16 if extra else _stored_dtype(config)
    options: dict[str, Any] = dict(extra)
    options["dtype"] = torch.float32 if extra else (compute or compute_dtype(stored, place))
    if extra and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if not extra:
        options["use_safetensors"] = True
    try:
        tokenizer = load_preparation(source, found, trust_remote_code=trust_remote_code)
        model = found.loader.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
    except StoreError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load {source}: {_first_line(error)}") from error
    if extra:
        _forget_gguf(model)
    models.cast(model, compute or compute_dtype(stored, place))
    return Loaded(model.to(place).eval(), tokenizer, source, stored, source_bytes(source), found.name)


def load_preparation(source: str, task: Task, *, trust_remote_code: bool = False) -> Any:
    """Load what prepares the inputs of the model at `source` for `task`.

    For pictures, sound and pairs there may be none (None): data may be prepared already.
    """
    if task.reads_text:
        return load_tokenizer(source, trust_remote_code=trust_remote_code)
    for loader in (AutoProcessor, AutoImageProcessor, AutoFeatureExtractor, AutoTokenizer):
        try:
            return loader.from_pretrained(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError):
            continue
    return None


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of the model at `source`."""
    where, extra = _where(source)
    return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)


def _stored_dtype(config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None)
    found = getattr(torch, found) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32


def stored_dtype(source: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """Return the dtype of the weights at `source`, bfloat16 for a GGUF."""
    if is_gguf(source):
        return torch.bfloat16
    return _stored_dtype(load_config(source, trust_remote_code=trust_remote_code))


def _forget_gguf(model: Any) -> None:
    """Make a dequantised model an ordinary one: transformers still calls it quantised."""
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_is_quantized"):
        model.config.__dict__.pop(name, None)


def source_bytes(source: str) -> int | None:
    """Return the bytes of the weight files at `source`, or None where it is not a local path."""
    path = Path(source)
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        return None
    for pattern in _WEIGHT_FILES:
        sizes = [file.stat().st_size for file in path.glob(pattern)]
        if sizes:
            return sum(sizes)
    return None


def weight_bytes(folder: Path) -> int:
    """Return the bytes of the safetensors files in `folder`."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def accounted_bytes(tensors: Mapping[str, Tensor], as_dtype: torch.dtype | None = None) -> int:
    """Return the exact size of one safetensors file that holds `tensors`, header included.

    Floating tensors count in `as_dtype` when it is given; meta tensors will do.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # The format sorts by dtype, the last of its list first, then by name.
    sized = []
    for name, tensor in tensors.items():
        kind = as_dtype if as_dtype is not None and tensor.is_floating_point() else tensor.dtype
        sized.append((-_ORDER.index(str(kind).removeprefix("torch.")), name, kind, tensor))
    end = 0
    for _, name, kind, tensor in sorted(sized, key=lambda item: item[:2]):
        start, end = end, end + tensor.numel() * kind.itemsize
        entries[name] = {
            "dtype": _SAFETENSORS.get(str(kind).removeprefix("torch."), "U8"),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = len(json.dumps(entries, separators=(",", ":")).encode())
    return 8 + (header + 7) // 8 * 8 + end


def check_output(out: Path, overwrite: bool, source: str | None = None) -> None:
    """Refuse an output folder that exists, unless `overwrite` and it holds a model or nothing.

    Raises:
        StoreError: with what to do; also where `out` cannot be made, or holds the model `source`.
    """
    if (
        source is not None
        and out.exists()
        and out.resolve() in (Path(source).resolve(), Path(source).resolve().parent)
    ):
        raise StoreError(f"{out} is where the model comes from: choose another --out")
    if not out.exists():
        parent = next(folder for folder in out.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise StoreError(f"{out} cannot be made: {parent} is not a folder that can be written to")
        return
    if not overwrite:
        raise StoreError(f"{out} exists: choose another --out, or pass --overwrite to replace it")
    known = [out / name for name in ("config.json", "adapter_config.json")]
    if not out.is_dir() or (any(out.iterdir()) and not any(path.is_file() for path in known)):
        raise StoreError(f"{out} is not a model folder: --overwrite will not replace it")


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write in, which becomes `out` by rename when the body ends well, else vanishes."""
    check_output(out, overwrite)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        check_output(out, overwrite)
        if out.exists():
            old = partial.with_suffix(".old")
            os.replace(out, old)
            os.replace(partial, out)
            shutil.rmtree(old)
        else:
            os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(folder: Path, model: Any, tokenizer: Any, max_shard_size: str = "5GB") -> None:
    """Write model, config, generation config and tokenizer into `folder`.

    Raises:
        ModelError: the model is not one of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is no model of transformers, and no other can be loaded from a folder: "
            "save its state_dict with safetensors, beside the code that puts its low-rank modules in place"
        )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if models.low_rank_modules(model) or stores.stored(model):
        plugin.guard_file(folder / "config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
