"""The grid of a stored matrix as training sees it: what each float is rounded to, and by which scale."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from .formats import BLOCK
from .storage import Blocks, Rows, Shape, Storage, as_bits
from .stored import StoredEmbedding, StoredLinear

Matrix = StoredLinear | StoredEmbedding
GAIN = 10.0
"""A step of AdamW changes a scale by this many times the rate, as a share of it."""
_CHUNK = 2**16
"""Entries that a CPU rounds at a time."""


@dataclass(frozen=True, slots=True)
class Levels:
    """The levels of a storage in ascending order, none twice, their codes, and the midpoints between."""

    values: tuple[float, ...]
    codes: tuple[int, ...]
    middles: tuple[float, ...]

    @property
    def whole(self) -> bool:
        """Whether the levels are whole numbers, one apart."""
        return self.values[-1] - self.values[0] == len(self.values) - 1

    @property
    def edges(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The lower and upper ends of what is rounded to each level; the outer cells are symmetric."""
        first, last = 2 * self.values[0] - self.middles[0], 2 * self.values[-1] - self.middles[-1]
        return (first, *self.middles), (*self.middles, last)


@cache
def levels(storage: Storage) -> Levels:
    """Return the levels of `storage`."""
    codes = {level: code for code, level in enumerate(storage.levels.tolist())}
    values = tuple(sorted(codes))
    row = torch.tensor(values, dtype=torch.float32)
    return Levels(values, tuple(codes[level] for level in values), tuple(((row[1:] + row[:-1]) / 2).tolist()))


@dataclass(frozen=True, slots=True)
class Cells:
    """The grid of a stored matrix (m, n), its scales not spread over the entries.

    Args:
        levels: of the storage.
        scale: broadcast over the entries in the shape `view`; 1 where it is zero.
        zero: likewise, or None.
        final: what the levels are multiplied by in the end: the scale, or what it was trained to.
        view: of the entries.
    """

    levels: Levels
    scale: Tensor
    zero: Tensor | None
    final: Tensor
    view: Shape

    @classmethod
    def of(cls, module: Matrix, gain: Tensor | None = None) -> "Cells":
        """Return the grid of `module`, its scales changed by exp(GAIN `gain`)."""
        scales = module.storage.scales
        scale, zero = scales.open(module.tensors())
        final = scale if gain is None else scales.open(rescaled(module, gain))[0]
        zero = None if zero is None else spread(module, zero)
        cells = spread(module, scale.masked_fill(scale == 0, 1.0))
        return cls(levels(module.storage), cells, zero, spread(module, final), view_of(module))

    def codes(self, values: Tensor) -> Tensor:
        """Return the codes, uint8, of the grid values nearest to `values` (m, n) float32."""
        out = torch.empty_like(values, dtype=torch.uint8)
        codes = torch.tensor(self.levels.codes, dtype=torch.uint8, device=values.device)
        for part, own, found in self._parts(values, out):
            found.copy_(codes[part._nearest(own).to(torch.int64)])
        return out

    def rounded(self, values: Tensor) -> Tensor:
        """Return the grid values, float32, nearest to `values` (m, n) float32."""
        out = torch.empty_like(values)
        table = torch.tensor(self.levels.values, device=values.device)
        for part, own, found in self._parts(values, out):
            torch.mul(part._level(table, part._nearest(own)), part.final, out=found)
        return out

    def scattered(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return numbers that are rounded to the grid values `values`, evenly over what is."""
        low, high = (torch.tensor(ends, device=values.device) for ends in self.levels.edges)
        shares = torch.rand(values.shape, generator=generator).to(values.device)
        for part, own, found in self._parts(values, shares):
            nearest = part._nearest(own)
            start, end = part._level(low, nearest.clone()), part._level(high, nearest)
            found.copy_(torch.lerp(start, end, found).mul_(part.scale))
        return torch.where(self.rounded(shares) == self.rounded(values), shares, values)

    def _parts(self, values: Tensor, out: Tensor) -> Iterator[tuple["Cells", Tensor, Tensor]]:
        """Yield values and places for results in the shape `view`, on a CPU by parts that its cache holds."""
        own, found = values.reshape(self.view), out.view(self.view)
        step = max(1, _CHUNK // own.shape[1]) if values.device.type == "cpu" else len(own)
        for first in range(0, len(own), step):
            rows = slice(first, first + step)
            zero = None if self.zero is None else self.zero[rows]
            part = replace(self, scale=self.scale[rows], final=self.final[rows], zero=zero)
            yield part, own[rows], found[rows]

    def _nearest(self, values: Tensor) -> Tensor:
        """Return the place among the levels, a float, of that next to each of `values`."""
        places, known = values / self.scale, self.levels
        if self.zero is not None:
            places.add_(self.zero)
        if known.whole:
            first, last = known.values[0], known.values[-1]
            return places.round_().clamp_(first, last).sub_(first)
        # Comparing with every midpoint takes a twentieth of the time of a search among them.
        count, above = torch.zeros_like(places), torch.empty_like(places)
        for middle in known.middles:
            count.add_(torch.gt(places, middle, out=above))
        return count

    def _level(self, table: Tensor, nearest: Tensor) -> Tensor:
        """Return `table`, less zero, at places that `_nearest` gave."""
        if self.levels.whole:
            found = nearest.add_(table[0])
        else:
            found = table.index_select(0, nearest.to(torch.int32).view(-1)).view(nearest.shape)
        return found if self.zero is None else found.sub_(self.zero)


def _even(module: Matrix) -> bool:
    """Whether the entries that share a scale are the rows of a view of the matrix."""
    return isinstance(module.storage.scales, Rows) or module.shape[1] % BLOCK == 0


def view_of(module: Matrix) -> Shape:
    """Return the shape in which to see the matrix of `module`."""
    return module.shape if isinstance(module.storage.scales, Rows) or not _even(module) else (-1, BLOCK)


def spread(module: Matrix, values: Tensor) -> Tensor:
    """Return one value for each scale of `module`, so that it is broadcast over its matrix."""
    return values.reshape(-1, 1) if _even(module) else module.storage.scales.spread(values, module.shape)


def gathered(module: Matrix, values: Tensor) -> Tensor:
    """Return the sum of `values` (m, n) over the entries of each scale, flat."""
    if _even(module):
        return values.reshape(view_of(module)).sum(dim=1)
    with torch.enable_grad():
        ones = torch.ones_like(module.storage.scales.open(module.tensors())[0]).requires_grad_()
        (found,) = torch.autograd.grad(spread(module, ones), ones, values)
    return found.flatten()


def scale_name(module: Matrix) -> str | None:
    """Return which of the stored tensors is the bits of the scales; None where they are codes themselves."""
    scales = module.storage.scales
    if isinstance(scales, Blocks):
        return None if scales.nested else "absmax"
    return "absmax" if isinstance(scales, Rows) else "scale"


def rescaled(module: Matrix, gain: Tensor) -> dict[str, Tensor]:
    """Return the tensors of `module` with each scale times exp(GAIN `gain`), in the precision of storing."""
    tensors, name = module.tensors(), scale_name(module)
    if name is None:
        return tensors
    dtype = torch.float16 if tensors[name].dtype == torch.int16 else torch.float32
    old = tensors[name].view(dtype)
    return tensors | {name: as_bits((old.to(torch.float32) * (GAIN * gain.view(old.shape)).exp()).to(dtype))}
