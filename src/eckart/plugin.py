"""The quantizer "eckart" of transformers: from_pretrained builds, save_pretrained writes low-rank models.

config.json declares every low-rank module; the skeleton is rebuilt from it on the meta device.

Guards keep a transformers that lacks this package from returning a model with random weights. Two say
what to install, and the quantizer takes them out of the way before the model is built:

* config.json names a weight file (`transformers_weights`) that cannot be one; save_pretrained drops
  this entry, so only folders that eckart wrote have it;
* config.json carries an `attn_implementation` that no transformers knows; this one survives
  save_pretrained, but callers may choose an attention implementation themselves. So, last,
* the weights hold one empty tensor under a name that the dense model uses: a shape that fits no model.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import models
from .embeddings import FactoredEmbedding, FactoredHead, dense_embedding
from .errors import StoreError
from .factors import FORMS, MODULES, FactoredLinear, NarrowLinear, PartialLinear

NAME = "eckart"
FORMAT = 3
READS = (1, 2, 3)
KINDS = (*FORMS, FactoredEmbedding.kind, FactoredHead.kind)
GUARD = "eckart: this model needs the eckart package; pip install eckart, and import eckart first"
_LEGAL_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@register_quantization_config(NAME)
class EckartConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of a low-rank model.

    Args:
        modules: dotted name -> {"kind": k, "rank": r}, where k is factored or pivoted for an
            nn.Linear (a factored one may say "basis": the name of another whose right factor it shares),
            embedding for an nn.Embedding, head for an nn.Linear that is tied to it; or
            {"kind": "narrow", "shape": [m, n], "copies": c} for an nn.Linear that lost rows or
            columns (eckart.factors.NarrowLinear); or {"kind": "partial", "kept": k, "side": s} for one
            that stores some of its rows or columns (eckart.factors.PartialLinear).
        format: version of this declaration and of the tensors' names.

    Raises:
        StoreError: a newer format, an illegal name, an unknown kind or rank.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]],
        format: int = FORMAT,
        quant_method: str = NAME,
    ) -> None:
        if format not in READS:
            raise StoreError(
                f"the folder has format {format}, this eckart reads formats {READS[0]} to {FORMAT}: "
                "install a newer eckart"
            )
        self.quant_method = quant_method
        self.format = format
        self.modules = {name: dict(spec) for name, spec in modules.items()}
        for name, spec in self.modules.items():
            _check_declaration(name, spec)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build it from the JSON of config.json, refusing keys of which it knows nothing."""
        unknown = set(config_dict) - {"modules", "format", "quant_method"}
        if unknown or "modules" not in config_dict:
            raise StoreError(
                f"quantization_config of config.json: unknown keys {sorted(unknown)}, or no 'modules'"
            )
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


def _check_declaration(name: str, spec: Mapping[str, Any]) -> None:
    if not _LEGAL_NAME.fullmatch(name):
        raise StoreError(f"config.json declares a module {name!r}: not a dotted module name")
    if spec.get("kind") == NarrowLinear.kind:
        shape = spec.get("shape")
        pair = shape if isinstance(shape, list | tuple) and len(shape) == 2 else [None]
        numbers, wanted = [*pair, spec.get("copies")], {"kind", "shape", "copies"}
    elif spec.get("kind") == PartialLinear.kind:
        numbers, wanted = [spec.get("kept")], {"kind", "kept", "side"}
    else:
        numbers, wanted = [spec.get("rank")], {"kind", "rank"}
        if spec.get("kind") == FactoredLinear.kind and "basis" in spec:
            wanted = {"kind", "rank", "basis"}
    legal = spec.get("kind") in (*KINDS, NarrowLinear.kind, PartialLinear.kind) and set(spec) == wanted
    legal = legal and isinstance(spec.get("basis", ""), str)
    legal = legal and spec.get("side", "rows") in ("rows", "columns")
    if not legal or not all(isinstance(number, int) and number >= 1 for number in numbers):
        raise StoreError(
            f"config.json declares {name} as {dict(spec)}: legal is a kind of {', '.join(KINDS)} and a rank "
            "of at least 1; the kind narrow, a shape [m, n] and copies; or the kind partial, kept and a "
            "side of rows or columns"
        )


