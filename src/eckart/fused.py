"""Several maps that read one input and were one matrix: queries, keys and values; gate and up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rows of a fused matrix belong to which of its parts.

    parts: name of each, and how many rows it has, in the order in which they stand.
    grouped: these stand there once for every group (of heads), and then again for the next; else once.
    """

    parts: tuple[tuple[str, int], ...]
    grouped: bool

    @property
    def period(self) -> int:
        """Rows of one group, of all of them if there are no groups."""
        return sum(rows for _, rows in self.parts)

    def fits(self, rows: int) -> bool:
        """Tell whether a matrix with so many rows may have this layout."""
        return rows % self.period == 0 if self.grouped else rows == self.period

    def cut(self, stacked: Tensor) -> list[Tensor]:
        """Return what of `stacked` (m, ...) belongs to each part; views where nothing is grouped."""
        sizes = [rows for _, rows in self.parts]
        if not self.grouped:
            return list(torch.split(stacked, sizes))
        groups = stacked.reshape(-1, self.period, *stacked.shape[1:])
        return [part.flatten(0, 1) for part in torch.split(groups, sizes, dim=1)]

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Return `parts` along `dim`, the first or the last, as they stand in the fused matrix."""
        if not self.grouped:
            return torch.cat(list(parts), dim=dim)
        place = dim % parts[0].ndim
        before, after = parts[0].shape[:place], parts[0].shape[place + 1 :]
        sizes = [rows for _, rows in self.parts]
        groups = [part.reshape(*before, -1, rows, *after) for part, rows in zip(parts, sizes, strict=True)]
        return torch.cat(groups, dim=place + 1).flatten(place, place + 1)


class SplitLinear(nn.Module):
    """A fused linear map as its parts, each a module of its own; outputs stand as they did.

    Parts may lose whole groups, where there are groups, or rows, where there are none.

    Args:
        layout: which rows are whose.
        parts: the maps, by name.
    """

    def __init__(self, layout: Layout, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layout = layout
        for name, _ in layout.parts:
            self.add_module(name, parts[name])

    @classmethod
    def of(cls, linear: nn.Linear, layout: Layout) -> "SplitLinear":
        """Return the parts of `linear`, also on the meta device."""
        weights = layout.cut(linear.weight.detach())
        biases = [None] * len(weights) if linear.bias is None else layout.cut(linear.bias.detach())
        made: dict[str, nn.Module] = {}
        for (name, _), weight, bias in zip(layout.parts, weights, biases, strict=True):
            part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
            part.weight = nn.Parameter(weight, linear.weight.requires_grad)
            if bias is not None:
                part.bias = nn.Parameter(bias, linear.bias.requires_grad)
            made[name] = part
        return cls(layout, made).train(linear.training)

    @property
    def parts(self) -> list[Any]:
        """The maps, in order."""
        return [self.get_submodule(name) for name, _ in self.layout.parts]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(self.parts[0].in_features)

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return sum(int(part.out_features) for part in self.parts)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        return self.layout.join([part(inputs) for part in self.parts], -1)

    def joined(self, whole: Sequence[type[nn.Module]]) -> nn.Linear | None:
        """Return the fused nn.Linear, None unless the class of every part is among `whole`."""
        parts = self.parts
        if any(type(part) not in whole for part in parts):
            return None
        weight = self.layout.join([part.weight.detach() for part in parts], 0)
        linear = nn.Linear(weight.shape[1], weight.shape[0], parts[0].bias is not None, "meta")
        linear.weight = nn.Parameter(weight, cast(bool, parts[0].weight.requires_grad))
        if parts[0].bias is not None:
            bias = self.layout.join([part.bias.detach() for part in parts], 0)
            linear.bias = nn.Parameter(bias, cast(bool, parts[0].bias.requires_grad))
        return linear.train(self.training)
