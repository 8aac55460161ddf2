"""Products with a matrix stored in few bits, by the fastest way that the device has.

Nothing here changes a value: what the matrix is, Storage.decode says. On a CPU a product goes through the
matrix by parts of CHUNK entries, which stay in the cache: less memory traffic than a product in float32.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import lcm
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from . import formats
from .formats import BLOCK, NEST
from .storage import Blocks, Rows, Shape, Storage

CHUNK = 2**19
"""Entries that a CPU decodes at a time."""
OUTLIER = 6.0
"""|input| from which LLM.int8() keeps a column out of the integer product (Dettmers et al. 2022, 3)."""
_EXACT_TERMS = 1024
_FEW = 8
ALIGNMENT = 64
"""Bytes at whose multiples the tensors lie that the fastest kernels take."""


class ReferenceWarning(UserWarning):
    """A storage runs by PyTorch alone where bitsandbytes would be faster."""


def linear(
    inputs: Tensor, storage: Storage, tensors: Mapping[str, Tensor], shape: Shape, bias: Tensor | None = None
) -> Tensor:
    """Return `inputs` (..., n) times the transpose of the stored matrix (m, n), plus `bias`: (..., m).

    In the dtype of `inputs`, or that of autocast. Gradients go to `inputs` and `bias`: those of a product
    with the dequantised matrix, of which nothing is kept until then (torch.compile may choose to keep it;
    at LLM.int8() it breaks its graph).
    """
    device = inputs.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return linear(inputs.to(torch.get_autocast_dtype(device)), storage, tensors, shape, bias)
    compiled = torch.compiler.is_compiling()
    if compiled and storage.mixed:
        return _uncompiled(inputs, storage, tensors, shape, bias)
    with_gradient = torch.is_grad_enabled() and inputs.requires_grad and not compiled
    out: Tensor = (_apply if with_gradient else _forward)(inputs, storage, tensors, shape)
    return out if bias is None else out + bias.to(out.dtype)


def dequantised(
    storage: Storage, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the stored matrix (m, n), rounded to `dtype`."""
    return _Packed.of(storage, tensors, shape).values(dtype)


def _packable(codes: Tensor) -> bool:
    """Tell whether PyTorch's kernel for int8 takes `codes` (m, n).

    It reads beyond rows that are no multiple of its width, and only from where such reads may start: a
    tensor in a mapped file may lie anywhere, and elsewhere the process ends.
    """
    return codes.shape[1] % BLOCK == 0 and codes.data_ptr() % ALIGNMENT == 0


