"""The storages: formats of few bits as rows of data, with their tensors, their bytes and their errors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, NotFinite, StoreError
from ..linalg import check_matrix
from . import formats
from .formats import BLOCK, FP4, NEST, NF4
from .grid import Grid

Shape = tuple[int, int]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Scales(Protocol):
    """How the entries of a matrix share their scales, and how these are stored."""

    def layout(self, shape: Shape) -> Layout:
        """Return shape and dtype of each tensor that is stored."""

    def bits(self) -> float:
        """Return what they take per entry of a large matrix."""

    def fit(self, weight: Tensor, levels: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Return the tensors for `weight` (m, n) float32."""

    def open(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the scales and zeros, float32, one for all that share it; None for a zero of 0."""

    def spread(self, values: Tensor, shape: Shape) -> Tensor:
        """Return what `open` gave, one for every entry (m, n)."""

    def at(self, tensors: Mapping[str, Tensor], shape: Shape, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero of the entries that stand at `places` of the flattened matrix."""


def as_bits(values: Tensor) -> Tensor:
    """Return floats as integers of the same bits, which no cast of a model to another dtype changes."""
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)


@dataclass(frozen=True, slots=True)
class Rows:
    """One absmax, float32, per row; levels are whole numbers up to 127."""

    def layout(self, shape: Shape) -> Layout:
        """Return the absmax (m,)."""
        return {"absmax": ((shape[0],), torch.int32)}

    def bits(self) -> float:
        """Return 0: 32 / n."""
        return 0.0

    def fit(self, weight: Tensor, levels: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Return the absmax of each row, or the part of it that rounds the row best."""
        absmax = weight.abs().amax(dim=1)
        if importance is not None:
            whole = torch.where(absmax == 0, 1.0, absmax)[:, None] / 127

            def rounded(shrink: float) -> Tensor:
                return torch.round(weight / (whole * shrink)).clamp(-127, 127) * (whole * shrink)

            absmax = absmax * formats.least_error(weight, importance.expand_as(weight), rounded)
        return {"absmax": as_bits(absmax)}

    def open(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return absmax / 127 (m,)."""
        return tensors["absmax"].view(torch.float32) / 127, None

    def spread(self, values: Tensor, shape: Shape) -> Tensor:
        """Return the value of the row of each entry."""
        return values[:, None].expand(shape)

    def at(self, tensors: Mapping[str, Tensor], shape: Shape, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scale of the row of each place."""
        return tensors["absmax"][places // shape[1]].view(torch.float32) / 127, None


@dataclass(frozen=True, slots=True)
class Blocks:
    """One absmax per 64 entries of the flattened matrix, float32 or quantised once more; levels in [-1, 1].

    Args:
        code: bitsandbytes' name of the codebook.
        nested: the absmax in 8 bits of the dynamic map, with a float32 scale for every 256 of them, around
            their mean.
    """

    code: str
    nested: bool

    def layout(self, shape: Shape) -> Layout:
        """Return the absmax (k,), and of nested ones their scales and mean."""
        count = -(-prod(shape) // BLOCK)
        if not self.nested:
            return {"absmax": ((count,), torch.int32)}
        return {
            "absmax": ((count,), torch.uint8),
            "nest_absmax": ((-(-count // NEST),), torch.int32),
            "nest_offset": ((1,), torch.int32),
        }

    def bits(self) -> float:
        """Return 32 / 64, or 8 / 64 + 32 / (64 * 256)."""
        return 8 / BLOCK + 32 / (BLOCK * NEST) if self.nested else 32 / BLOCK

    def fit(self, weight: Tensor, levels: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Return the absmax of each block, or the part of it that rounds the block best."""
        absmax = formats.block_absmax(weight)
        if importance is not None:
            blocks = formats.blocks_of(weight, BLOCK)
            weights = formats.blocks_of(importance.expand_as(weight), BLOCK)
            whole = torch.where(absmax == 0, 1.0, absmax)[:, None]

            def rounded(shrink: float) -> Tensor:
                return Grid(levels, (whole * shrink).expand_as(blocks)).rounded(blocks)

            absmax = absmax * formats.least_error(blocks, weights, rounded)
        if not self.nested:
            return {"absmax": as_bits(absmax)}
        codes, scales, offset = formats.nest(absmax)
        return {"absmax": codes, "nest_absmax": as_bits(scales), "nest_offset": as_bits(offset)}

    def open(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the absmax (k,)."""
        if not self.nested:
            return tensors["absmax"].view(torch.float32), None
        scales = tensors["nest_absmax"].view(torch.float32).repeat_interleave(NEST)
        scales = scales[: tensors["absmax"].numel()]
        return formats.unnest(tensors["absmax"], scales, tensors["nest_offset"].view(torch.float32)), None

    def spread(self, values: Tensor, shape: Shape) -> Tensor:
        """Return the value of the block of each entry."""
        return values.repeat_interleave(BLOCK)[: prod(shape)].view(shape)

    def at(self, tensors: Mapping[str, Tensor], shape: Shape, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the absmax of the block of each place."""
        absmax = tensors["absmax"][places // BLOCK]
        if not self.nested:
            return absmax.view(torch.float32), None
        scales = tensors["nest_absmax"][places // (BLOCK * NEST)].view(torch.float32)
        return formats.unnest(absmax, scales, tensors["nest_offset"].view(torch.float32)), None


@dataclass(frozen=True, slots=True)
class Groups:
    """A scale, float16, and a zero point, uint8, per 64 entries along each row; levels 0, 1, 2, ..."""

    def layout(self, shape: Shape) -> Layout:
        """Return scale and zero, (m, groups)."""
        size = (shape[0], -(-shape[1] // BLOCK))
        return {"scale": (size, torch.int16), "zero": (size, torch.uint8)}

    def bits(self) -> float:
        """Return 24 / 64."""
        return 24 / BLOCK

    def fit(self, weight: Tensor, levels: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Return what covers the range of each group, or the part of it that rounds the group best."""
        top = len(levels) - 1
        groups = _groups_of(weight)
        shrink = None
        if importance is not None:
            weights = _groups_of(importance.expand_as(weight))

            def rounded(part: float) -> Tensor:
                parts = formats.affine_groups(groups, top, torch.full(groups.shape[:-1], part).to(groups))
                scale, zero = (values.to(torch.float32)[..., None] for values in parts)
                places = torch.round(groups / torch.where(scale == 0, 1.0, scale) + zero)
                return (places.clamp(0, top) - zero) * scale

            shrink = formats.least_error(groups, weights, rounded)
        scale, zero = formats.affine_groups(groups, top, shrink)
        return {"scale": as_bits(scale), "zero": zero}

    def open(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero (m, groups)."""
        return tensors["scale"].view(torch.float16).to(torch.float32), tensors["zero"].to(torch.float32)

    def spread(self, values: Tensor, shape: Shape) -> Tensor:
        """Return the value of the group of each entry."""
        return values.repeat_interleave(BLOCK, dim=1)[:, : shape[1]]

    def at(self, tensors: Mapping[str, Tensor], shape: Shape, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero of the group of each place."""
        row, group = places // shape[1], places % shape[1] // BLOCK
        scale = tensors["scale"][row, group].view(torch.float16)
        return scale.to(torch.float32), tensors["zero"][row, group].to(torch.float32)


def _groups_of(weight: Tensor) -> Tensor:
    """Return rows (m, n) in groups (m, k, 64), the last padded by zeros."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK))
    return padded.view(weight.shape[0], -1, BLOCK)


@dataclass(frozen=True, slots=True)
class Storage:
    """A format of few bits for a matrix (m, n).

    Every tensor that it stores holds integers: a float is stored by its bits, so that no cast of a model to
    another dtype touches it. Codebooks belong to the name and are not stored. Rounding to the nearest value
    errs by at most half of the gap between levels times the scale, inside the range of the levels (all of
    the matrix, unless weights of columns have narrowed it, or double quantisation has rounded an absmax
    down, by at most 0.0071 of the largest difference of 256 absmax from their mean).

    Args:
        name: as in recipes and files.
        width: bits of a code.
        table: the levels in the order of the codes.
        scales: how entries share them.
        mixed: inputs are quantised too, but for outliers: LLM.int8().
    """

    name: str
    width: int
    table: tuple[float, ...]
    scales: Scales
    mixed: bool = False

    @property
    def levels(self) -> Tensor:
        """The levels (L,) float32 in the order of the codes."""
        return torch.tensor(self.table, dtype=torch.float32)

    @property
    def noise(self) -> float:
        """Expected squared error of rounding to nearest, as a share of the variance, for a normal weight.

        From a fixed sample of 2^20 entries in rows of 1024 (only int8 depends on the length of a row).
        """
        return _noise(self.name)

    def bits(self) -> float:
        """Return the bits per parameter of a large matrix, scales included."""
        return self.width + self.scales.bits()

    def layout(self, shape: Shape) -> Layout:
        """Return shape and dtype of each tensor that is stored for a matrix of `shape`, by name."""
        whole = self.width == 8
        size = shape if whole else (formats.packed_bytes(prod(shape), self.width),)
        return {"codes": (size, torch.int8 if whole else torch.uint8), **self.scales.layout(shape)}

    def bytes(self, shape: Shape) -> int:
        """Return the bytes of these tensors."""
        return sum(prod(size) * dtype.itemsize for size, dtype in self.layout(shape).values())

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """Choose the scales for `weight` (m, n) and return the values that its entries may have.

        Args:
            weight: any floating dtype; computed in float32.
            importance: (n,) weights of the columns, not negative: the range of each block is narrowed to
                what has the least weighted squared error (of formats.SHRINKS). None: the whole range.

        Raises:
            ConfigError: not a matrix, or weights of another length.
            NotFinite: an entry or a weight is NaN or infinite, or a scale beyond what stores it.
        """
        weight = check_matrix(weight.detach(), "weight").to(torch.float32)
        if importance is not None:
            importance = _checked_importance(importance.to(weight), weight.shape[1])
        parts = self.scales.fit(weight, self.levels.to(weight.device), importance)
        return self._grid(parts, (weight.shape[0], weight.shape[1]))

    def _grid(self, parts: Mapping[str, Tensor], shape: Shape) -> Grid:
        scale, zero = self.scales.open(parts)
        spread = None if zero is None else self.scales.spread(zero, shape)
        return Grid(self.levels.to(scale.device), self.scales.spread(scale, shape), spread, parts)

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Return the tensors to store for `codes` (m, n) uint8 on `grid`."""
        if self.width == 8:
            packed = (codes.to(torch.int16) - len(self.table) // 2).to(torch.int8)
        else:
            packed = formats.pack_bits(codes, self.width, self.table.index(0.0))
        return {"codes": packed, **grid.parts}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Tensor, Grid]:
        """Return the codes (m, n) uint8 and the grid that `pack` was given.

        Raises:
            StoreError: the tensors are not those of `layout(shape)`.
        """
        self.check(tensors, shape)
        codes = tensors["codes"]
        if self.width == 8:
            codes = (codes.to(torch.int16) + len(self.table) // 2).to(torch.uint8)
        else:
            codes = formats.unpack_bits(codes, self.width, prod(shape)).view(shape)
        parts = {name: tensors[name] for name in self.scales.layout(shape)}
        return codes, self._grid(parts, shape)

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """Return the matrix (m, n), float32, that the tensors store: the reference of every kernel.

        Raises:
            StoreError: the tensors are not those of `layout(shape)`.
        """
        codes, grid = self.unpack(tensors, shape)
        return grid.values(codes)

    def rows(self, tensors: Mapping[str, Tensor], shape: Shape, ids: Tensor) -> Tensor:
        """Return the rows `ids` (...) of the matrix (m, n): (..., n) float32, equal to those of `decode`."""
        places = ids.to(torch.int64)[..., None] * shape[1] + torch.arange(shape[1], device=ids.device)
        scale, zero = self.scales.at(tensors, shape, places)
        if self.width == 8:
            found = tensors["codes"][ids].to(torch.float32)
        else:
            found = self.levels.to(ids.device)[formats.gather_bits(tensors["codes"], self.width, places)]
        return (found if zero is None else found - zero) * scale

    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        """Raise StoreError unless names, shapes and dtypes are those of `layout(shape)`."""
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != self.layout(shape):
            raise StoreError(
                f"{self.name} stores a {shape[0]} x {shape[1]} matrix as {_described(self.layout(shape))}; "
                f"got {_described(found)}: the declared storage and the tensors disagree"
            )

    def finite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Tell whether every scale that is stored is finite."""
        return bool(torch.isfinite(self.scales.open(tensors)[0]).all())


def _checked_importance(importance: Tensor, columns: int) -> Tensor:
    if tuple(importance.shape) != (columns,):
        raise ConfigError(f"weights of columns of shape {tuple(importance.shape)}: give ({columns},)")
    if not bool(torch.isfinite(importance).all()):
        raise NotFinite("weights of columns are NaN or infinite: look at the calibration data")
    if float(importance.min()) < 0:
        raise ConfigError(f"a weight of columns is {float(importance.min()):.3g}: legal are 0 and more")
    return importance


def _described(layout: Layout) -> str:
    return ", ".join(f"{name} {size} {dtype}".replace("torch.", "") for name, (size, dtype) in layout.items())


def _affine(name: str, width: int) -> Storage:
    return Storage(name, width, tuple(float(code) for code in range(2**width)), Groups())


_WHOLE = tuple(float(code) for code in range(-127, 128))
STORAGES: dict[str, Storage] = {
    storage.name: storage
    for storage in (
        Storage("int8", 8, _WHOLE, Rows()),
        Storage("llm.int8", 8, _WHOLE, Rows(), mixed=True),
        Storage("nf4", 4, NF4, Blocks("nf4", nested=False)),
        Storage("nf4-dq", 4, NF4, Blocks("nf4", nested=True)),
        Storage("fp4", 4, FP4, Blocks("fp4", nested=False)),
        Storage("fp4-dq", 4, FP4, Blocks("fp4", nested=True)),
        _affine("int6", 6),
        _affine("int5", 5),
        _affine("int4", 4),
        _affine("int3", 3),
        _affine("int2", 2),
    )
}


def get(name: str) -> Storage:
    """Return the storage of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in STORAGES:
        raise ConfigError(f"storage {name!r}: legal are {', '.join(STORAGES)}")
    return STORAGES[name]


@cache
def _noise(name: str) -> float:
    sample = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    error = sample - STORAGES[name].grid(sample).rounded(sample)
    return float(error.square().mean() / sample.square().mean())
