"""The values that the entries of a matrix may have when they are stored in few bits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that each entry of a matrix (m, n) may have: (levels[code] - zero) * scale.

    Args:
        levels: (L,) float32, in the order of the codes.
        scale: float32, of shape (m, n), expanded where entries share one. Zero where only zero can be had.
        zero: likewise; None for 0.
        parts: the tensors that are stored to give back scale and zero, by name; scale and zero are what
            they give back, not what they were rounded from.
    """

    levels: Tensor
    scale: Tensor
    zero: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def codes(self, values: Tensor, columns: Any = slice(None)) -> Tensor:
        """Return the codes, uint8, of the grid values nearest to `values`, those of the given columns."""
        scale = self.scale[:, columns]
        places = torch.where(scale == 0, 0.0, values / torch.where(scale == 0, 1.0, scale))
        if self.zero is not None:
            places = places + self.zero[:, columns]
        ordered, order = self.levels.sort()
        between = (ordered[1:] + ordered[:-1]) / 2
        return order[torch.bucketize(places, between)].to(torch.uint8)

    def values(self, codes: Tensor, columns: Any = slice(None)) -> Tensor:
        """Return the values, float32, of `codes`."""
        found = self.levels[codes.to(torch.int64)]
        if self.zero is not None:
            found = found - self.zero[:, columns]
        return found * self.scale[:, columns]

    def rounded(self, values: Tensor, columns: Any = slice(None)) -> Tensor:
        """Return the nearest values of the grid, float32."""
        return self.values(self.codes(values, columns), columns)
