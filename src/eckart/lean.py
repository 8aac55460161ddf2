"""Low-rank modules as they run fastest: the products alone.

What runs a token at a time spends a part of its time around the products: calls of modules inside of
modules, and a selection that puts outputs in order. These modules have the parameters of those that they
stand for, and compute the same; where a hook or an adapter sits on a part, they run that part as those do.

The second of the two matrices is tall, and so are those that go on from a common product: many short rows. On
a processor, products of float32 with a token or two read them faster when they are kept by columns
(benchmarks/storage_order.py), so they are, in memory: shape and values are the same. bfloat16 is up to twenty
times slower that way: it stays, and autocast to it takes the matrix by rows.

Tried and left out, since it gains nothing: both products written into one output (`out=`), and products of a
matrix and a vector for a single token.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .factors import FactoredLinear, PivotedLinear, rearranged
from .joint import JointLinear

M = TypeVar("M", bound=nn.Module)
J = TypeVar("J", bound=JointLinear)
TALL = 1.5
"""Rows per column from which a matrix is kept by columns."""


class LaidOut(nn.Module):
    """Whose matrices are kept as is fastest (`lay_out`), also on another device or in another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LaidOut":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return lay_out(self)


class LeanFactored(LaidOut, FactoredLinear):
    """A FactoredLinear whose products run without anything around them."""

    @classmethod
    def of(cls, module: FactoredLinear) -> "LeanFactored":
        """Return the module with the parts of `module`; a tall one is kept by columns from now on."""
        with torch.device("meta"):
            made = cls(module.in_features, module.out_features, module.rank)
        made.down, made.up = module.down, module.up
        return lay_out(made).train(module.training)

    def plain(self) -> FactoredLinear:
        """Return what it was made of."""
        with torch.device("meta"):
            made = FactoredLinear(self.in_features, self.out_features, self.rank)
        made.down, made.up = self.down, self.up
        return lay_out(made, by_rows=True).train(self.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        return _product(self.up, _product(self.down, inputs))


class LeanPivoted(LaidOut, PivotedLinear):
    """A PivotedLinear whose products run without anything around them, put in order only where they are not.

    `straight` tells that outputs are made in the order that they have; `moved` is what made it so
    (eckart.fusing), None where nothing did.
    """

    straight: bool
    moved: Any = None

    @classmethod
    def of(cls, module: PivotedLinear) -> "LeanPivoted":
        """Return the module with the parts of `module`; a tall one is kept by columns from now on."""
        with torch.device("meta"):
            made = cls(module.in_features, module.out_features, module.rank)
        made.pivot, made.rest, made.order = module.pivot, module.rest, module.order
        made.reorder(module.order)
        return lay_out(made).train(module.training)

    def plain(self) -> PivotedLinear:
        """Return what it was made of."""
        with torch.device("meta"):
            made = PivotedLinear(self.in_features, self.out_features, self.rank)
        made.pivot, made.rest, made.order = self.pivot, self.rest, self.order
        return lay_out(made, by_rows=True).train(self.training)

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


class LeanJoint(LaidOut, JointLinear):
    """A JointLinear whose product runs without anything around it; `down` stays with what holds it."""

    @classmethod
    def of(cls, module: JointLinear) -> "LeanJoint":
        """Return the module with the parts of `module`; a tall one is kept by columns from now on."""
        return lay_out(_with_parts(cls, module))

    def plain(self) -> JointLinear:
        """Return what it was made of."""
        return lay_out(_with_parts(JointLinear, self), by_rows=True)

    def forward(self, joint: Tensor) -> Tensor:
        """Map `joint` z (..., r) to (..., m)."""
        others = None if self.up is None else _product(self.up, joint)
        if self.order is None:
            assert others is not None
            return others
        known = joint if others is None else torch.cat([joint, others], dim=-1)
        return rearranged(known, self.order)


def _with_parts(kind: type[J], module: JointLinear) -> J:
    with torch.device("meta"):
        made = kind(module.down, module.out_features, module.own)
    made.up, made.order = module.up, module.order
    return made.train(module.training)


def lay_out(module: M, by_rows: bool = False) -> M:
    """Keep each matrix of the parts of `module` in the order of memory in which products run fastest.

    Args:
        module: whose children are the maps; a child that is no plain nn.Linear stays as it is.
        by_rows: as all others are kept, whatever runs fastest.
    """
    for part in module.children():
        if type(part) is nn.Linear and not part.weight.is_meta:
            weight = part.weight.data
            columns = not by_rows and _faster_by_columns(weight)
            part.weight.data = weight.T.contiguous().T if columns else weight.contiguous()
    return module


def _faster_by_columns(weight: Tensor) -> bool:
    exact = weight.dtype in (torch.float32, torch.float64)
    return exact and weight.device.type == "cpu" and weight.shape[0] >= TALL * weight.shape[1]


Lean = LeanFactored | LeanPivoted | LeanJoint


def lean(module: FactoredLinear | PivotedLinear | JointLinear) -> Lean:
    """Return `module` as it runs fastest."""
    if isinstance(module, JointLinear):
        return LeanJoint.of(module)
    return LeanFactored.of(module) if isinstance(module, FactoredLinear) else LeanPivoted.of(module)


def _product(part: Any, inputs: Tensor) -> Tensor:
    """Return what `part` gives for `inputs`, without calling it if nothing else happens when it is called."""
    if type(part) is nn.Linear and not (
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in part.__dict__  # accelerate moves weights in there
    ):
        weight = part.weight.contiguous() if torch.is_autocast_enabled("cpu") else part.weight
        return functional.linear(inputs, weight, part.bias)
    found: Tensor = part(inputs)
    return found
