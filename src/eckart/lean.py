"""Low-rank modules as they run fastest: the products alone.

What runs a token at a time spends a part of its time around the products: calls of modules inside of
modules, and a selection that puts outputs in order. These modules have the parameters of those that they
stand for, and compute the same; where a hook or an adapter sits on a part, they run that part as those do.

Tried and left out, since it gains nothing: both products written into one output (`out=`), and products of a
matrix and a vector for a single token.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .factors import FactoredLinear, PivotedLinear, rearranged


class LeanFactored(FactoredLinear):
    """A FactoredLinear whose products run without anything around them."""

    @classmethod
    def of(cls, module: FactoredLinear) -> "LeanFactored":
        """Return the module with the parts of `module`, which are not copied."""
        with torch.device("meta"):
            made = cls(module.in_features, module.out_features, module.rank)
        made.down, made.up = module.down, module.up
        return made.train(module.training)

    def plain(self) -> FactoredLinear:
        """Return what it was made of."""
        with torch.device("meta"):
            made = FactoredLinear(self.in_features, self.out_features, self.rank)
        made.down, made.up = self.down, self.up
        return made.train(self.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        return _product(self.up, _product(self.down, inputs))


class LeanPivoted(PivotedLinear):
    """A PivotedLinear whose products run without anything around them, put in order only where they are not.

    `straight` tells that outputs are made in the order that they have; `moved` is what made it so
    (eckart.fusing), None where nothing did.
    """

    straight: bool
    moved: Any = None

    @classmethod
    def of(cls, module: PivotedLinear) -> "LeanPivoted":
        """Return the module with the parts of `module`, which are not copied."""
        with torch.device("meta"):
            made = cls(module.in_features, module.out_features, module.rank)
        made.pivot, made.rest, made.order = module.pivot, module.rest, module.order
        made.reorder(module.order)
        return made.train(module.training)

    def plain(self) -> PivotedLinear:
        """Return what it was made of."""
        with torch.device("meta"):
            made = PivotedLinear(self.in_features, self.out_features, self.rank)
        made.pivot, made.rest, made.order = self.pivot, self.rest, self.order
        return made.train(self.training)

    def reorder(self, order: Tensor) -> None:
        """Take `order` (m,) from now on."""
        self.order = order.to(self.order)
        self.straight = bool((self.order == torch.arange(len(order)).to(self.order)).all())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.reorder(self.order)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        pivots = _product(self.pivot, inputs)
        rest = self.rest
        joined = pivots if rest is None else torch.cat([pivots, _product(rest, pivots)], dim=-1)
        return joined if self.straight else rearranged(joined, self.order)


def _product(part: Any, inputs: Tensor) -> Tensor:
    """Return what `part` gives for `inputs`, without calling it if nothing else happens when it is called."""
    if type(part) is nn.Linear and not (
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in part.__dict__  # accelerate moves weights in there
    ):
        return functional.linear(inputs, part.weight, part.bias)
    found: Tensor = part(inputs)
    return found
