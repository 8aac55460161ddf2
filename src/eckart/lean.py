"""Low-rank modules as they run fastest: the products alone, written where their results belong.

What runs a token at a time spends a part of its time around the products: calls of modules, a copy that
joins two results, a selection that puts outputs in order. These modules have the parameters of those that
they stand for, and compute the same; where gradients, a compiler, autocast or a hook need to see the parts,
they run them one by one, as those do.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

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
        if not (_alone(inputs) and _bare(self.down) and _bare(self.up)):
            return super().forward(inputs)
        flat = inputs.reshape(-1, self.in_features)
        inner = flat.new_empty(flat.shape[0], self.rank)
        outputs = flat.new_empty(flat.shape[0], self.out_features)
        _product(self.down, flat, inner)
        _product(self.up, inner, outputs)
        return outputs.view(*inputs.shape[:-1], self.out_features)


class LeanPivoted(PivotedLinear):
    """A PivotedLinear whose products go into one output, which is put in order only where it is not.

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
        if not (_alone(inputs) and _bare(self.pivot) and (self.rest is None or _bare(self.rest))):
            joined = self.joined(inputs)
            return joined if self.straight else rearranged(joined, self.order)
        flat = inputs.reshape(-1, self.in_features)
        outputs = flat.new_empty(flat.shape[0], self.out_features)
        pivots = outputs[:, : self.rank]
        _product(self.pivot, flat, pivots)
        if self.rest is not None:
            _product(self.rest, pivots, outputs[:, self.rank :])
        if not self.straight:
            outputs = outputs.index_select(1, self.order)
        return outputs.view(*inputs.shape[:-1], self.out_features)


_is_tracing: Callable[[], bool] = cast(Any, torch.jit).is_tracing


def _alone(inputs: Tensor) -> bool:
    """Tell whether only the result is asked for, on a device and in a dtype where that was measured."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and inputs.device.type == "cpu"
        and inputs.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not _is_tracing()
    )


def _bare(part: Any) -> bool:
    """Tell whether nothing is to happen around the product of `part`: no adapter, no storage, no hook."""
    return type(part) is nn.Linear and not part._forward_hooks and not part._forward_pre_hooks


def _product(linear: nn.Linear, inputs: Tensor, out: Tensor) -> None:
    """Write the product (t, m) of `inputs` (t, n) into `out`, whose rows may lie apart."""
    weight, bias = linear.weight, linear.bias
    if inputs.shape[0] == 1:  # a product of matrices takes up to 1.6 times as long for small ones
        if bias is None:
            torch.mv(weight, inputs[0], out=out[0])
        else:
            torch.addmv(bias, weight, inputs[0], out=out[0])
    elif bias is None:
        torch.mm(inputs, weight.t(), out=out)
    else:
        torch.addmm(bias, inputs, weight.t(), out=out)
