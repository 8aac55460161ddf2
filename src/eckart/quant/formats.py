"""Codebooks, scales of blocks, rows and groups, and streams of bits: what the storages are made of.

Pure torch. The 4-bit codebooks, the 8-bit map of double quantisation and the rounding of both are those of
bitsandbytes (0.50, on a CPU), bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import gcd, lcm

import torch
from torch import Tensor

from ..errors import ConfigError, NotFinite

BLOCK = 64
"""Entries of a flattened matrix, in NF4 and FP4, or of a row, in the affine formats, that share a scale."""
NEST = 256
"""Scales of blocks that share a scale when they are quantised themselves."""
SHRINKS = tuple(1 - step / 32 for step in range(17))
"""Tried on the range of a block when its columns have weights: from all of it down to half."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal variable (QLoRA, Dettmers et al. 2023, appendix E), scaled to [-1, 1]."""
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
"""One sign, two exponent and one mantissa bit, in the order of the bits (not of the values)."""

_FLOOR = 1e-38
_LOOKUP = 65535
_HALF_MAX = 65504.0


def dynamic_map() -> Tensor:
    """Return the (256,) ascending values of signed 8-bit dynamic quantisation, float32.

    A decimal exponent in unary, then a linear fraction (8-Bit Approximations for Parallelism in Deep
    Learning, Dettmers 2015).
    """
    return torch.tensor(_DYNAMIC, dtype=torch.float32)


def _dynamic_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return tuple(sorted(values))


_DYNAMIC = _dynamic_values()


@cache
def _kept_dynamic_map() -> Tensor:
    with torch.inference_mode(False):
        return dynamic_map()


