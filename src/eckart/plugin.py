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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer

from . import dense, fusing, kinds, models, resizing, stores
from .declaration import NAME, EckartConfig, declare
from .embeddings import FactoredEmbedding, FactoredHead, dense_embedding
from .experts import Experts
from .factors import NarrowLinear
from .quant.corrected import CorrectedLinear
from .shared import common
from .skeleton import build_skeleton, check_files, spare

GUARD = "eckart: this model needs the eckart package; pip install eckart, and import eckart first"


@register_quantizer(NAME)
class EckartQuantizer(HfQuantizer):  # type: ignore[misc]
    """Rebuilds the low-rank modules that config.json declares, and saves them."""

    requires_calibration = True
    quantization_config: EckartConfig
    _dtypes: dict[str, torch.dtype]

    def update_attn_implementation(self, config: Any) -> Any:
        """Take the guard away before the model is built (transformers >= 5.20)."""
        return without_guard(config)

    def update_tp_plan(self, config: Any) -> Any:
        """Take the guard away before the model is built (transformers < 5.20)."""
        return without_guard(config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        build_skeleton(model, self.quantization_config)
        spare(model, self.quantization_config)
        self._dtypes = _floating(model)
        files = kwargs.get("checkpoint_files")
        if files:
            check_files(model, [Path(file) for file in files])
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *map(re.escape, guard_tensors(model)),
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers 5.16 leaves what files know under another name in the dtype of the file
        for name, tensor in models.state_tensors(model).items():
            tensor.data = tensor.data.to(self._dtypes.get(name, tensor.dtype))
        for name, module in stores.stored(model).items():
            if not isinstance(module, stores.Tied):
                module.check(name)
                module.align()
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


def _floating(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes of the floating tensors of `model`."""
    tensors = models.state_tensors(model).items()
    return {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point()}


def without_guard(config: Any) -> Any:
    """Return `config` without what stops a transformers that lacks this package, which is removed from it."""
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
    """Return the empty tensor under the name of the dense weight of the first changed module, if any.

    Narrow linears need none: their own weights do not fit the model that config.json describes.
    """
    low_rank = models.low_rank_modules(model).items()
    found = [name for name, module in low_rank if not isinstance(module, NarrowLinear)]
    found += [name for name, part in stores.stored(model).items() if not isinstance(part, stores.Tied)]
    # What holds parts of a stock module stands for the tensor of that one, stacked experts for several.
    holders = {name: isinstance(part, Experts) for name, part in kinds.containers(model).items()}
    owners = [models.owner(name, holders) or name for name in found]
    return {
        f"{name}.weight": next(model.parameters()).new_empty(0)
        for name in [name for name in owners if not holders.get(name)][:1]
    }


def mark(model: Any) -> None:
    """Make a model with low-rank or stored modules savable; without any it is a stock model."""
    if not isinstance(model, PreTrainedModel):
        return
    if models.low_rank_modules(model) or stores.stored(model):
        attach(model, EckartQuantizer(declare(model)))
    else:
        detach(model)


def attach(model: Any, quantizer: EckartQuantizer) -> Any:
    """Tell `model` and its config that it is low-rank, so that save_pretrained writes it as such."""
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.config.attn_implementation = GUARD
    model.quantization_method = NAME
    # transformers refuses .float() and .half() on a model with this flag; ours can be cast.
    model.is_quantized = False
    resizing.bind(model)
    return model


def detach(model: Any) -> None:
    """Tell `model` and its config that it is a stock model, if they think otherwise."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, EckartQuantizer):
        quantizer.remove_quantization_config(model)
        model.config.__dict__.pop("attn_implementation", None)
        model.config.__dict__.pop("_is_quantized", None)
        resizing.bind(model)


def densify(model: Any, dtype: torch.dtype | str | None = None) -> Any:
    """Replace every low-rank or stored module of `model`, in place, by what it was, with its function.

    The result is a stock model of the original architecture and size, which plain transformers
    saves and loads. Products are formed in float64 and rounded once.

    Args:
        model: a model with such modules (without any, it is returned as it is).
        dtype: cast the result, a torch.dtype or its name; default: as it is.
    """
    fusing.unfuse(model)
    for name, module in models.low_rank_modules(model).items():
        if isinstance(module, CorrectedLinear):
            models.replace(model, name, dense.dense_corrected(module, model.dtype))
    stores.unstore(model)
    tied = bool(common(model))
    for name, module in models.low_rank_modules(model).items():
        if isinstance(module, FactoredHead):
            head = nn.Linear(module.in_features, module.out_features, False, "meta")
            head.bias, tied = module.codes.bias, True
            models.replace(model, name, head)
        elif isinstance(module, FactoredEmbedding):
            models.replace(model, name, dense_embedding(module))
        elif not isinstance(module, CorrectedLinear):
            models.replace(model, name, dense.dense_linear(module))
    kinds.fold(model)
    if tied:
        models.untie(model)
    detach(model)
    if dtype is not None:
        models.cast(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model
