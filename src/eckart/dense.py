"""Plain nn.Linear that compute what low-rank, narrow and corrected modules do."""

import copy

import torch
from torch import nn

from .factors import LowRankLinear, NarrowLinear, PartialLinear
from .joint import JointLinear
from .quant.corrected import CorrectedLinear
from .shared import SharedLinear


@torch.no_grad()
def dense_linear(
    module: LowRankLinear | NarrowLinear | PartialLinear | SharedLinear | JointLinear,
) -> nn.Linear:
    """Return the nn.Linear (m, n) that computes what `module` does; the product is formed in float64.

    Rows and columns that were left out come back as zeros.
    """
    own = next(module.parameters())
    if isinstance(module, NarrowLinear | PartialLinear):
        weight, bias = module.padded()
    elif isinstance(module, SharedLinear):
        weight, bias = module.dense_weight(), module.dense_bias()
    else:
        wide = copy.deepcopy(module).to(device="cpu").to(torch.float64)
        weight, bias = wide.map().dense(), wide.dense_bias()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, own.device, own.dtype)
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear


@torch.no_grad()
def dense_corrected(module: CorrectedLinear, dtype: torch.dtype) -> nn.Linear:
    """Return the nn.Linear (m, n) in `dtype` that computes what `module` does, summed in float64."""
    weight, bias = module.dense_weight(), module.dense_bias()
    linear = nn.Linear(module.in_features, module.out_features, bias is not None, "meta")
    linear.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype))
    return linear
