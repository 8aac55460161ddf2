"""A compressed model as plain products of float32 matrices, in the form that the storage to come wants."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from .. import dense, models, stores
from ..factors import FactoredLinear, LowRank, PivotedLinear, parameters
from ..quant.corrected import CorrectedLinear
from ..quant.leaves import mixed


@torch.no_grad()
def prepare(model: Any, few_bits: bool, multiple: int = 1) -> Any:
    """Return `model` without stored and corrected modules; they become the floats that they stand for.

    Args:
        model: with low-rank modules or without; it is changed, in place.
        few_bits: write low-rank maps as two factors in a random basis between them. An error in the rows of a
            pivoted map is carried into all the others, which 4 bits do not stand; and no row or column of
            mixed factors has a range of its own.
        multiple: with `few_bits`, ranks become multiples of this, by rows and columns of zeros.
    """
    for name, module in models.low_rank_modules(model).items():
        if isinstance(module, CorrectedLinear):
            models.replace(model, name, dense.dense_corrected(module, torch.float32))
    stores.unstore(model)
    if not few_bits:
        return model
    found = models.low_rank_modules(model)
    rights = Counter(id(module.down) for module in found.values() if isinstance(module, FactoredLinear))
    for name, module in found.items():
        shared = isinstance(module, FactoredLinear) and rights[id(module.down)] > 1
        if isinstance(module, FactoredLinear | PivotedLinear) and not shared:
            models.replace(model, name, _in_few_bits(module, multiple))
    return model


def _in_few_bits(module: FactoredLinear | PivotedLinear, multiple: int) -> nn.Module:
    outputs, inputs = module.out_features, module.in_features
    rank = -(-module.rank // multiple) * multiple
    if parameters("factored", (outputs, inputs), rank) >= outputs * inputs or rank > min(outputs, inputs):
        return dense.dense_linear(module)
    left, right = _map(module)
    factors = mixed(LowRank(left, right))
    bias = module.dense_bias()
    made = FactoredLinear(inputs, outputs, rank, bias is not None)
    made.up.weight.zero_()[:, : module.rank] = factors.left.float()
    made.down.weight.zero_()[: module.rank] = factors.right.float()
    if bias is not None:
        made.up.bias.copy_(bias)
    return made


def _map(module: FactoredLinear | PivotedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(module, FactoredLinear):
        factors = module.map()
        return factors.left, factors.right
    pivoted = module.map()
    rows = pivoted.rows.double()
    left = rows.new_empty(module.out_features, module.rank)
    left[pivoted.skeleton.pivots] = torch.eye(module.rank).to(rows)
    left[pivoted.skeleton.rest] = pivoted.skeleton.multipliers.to(rows)
    return left, rows
