"""What a model holds: parameters, bytes and FLOPs, of the treated matrices and of the whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from . import hub, joint, losses, models, plugin, running
from .models import Target
from .quant.stored import StoredEmbedding, StoredLinear
from .result import Sizes


def sizes(model: Any, found: Sequence[Target], dtype: torch.dtype) -> Sizes:
    """Return the sizes of `model`, whose treated matrices are `found`, when it is written in `dtype`."""
    ranked = [target for target in found if target.ranked]
    owners = [model.get_submodule(name) for target in ranked for name in target.modules]
    # A shared right factor is stored once.
    inside = {
        id(module): module for target in ranked for module in model.get_submodule(target.name).modules()
    }
    weights = {id(w): w for module in inside.values() for w in _weights(module)}
    buffers = {id(b): b for module in inside.values() for b in module.buffers(recurse=False)}
    plain = sum(weight.numel() for weight in weights.values())
    shapes = [m.shape for m in inside.values() if isinstance(m, StoredLinear | StoredEmbedding)]
    stored = sum(rows * columns for rows, columns in shapes)
    return Sizes(
        linears=plain + stored,
        model=models.parameter_count(model),
        linear_flops=sum(models.flops_per_token(module) for module in owners)
        - 2 * joint.counted_twice(owners),
        model_flops=models.flops_per_token(model),
        linear_bytes=plain * dtype.itemsize + sum(b.numel() * b.element_size() for b in buffers.values()),
        bytes=written_bytes(model, dtype),
    )


def written_bytes(model: Any, dtype: torch.dtype) -> int:
    """Return the bytes of the weight file of `model` in `dtype`."""
    return hub.accounted_bytes(written(model), dtype)


def _weights(module: nn.Module) -> list[Tensor]:
    return [weight for name, weight in module.named_parameters(recurse=False) if name != "bias"]


def written(model: Any) -> dict[str, Tensor]:
    """Return the tensors that are written for `model`."""
    tensors: dict[str, Tensor] = models.state_tensors(model) | plugin.guard_tensors(model)
    if isinstance(model, PreTrainedModel):
        # Some architectures are stored under other names than they have in memory.
        tensors = revert_weight_conversion(model, tensors)
    return tensors


@contextmanager
def rounded(model: Any, targets: Sequence[Target], dtype: torch.dtype) -> Iterator[Sizes]:
    """Round the weights of `model` to `dtype` and give its sizes then; in the body it computes as before.

    After the body, `model` is in `dtype`.

    Raises:
        NotFinite: a weight does not fit `dtype`.
    """
    computed = losses.dtype_of(model)
    found = sizes(models.cast(model, dtype), targets, dtype)
    running.check_fits(models.state_tensors(model), dtype)
    models.cast(model, computed)
    yield found
    models.cast(model, dtype)