@cache
def _dynamic_lookup() -> Tensor:
    """Return the code nearest to each of 65536 evenly spaced values of [-1, 1], uint8."""
    levels = dynamic_map().to(torch.float64)
    points = torch.arange(_LOOKUP + 1, dtype=torch.float64) * 2 / _LOOKUP - 1
    return torch.bucketize(points, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def blocks_of(values: Tensor, size: int) -> Tensor:
    """Return `values`, flattened and padded by zeros, in blocks (k, size)."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def block_absmax(weight: Tensor) -> Tensor:
    """Return the largest |entry| of each block of 64 of the flattened `weight`, float32.

    A partial last block counts as 1e-38 where it is zero, as in bitsandbytes.
    """
    found = blocks_of(weight.to(torch.float32), BLOCK).abs().amax(dim=1)
    if weight.numel() % BLOCK:
        found[-1:].clamp_(min=_FLOOR)
    return found


def block_codes(weight: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """Return the codes (m, n), uint8, of the levels nearest to `weight` over the absmax of its block.

    What bitsandbytes' quantize_4bit writes, in blocks of 64, for absmax = block_absmax(weight): also where
    the absmax is quantised afterwards. |error| <= absmax * (half of the largest gap of `levels`).
    """
    ordered, order = levels.sort()
    flat, full = weight.to(torch.float32).reshape(-1), weight.numel() // BLOCK * BLOCK
    # A product with the reciprocal, but a quotient in the last, partial block: roundings differ.
    inverse = 1 / absmax[: full // BLOCK, None].clamp(min=_FLOOR)
    places = torch.cat([(flat[:full].view(-1, BLOCK) * inverse).reshape(-1), flat[full:] / absmax[-1]])
    found = torch.bucketize(places.clamp(-1, 1), (ordered[1:] + ordered[:-1]) / 2)
    return order[found].to(torch.uint8).view(weight.shape)


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the scales of blocks to 8 bits: double quantisation (QLoRA, section 3).

    Returns:
        Codes (k,) uint8 of the dynamic map, a scale for every 256 of them, and the mean (1,) that was
        subtracted, float32. |error| <= 0.0071 times the scale: half of the largest gap of the map, and one
        step of bitsandbytes' table of 65536 places.
    """
    offset = absmax.mean()
    blocks = blocks_of(absmax - offset, NEST)
    scales = blocks.abs().amax(dim=1)
    inverse = torch.where(scales == 0, 0.0, 1 / torch.where(scales == 0, 1.0, scales))
    halves = ((blocks * inverse[:, None]).clamp(-1, 1) + 1) * 0.5
    # bitsandbytes multiplies and adds with one rounding to float32; float64 holds the product exactly.
    places = (halves.cpu().to(torch.float64) * _LOOKUP + 0.5).to(torch.float32).to(torch.int64)
    codes = _dynamic_lookup()[places].to(absmax.device)
    codes = torch.where(scales[:, None] == 0, 0, codes).to(torch.uint8)
    return codes.view(-1)[: absmax.numel()], scales, offset.view(1)


def unnest(codes: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """Return the scales of blocks, float32, that `nest` stored, for its codes and the scale of each."""
    levels = dynamic_map() if torch.compiler.is_compiling() else _kept_dynamic_map()
    return levels.to(codes.device)[codes.to(torch.int64)] * scales + offset


def row_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of `weight` (m, n) to int8 by its absmax: round(127 w / absmax).

    What bitsandbytes' int8_vectorwise_quant writes (LLM.int8(), Dettmers et al. 2022, section 2); a zero
    row, for which that is undefined, gets zeros. |error| <= step / 2, step = absmax / 127.

    Returns:
        Codes (m, n) int8 and absmax (m,) float32.
    """
    absmax = weight.abs().amax(dim=1).to(torch.float32)
    inverse = torch.where(absmax == 0, 0.0, 127.0 / torch.where(absmax == 0, 1.0, absmax))
    return torch.round(weight * inverse[:, None]).to(torch.int8), absmax


def affine_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise each row of `weight` (m, n) to 8 bits with a zero point: w = (code - zero) * step.

    Asymmetric (Jacob et al. 2018, section 2.1): the range, 0 included, has 256 values, of which one is
    exactly 0. |error| <= step / 2, step = (max - min) / 255.

    Returns:
        Codes (m, n) uint8, steps (m, 1) float32, zeros (m, 1) float32, whole numbers in 0..255.
    """
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    step = (high - low).to(torch.float32) / 255
    safe = torch.where(step == 0, 1.0, step)
    zero = torch.round(-low / safe)
    return torch.round(weight / safe + zero).clamp(0, 255).to(torch.uint8), step, zero


def least_error(values: Tensor, weights: Tensor, rounded: Callable[[float], Tensor]) -> Tensor:
    """Return for each block the factor on its range, of SHRINKS, that rounds it best.

    Args:
        values: blocks (..., size).
        weights: of the squared errors, of the shape of `values`.
        rounded: gives `values` rounded when every range is multiplied by its argument.

    Returns:
        Factors (...), 1 where nothing is better.
    """
    best = torch.full(values.shape[:-1], torch.inf, device=values.device)
    chosen = torch.ones_like(best)
    for shrink in SHRINKS:
        error = ((values - rounded(shrink)).square() * weights).sum(dim=-1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, shrink, chosen)
    return chosen


def affine_groups(weight: Tensor, top: int, shrink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return scale, float16, and zero, uint8, of groups (..., 64) with codes 0..top.

    The range, 0 included and multiplied by `shrink` (...), is covered: scales round upwards.

    Raises:
        NotFinite: a scale is beyond float16.
    """
    low, high = weight.amin(dim=-1).clamp(max=0), weight.amax(dim=-1).clamp(min=0)
    if shrink is not None:
        low, high = low * shrink, high * shrink
    wanted = ((high - low) / top).to(torch.float32)
    if float(wanted.max()) > _HALF_MAX:
        raise NotFinite(
            f"a group of 64 has a step of {float(wanted.max()):.3g}, float16 ends at {_HALF_MAX:.0f}: "
            "store this matrix in int8 or nf4, or scale it"
        )
    scale = wanted.to(torch.float16)
    short = scale.to(torch.float32) < wanted
    scale = torch.where(short, (scale.view(torch.int16) + 1).view(torch.float16), scale)
    step = scale.to(torch.float32)
    zero = torch.round(-low / torch.where(step == 0, 1.0, step))
    return scale, zero.to(torch.uint8)


def _word(bits: int) -> torch.dtype:
    return torch.int32 if bits <= 32 else torch.int64


def pack_bits(codes: Tensor, width: int, fill: int = 0) -> Tensor:
    """Return `codes`, of `width` bits each, as a stream of bytes: the first code in the highest bits.

    For 4 bits this is bitsandbytes' order. Codes are padded by `fill` to whole bytes (3 bits: to 8 codes
    in 3 bytes).
    """
    together, length = lcm(width, 8), 8 // gcd(width, 8)
    whole = _word(together)
    flat = codes.reshape(-1).to(whole)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % length), value=fill).view(-1, length)
    shifts = torch.arange(together - width, -1, -width, dtype=whole, device=codes.device)
    words = (flat << shifts).sum(dim=1, dtype=whole)
    shifts = torch.arange(together - 8, -1, -8, dtype=whole, device=codes.device)
    stream: Tensor = (words[:, None] >> shifts) & 255
    return stream.to(torch.uint8).view(-1)


def packed_bytes(count: int, width: int) -> int:
    """Return how many bytes `count` codes of `width` bits take."""
    length = 8 // gcd(width, 8)
    return -(-count // length) * length * width // 8


def unpack_bits(stream: Tensor, width: int, count: int) -> Tensor:
    """Return the first `count` codes, uint8, of a stream of `pack_bits`."""
    together = lcm(width, 8)
    whole = _word(together)
    parts = stream.view(-1, together // 8).to(whole)
    shifts = torch.arange(together - 8, -1, -8, dtype=whole, device=stream.device)
    words = (parts << shifts).sum(dim=1, dtype=whole)
    shifts = torch.arange(together - width, -1, -width, dtype=whole, device=stream.device)
    codes: Tensor = (words[:, None] >> shifts) & (2**width - 1)
    return codes.to(torch.uint8).view(-1)[:count]


def gather_bits(stream: Tensor, width: int, places: Tensor) -> Tensor:
    """Return the codes, int64 in the shape of `places`, that stand at these places of a stream."""
    start = places * width
    first, offset = start >> 3, start & 7
    after = stream[(first + 1).clamp(max=stream.numel() - 1)].to(torch.int64)
    window = (stream[first].to(torch.int64) << 8) | after
    codes: Tensor = (window >> (16 - width - offset)) & (2**width - 1)
    return codes


@dataclass(frozen=True, slots=True)
class Normality:
    """How near to normal the entries of a matrix are within their blocks of 64: the premise of NF4.

    Args:
        kurtosis: excess kurtosis of the entries over the root mean square of their block, corrected for
            the size of blocks: 0 for a normal matrix, positive for heavy tails.
        distance: Kolmogorov-Smirnov distance, in 0..1, of the entries over the absmax of their block from
            what normal blocks have: about 1 / sqrt(entries) for a normal matrix.
    """

    kurtosis: float
    distance: float


def normality(weight: Tensor) -> Normality:
    """Measure how near to normal `weight` (m, n) is; zero blocks and a partial last one are left out.

    Raises:
        ConfigError: no block of 64 entries is left.
    """
    count = weight.numel() // BLOCK * BLOCK
    blocks = weight.detach().reshape(-1)[:count].view(-1, BLOCK).to(torch.float32)
    blocks = blocks[blocks.abs().amax(dim=1) > 0]
    if not len(blocks):
        raise ConfigError(
            f"a matrix {tuple(weight.shape)} has no block of {BLOCK} entries that is not zero: "
            "normality is not defined"
        )
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
    squares = scaled.square()
    fourth = (squares.square().mean(dim=1) / squares.mean(dim=1).square()).mean()
    expected = _normal_shares()
    counts = torch.histc(scaled, len(expected) + 1, -1, 1).cpu().to(torch.float64)
    found = counts.cumsum(0)[:-1] / scaled.numel()
    # For normal entries the mean of x^4 over the squared mean of x^2 in a block of b is 3 b / (b + 2).
    return Normality(float(fourth) * (BLOCK + 2) / BLOCK - 3, float((found - expected).abs().max()))


@cache
def _normal_shares(places: int = 512) -> Tensor:
    """Return the share of entries below the inner edges of `places` bins of [-1, 1], for normal blocks.

    Of entries over the absmax of their block: one is at an end, the others are normal within it.
    """
    absmax = torch.linspace(0, 8, 2001, dtype=torch.float64)[1:]
    inside = torch.erf(absmax / 2**0.5)
    density = inside ** (BLOCK - 2) * torch.exp(-absmax.square() / 2)
    edges = torch.linspace(-1, 1, places + 1, dtype=torch.float64)[1:-1]
    shares = (density * torch.erf(edges[:, None] * absmax / 2**0.5)).sum(dim=1) / (density * inside).sum()
    return 0.5 + (BLOCK - 1) / (2 * BLOCK) * shares