@register_quantizer(NAME)
class EckartQuantizer(HfQuantizer):  # type: ignore[misc]
    """Rebuilds the low-rank modules that config.json declares, and saves them."""

    requires_calibration = True
    quantization_config: EckartConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Take the guard away before the model is built (transformers >= 5.20)."""
        return _without_guard(config)

    def update_tp_plan(self, config: Any) -> Any:
        """Take the guard away before the model is built (transformers < 5.20)."""
        return _without_guard(config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        build_skeleton(model, self.quantization_config)
        files = kwargs.get("checkpoint_files")
        if files:
            check_files(model, [Path(file) for file in files])
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *map(re.escape, guard_tensors(model)),
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return attach(model, self)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors to write, with the guard among them; declare the modules as they are now."""
        self.quantization_config = declare(model)
        attach(model, self)
        return model.state_dict() | guard_tensors(model), {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return densify(model, dtype)

    def is_serializable(self, **kwargs: Any) -> bool:
        """Low-rank modules are saved like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer asks this before a full fine-tune."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Two products and an index compile."""
        return True


def _without_guard(config: Any) -> Any:
    if getattr(config, "_attn_implementation", None) == GUARD:
        config._attn_implementation = None
    if getattr(config, "transformers_weights", None) == GUARD:
        del config.transformers_weights
    return config


def guard_file(config: Path) -> None:
    """Make the config.json of a compressed folder stop a transformers that lacks this package."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values["transformers_weights"] = GUARD
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def guard_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the empty tensor under the name of the dense weight of the first low-rank module, if any.

    Narrow linears need none: their own weights do not fit the model that config.json describes.
    """
    modules = models.low_rank_modules(model).items()
    found = [(name, module) for name, module in modules if not isinstance(module, NarrowLinear)][:1]
    return {f"{name}.weight": next(module.parameters()).new_empty(0) for name, module in found}


def build_skeleton(model: nn.Module, config: EckartConfig) -> None:
    """Put empty low-rank modules into `model` where `config` declares them.

    Raises:
        StoreError: a declared name is not an nn.Linear of the model, or a rank does not fit it.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name, spec in config.modules.items():
        kind: type[nn.Module] = nn.Embedding if spec["kind"] == FactoredEmbedding.kind else nn.Linear
        if type(modules.get(name)) is not kind:
            raise StoreError(
                f"config.json declares {name}, which is no nn.{kind.__name__} of {type(model).__name__}"
            )
        dense = modules[name]
        with torch.device("meta"):
            module = _MAKERS.get(spec["kind"], _low_rank)(name, dense, spec)
        models.replace(model, name, module.to(dense.weight.dtype))
    for name, spec in config.modules.items():
        if "basis" in spec:
            _share_basis(model, name, spec["basis"])
    models.tie(model)


def _share_basis(model: nn.Module, name: str, first: str) -> None:
    own, other = model.get_submodule(name), dict(model.named_modules()).get(first)
    if not (
        isinstance(own, FactoredLinear)
        and isinstance(other, FactoredLinear)
        and own.down.weight.shape == other.down.weight.shape
    ):
        raise StoreError(f"config.json declares that {name} has the basis of {first}, which does not fit")
    own.down = other.down


def _low_rank(name: str, dense: Any, spec: Mapping[str, Any]) -> nn.Module:
    """Return the low-rank module that `spec` declares for `dense`, uninitialised."""
    rank: int = spec["rank"]
    if rank > min(dense.weight.shape):
        shape = " x ".join(map(str, dense.weight.shape))
        raise StoreError(f"config.json declares rank {rank} for {name}, which is {shape}")
    if isinstance(dense, nn.Embedding):
        return FactoredEmbedding(dense.num_embeddings, dense.embedding_dim, rank, dense.padding_idx)
    makers: dict[str, type[Any]] = {"head": FactoredHead, **{form: MODULES[form] for form in FORMS}}
    module: nn.Module = makers[spec["kind"]](
        dense.in_features, dense.out_features, rank, dense.bias is not None
    )
    return module


def _narrow(name: str, dense: nn.Linear, spec: Mapping[str, Any]) -> nn.Module:
    """Return the narrow linear that `spec` declares for `dense`, uninitialised."""
    (outputs, inputs), whole = spec["shape"], (dense.out_features, dense.in_features)
    if outputs > whole[0] or inputs > whole[1] or any(size % spec["copies"] for size in (outputs, whole[0])):
        raise StoreError(
            f"config.json declares {name} as {outputs} x {inputs} in {spec['copies']} copies, and it is "
            f"{whole[0]} x {whole[1]}: the folder is damaged or mixed"
        )
    return NarrowLinear(inputs, outputs, dense.bias is not None, whole=whole, copies=spec["copies"])


def _partial(name: str, dense: nn.Linear, spec: Mapping[str, Any]) -> nn.Module:
    """Return the linear with some rows or columns that `spec` declares for `dense`, uninitialised."""
    whole = dense.out_features if spec["side"] == "rows" else dense.in_features
    if spec["kept"] > whole:
        raise StoreError(
            f"config.json declares {spec['kept']} {spec['side']} of {name}, which has {whole}: "
            "the folder is damaged or mixed"
        )
    sizes = dense.in_features, dense.out_features
    return PartialLinear(*sizes, spec["kept"], spec["side"], dense.bias is not None)


_MAKERS: dict[str, Callable[[str, Any, Mapping[str, Any]], nn.Module]] = {
    NarrowLinear.kind: _narrow,
    PartialLinear.kind: _partial,
}


def check_files(model: nn.Module, files: list[Path]) -> None:
    """Compare the shapes in the safetensors headers with the skeleton, before anything is allocated.

    Raises:
        StoreError: a low-rank module's tensor is missing or has another shape, a file lies outside
            the folder, or a file is unreadable.
    """
    if len({file.parent for file in files}) > 1 or any(".." in file.parts for file in files):
        raise StoreError(f"the weight files lie in several folders: {', '.join(map(str, files))}")
    held: dict[str, list[int]] = {}
    for file in files:
        held |= read_shapes(file)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, module in models.low_rank_modules(model).items():
        for key, tensor in module.state_dict().items():
            shape = held.get(f"{name}.{key}")
            if f"{name}.{key}" not in tied and shape != list(tensor.shape):
                raise StoreError(
                    f"{name}.{key} should have shape {list(tensor.shape)} by config.json and has "
                    f"{shape or 'no tensor'} in the weight files: the folder is damaged or mixed"
                )


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Return name -> shape from the header of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: list(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file} is not a readable safetensors file: {error}") from error


def declare(model: nn.Module) -> EckartConfig:
    """Return the declaration of the low-rank modules that `model` has."""
    modules = {name: _spec(module) for name, module in models.low_rank_modules(model).items()}
    for name, first in models.bases(model).items():
        modules[name]["basis"] = first
    return EckartConfig(modules)


def _spec(module: models.LowRankModule) -> dict[str, Any]:
    if isinstance(module, NarrowLinear):
        return {"kind": module.kind, "shape": list(module.weight.shape), "copies": module.copies}
    if isinstance(module, PartialLinear):
        return {"kind": module.kind, "kept": module.kept, "side": module.side}
    return {"kind": module.kind, "rank": module.rank}


def mark(model: Any) -> None:
    """Make a model into which low-rank modules were put savable; without any it is a stock model."""
    if models.low_rank_modules(model):
        attach(model, EckartQuantizer(declare(model)))


def attach(model: Any, quantizer: EckartQuantizer) -> Any:
    """Tell `model` and its config that it is low-rank, so that save_pretrained writes it as such."""
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.config.attn_implementation = GUARD
    model.quantization_method = NAME
    # transformers refuses .float() and .half() on a model with this flag; ours can be cast.
    model.is_quantized = False
    return model


def densify(model: Any, dtype: torch.dtype | str | None = None) -> Any:
    """Replace every low-rank module of `model`, in place, by the nn.Linear with the same function.

    The result is a stock model of the original architecture and size, which plain transformers
    saves and loads. Products are formed in float64 and rounded once.

    Args:
        model: a model with low-rank modules (without any, it is returned as it is).
        dtype: cast the result, a torch.dtype or its name; default: as it is.
    """
    tied = bool(models.bases(model))
    for name, module in models.low_rank_modules(model).items():
        if isinstance(module, FactoredHead):
            dense = nn.Linear(module.in_features, module.out_features, False, "meta")
            dense.bias, tied = module.codes.bias, True
            models.replace(model, name, dense)
        elif isinstance(module, FactoredEmbedding):
            models.replace(model, name, dense_embedding(module))
        else:
            models.replace(model, name, models.dense_linear(module))
    if tied:
        models.untie(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, EckartQuantizer):
        quantizer.remove_quantization_config(model)
        model.config.__dict__.pop("attn_implementation", None)
        model.config.__dict__.pop("_is_quantized", None)
    if dtype is not None:
        models.cast(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model
