"""A compressed model as plain products of float32 matrices, in the form that the storage to come wants."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .. import dense, fusing, models, stores
from ..experts import Experts
from ..factors import FactoredLinear, LowRank, PivotedLinear, parameters
from ..joint import JointLinear
from ..quant.corrected import CorrectedLinear
from ..quant.leaves import mixed


class EveryExpert(nn.Module):
    """What Experts compute, without a choice that depends on the tokens: every expert sees every token.

    Args:
        experts: what it stands for.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.each = experts.each

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum (tokens, d) over the chosen experts, the others with weight 0.

        Args:
            hidden_states: (tokens, d).
            top_k_index: (tokens, k), the experts of each token; an index beyond the last one is none.
            top_k_weights: (tokens, k).
        """
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.each):
            weight = torch.where(top_k_index == index, top_k_weights, 0).sum(-1, keepdim=True)
            total = total + expert(hidden_states) * weight.to(hidden_states.dtype)
        return total


@torch.no_grad()
def prepare(model: Any, few_bits: bool, multiple: int = 1) -> Any:
    """Return `model` without stored and corrected modules; they become the floats that they stand for.

    Experts in single matrices all run, since a graph cannot choose by the tokens. Outputs of pivoted maps
    stay in the order in which they are made where that is exact (eckart.fusing).

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
    for name, module in [*model.named_modules()]:
        if isinstance(module, Experts):
            model.set_submodule(name, EveryExpert(module))
    if not few_bits:
        return fusing.fuse(model)
    found = models.low_rank_modules(model)
    rights = Counter(id(module.down) for module in found.values() if isinstance(module, FactoredLinear))
    for name, module in found.items():
        shared = isinstance(module, FactoredLinear) and rights[id(module.down)] > 1
        if isinstance(module, JointLinear):  # as pivoted maps; mixed factors would have to be those of all
            models.replace(model, name, dense.dense_linear(module))
        elif isinstance(module, FactoredLinear | PivotedLinear) and not shared:
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


def _map(module: FactoredLinear | PivotedLinear) -> tuple[Tensor, Tensor]:
    if isinstance(module, FactoredLinear):
        factors = module.map()
        return factors.left, factors.right
    pivoted = module.map()
    rows = pivoted.rows.double()
    left = rows.new_empty(module.out_features, module.rank)
    left[pivoted.skeleton.pivots] = torch.eye(module.rank).to(rows)
    left[pivoted.skeleton.rest] = pivoted.skeleton.multipliers.to(rows)
    return left, rows