class _Product(torch.autograd.Function):
    """The product, whose gradient dequantises the matrix once more."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, storage: Storage, tensors: Mapping[str, Tensor], shape: Shape
    ) -> Tensor:
        ctx.matrix = storage, tensors, shape
        return _forward(inputs, storage, tensors, shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        storage, tensors, shape = ctx.matrix
        return gradient @ dequantised(storage, tensors, shape, gradient.dtype), None, None, None


_apply: Any = _Product.apply


_uncompiled: Callable[..., Tensor] = torch.compiler.disable(linear)  # type: ignore[no-untyped-call]


def _forward(inputs: Tensor, storage: Storage, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
    flat = inputs.reshape(-1, shape[1])
    if isinstance(storage.scales, Blocks) and inputs.device.type == "cuda" and _has_kernels("cuda"):
        out = _matmul_4bit(flat, storage.scales, tensors, shape)
    else:
        packed = _Packed.of(storage, tensors, shape)
        out = packed.mixed_product(flat) if storage.mixed else packed.product(flat)
    return out.view(*inputs.shape[:-1], shape[0])


@dataclass(frozen=True, slots=True)
class _Packed:
    """Rows of a stored matrix, `columns` wide, with their scales opened."""

    storage: Storage
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: Shape

    @classmethod
    def of(cls, storage: Storage, tensors: Mapping[str, Tensor], shape: Shape) -> "_Packed":
        return cls(storage, tensors["codes"], *storage.scales.open(tensors), shape)

    def parts(self) -> Iterator["_Packed"]:
        """Yield the rows by some at a time: a multiple of 64, so that blocks and bytes are whole."""
        rows, columns = self.shape
        few = self.codes.device.type != "cpu" or torch.compiler.is_compiling()
        step = rows if few else max(1, CHUNK // columns // BLOCK) * BLOCK
        for first in range(0, rows, step):
            yield self if step >= rows else self._rows(first, min(first + step, rows))

    def _rows(self, first: int, last: int) -> "_Packed":
        columns = self.shape[1]

        def share(tensor: Tensor, unit: int) -> Tensor:
            return tensor[first * columns // unit : -(-last * columns // unit)]

        blocks = isinstance(self.storage.scales, Blocks)
        codes = self.codes[first:last]
        if self.storage.width < 8:
            start = first * columns * self.storage.width // 8
            codes = self.codes[start:][: formats.packed_bytes((last - first) * columns, self.storage.width)]
        scale = share(self.scale, BLOCK) if blocks else self.scale[first:last]
        zero = None if self.zero is None else self.zero[first:last]
        return _Packed(self.storage, codes, scale, zero, (last - first, columns))

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the rows in `dtype`: (level - zero) * scale in float32, rounded."""
        scales, columns = self.storage.scales, self.shape[1]
        if isinstance(scales, Rows):
            return (self.codes.to(torch.float32) * self.scale[:, None]).to(dtype)
        if isinstance(scales, Blocks) and columns % BLOCK == 0 and _has_kernels(self.codes.device.type):
            return _dequantize_4bit(self.codes, self.scale, scales.code, self.shape, dtype)
        found = _levels(self.storage, self.codes, self.shape)
        if columns % BLOCK == 0:
            grouped = found.view(-1, BLOCK)
            grouped = grouped if self.zero is None else grouped.sub_(self.zero.reshape(-1, 1))
            return grouped.mul_(self.scale.reshape(-1, 1)).view(self.shape).to(dtype)
        if self.zero is not None:
            found.sub_(scales.spread(self.zero, self.shape))
        return found.mul_(scales.spread(self.scale, self.shape)).to(dtype)

    def product(self, flat: Tensor) -> Tensor:
        """Return `flat` (t, n) times the transpose of the rows."""
        dtype = flat.dtype
        # Codes up to 127 times inputs may overflow float16: there the scales come first.
        if not isinstance(self.storage.scales, Rows) or dtype == torch.float16:
            return _joined([functional.linear(flat, part.values(dtype)) for part in self.parts()])
        # First of all, or a graph would be one for few rows only.
        eager = not torch.compiler.is_compiling()
        few = eager and flat.device.type == "cpu" and len(flat) <= _FEW and dtype == torch.bfloat16
        if few and _packable(self.codes):
            ones = torch.ones(self.shape[0], dtype=dtype)
            out = torch.ops.aten._weight_int8pack_mm(flat.contiguous(), self.codes, ones)
        else:
            out = _joined([functional.linear(flat, part.codes.to(dtype)) for part in self.parts()])
        return cast(Tensor, out * self.scale).to(dtype)

    def mixed_product(self, flat: Tensor) -> Tensor:
        """Return the product of LLM.int8(): of integers, but for the columns with outliers."""
        outliers = flat.abs() >= OUTLIER
        columns = outliers.any(dim=0).nonzero().view(-1)
        codes, absmax = formats.row_codes(flat.to(torch.float32).masked_fill(outliers, 0))
        codes[:, columns] = 0
        out = integer_product(codes, self.codes) * ((absmax / 127)[:, None] * self.scale)
        if len(columns):
            weight = self.codes[:, columns].to(torch.float32) * self.scale[:, None]
            out = out + functional.linear(flat[:, columns].to(torch.float32), weight)
        return out.to(flat.dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left` (t, n) times the transpose of `right` (m, n), int8, exactly, as int32."""
    device = left.device.type
    # For a single column PyTorch (2.13) returns noise here, and without AVX512 it is slow.
    fits = left.shape[1] % 8 == 0
    if device == "cpu" and fits and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return torch._int_mm(left, right.T)
    if device == "cuda" and _has_kernels(device):
        return cast(Tensor, _bitsandbytes().functional.int8_linear_matmul(left, right))
    return exact_product(left, right)


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """Return what `integer_product` does, by float32: 1024 products of two int8 stay below 2^24."""
    out = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for first in range(0, left.shape[1], _EXACT_TERMS):
        some = (side[:, first : first + _EXACT_TERMS].to(torch.float32) for side in (left, right))
        out += functional.linear(*some).to(torch.int32)
    return out


def _levels(storage: Storage, codes: Tensor, shape: Shape) -> Tensor:
    """Return the levels (m, n), float32, of packed codes."""
    count = shape[0] * shape[1]
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        levels = storage.levels.to(codes.device)
        return levels[formats.unpack_bits(codes, storage.width, count).to(torch.int64)].view(shape)
    found = _by_bytes(storage, codes) if 8 % storage.width == 0 else _by_sums(storage.width, codes)
    return found.view(-1)[:count].view(shape)


def _by_bytes(storage: Storage, stream: Tensor) -> Tensor:
    """Look up all levels of a byte as one number of 8 or 16 bytes: this is what makes it fast."""
    return _level_table(storage).index_select(0, stream.to(torch.int32)).view(torch.float32)


@cache
def _level_table(storage: Storage) -> Tensor:
    """Return the levels of every byte (256,), together as a float64 or complex128."""
    with torch.inference_mode(False):
        shifts = torch.arange(8 - storage.width, -1, -storage.width, device="cpu")
        codes = (torch.arange(256, device="cpu")[:, None] >> shifts) & (2**storage.width - 1)
        pairs = torch.float64 if len(shifts) == 2 else torch.complex128
        return storage.levels.cpu()[codes].view(pairs).view(-1)


def _by_sums(width: int, stream: Tensor) -> Tensor:
    """Return levels that are their codes as sums of what every byte of a whole number of codes adds."""
    table, offsets = _sum_table(width)
    padded = functional.pad(stream, (0, -len(stream) % len(offsets)))
    places = padded.to(torch.int32).view(-1, len(offsets)) + offsets
    return functional.embedding_bag(places.view(-1, len(table) // 256), table, mode="sum")


@cache
def _sum_table(width: int) -> tuple[Tensor, Tensor]:
    """Return what each value of each of the bytes adds to the codes in them, and where each byte's begin."""
    size, codes = lcm(width, 8) // 8, lcm(width, 8) // width
    with torch.inference_mode(False):
        shifts = torch.arange(8 * size - 8, -1, -8, device="cpu")
        words = torch.arange(256, device="cpu") << shifts[:, None]
        places = torch.arange(width * (codes - 1), -1, -width, device="cpu")
        table = (words.view(-1, 1) >> places) & (2**width - 1)
        # 64 times over: one long addition instead of many short ones.
        offsets = (256 * torch.arange(size, dtype=torch.int32, device="cpu")).repeat(64)
        return table.to(torch.float32), offsets


@cache
def _bitsandbytes() -> Any:
    """Return bitsandbytes, or None where it is not installed."""
    # It would say that a package of kernels is missing: they are not used.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


def _has_kernels(device: str) -> bool:
    """Tell whether bitsandbytes runs on `device`; where it could and does not, say once what that costs."""
    if torch.compiler.is_compiling() or device == "meta":
        return False
    found = _bitsandbytes()
    if found is not None and device in getattr(found, "supported_torch_devices", ("cpu", "cuda")):
        return True
    _warn(device, found is not None)
    return False


@cache
def _warn(device: str, installed: bool) -> None:
    why = "does not run there" if installed else "is not installed (pip install 'eckart[tune]')"
    cost = "1.5 times as long, a token at a time," if device == "cpu" else "several times as long"
    warnings.warn(
        f"stored matrices run by PyTorch alone on {device}: 4-bit codebooks and products of int8 take about "
        f"{cost} as by bitsandbytes, which {why}",
        ReferenceWarning,
        stacklevel=2,
    )


def _dequantize_4bit(codes: Tensor, absmax: Tensor, code: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    bnb = _bitsandbytes().functional
    state = bnb.QuantState(absmax, shape, None, BLOCK, code, dtype)
    return cast(Tensor, bnb.dequantize_4bit(codes.view(-1, 1), state))


def _matmul_4bit(flat: Tensor, scales: Blocks, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """Return the product by the fused kernels of bitsandbytes, which read double quantisation too."""
    bnb = _bitsandbytes()
    make = bnb.functional.QuantState
    code = bnb.functional.get_4bit_type(scales.code, device=flat.device)
    absmax, inner, offset = tensors["absmax"], None, None
    if scales.nested:
        levels, nest = formats.dynamic_map().to(flat.device), tensors["nest_absmax"].view(torch.float32)
        inner = make(nest, code=levels, blocksize=NEST, dtype=torch.float32)
        offset = tensors["nest_offset"].view(torch.float32)[0]
    else:
        absmax = absmax.view(torch.float32)
    state = make(absmax, torch.Size(shape), code, BLOCK, scales.code, flat.dtype, offset, inner)
    return cast(Tensor, bnb.matmul_4bit(flat, tensors["codes"].view(-1, 1).t(), quant_state=state))
