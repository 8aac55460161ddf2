"""Decay of the matrix that factors stand for, in place of weight decay on the factors themselves."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..embeddings import FactoredEmbedding
from ..factors import FactoredLinear, PivotedLinear
from .penalties import frobenius

Slopes = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def slopes(module: nn.Module) -> Slopes:
    """Return the gradient of half the squared Frobenius norm of the map of `module`, by its parameters.

    Empty for a module that is not low-rank.
    """
    if isinstance(module, FactoredLinear):
        left, right = frobenius(module.up.weight, module.down.weight).gradients
        return [(module.up.weight, left), (module.down.weight, right)]
    if isinstance(module, FactoredEmbedding):
        left, right = frobenius(module.codes.weight, module.up.weight.T).gradients
        return [(module.codes.weight, left), (module.up.weight, right.T)]
    if isinstance(module, PivotedLinear):
        rows = module.pivot.weight
        if module.rest is None:
            return [(rows, rows.detach().clone())]
        whole = torch.cat([torch.eye(module.rank).to(rows), module.rest.weight])
        left, right = frobenius(whole, rows).gradients
        return [(rows, right), (module.rest.weight, left[module.rank :])]
    return []


def all_slopes(model: nn.Module) -> Slopes:
    """Return those of all modules, summed where modules share a parameter."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for parameter, slope in slopes(module):
            known = found.get(id(parameter))
            found[id(parameter)] = (parameter, slope if known is None else known[1] + slope)
    return list(found.values())


class FrobeniusDecay(TrainerCallback):  # type: ignore[misc]
    """Takes rate x strength x gradient of |L R|^2 / 2 off the factors in each step, decoupled as in AdamW.

    For Trainer with any optimizer (Khodak et al. 2021, arXiv:2105.01029). Weight decay on the factors is
    that of the nuclear norm and seeks low rank; this one is what weight decay is to a dense matrix. Weight
    decay of the optimizer spares the factors meanwhile, and treats all other parameters as it did.

    Args:
        strength: default: the weight decay that the optimizer has for each factor.
    """

    def __init__(self, strength: float | None = None) -> None:
        self.strength = strength
        self._groups: list[dict[str, Any]] | None = None

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Decay the products; leave the factors to no other decay in the step that follows."""
        found = [(value, slope) for value, slope in all_slopes(model) if value.requires_grad]
        mine = {id(value) for value, _ in found}
        groups = optimizer.param_groups
        owner = {id(value): group for group in groups for value in group["params"]}
        for value, slope in found:
            group = owner.get(id(value))
            if group is not None:
                strength = group.get("weight_decay", 0.0) if self.strength is None else self.strength
                value.sub_(slope, alpha=group["lr"] * strength)
        self._groups = list(groups)
        groups[:] = [part for group in groups for part in _split(group, mine)]

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Give the optimizer its groups back."""
        if self._groups is not None:
            optimizer.param_groups[:] = self._groups
            self._groups = None


def _split(group: dict[str, Any], mine: set[int]) -> list[dict[str, Any]]:
    """Return `group`, the parameters of `mine` in one of their own without weight decay."""
    own = [value for value in group["params"] if id(value) in mine]
    if not own or not group.get("weight_decay"):
        return [group]
    others = [value for value in group["params"] if id(value) not in mine]
    return [{**group, "params": others}, {**group, "params": own, "weight_decay": 0.0}]
