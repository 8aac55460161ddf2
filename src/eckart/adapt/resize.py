"""Change the ranks of an adapter without ever forming the product of its factors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import hub
from ..errors import ConfigError, ModelError, RankError
from ..factors import LowRank
from ..linalg import SVD
from ..spectra import tail
from . import spectrum
from .spectrum import Budget, Rule
from .store import Adapter, Factors

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Row:
    """One module: its ranks, the share of the squared spectrum that is kept, the relative error."""

    name: str
    shape: tuple[int, int]
    before: int
    after: int
    energy: float
    error: float


@dataclass(frozen=True, slots=True)
class Resized:
    """What a resize did.

    `error` is relative to the whole update, in Frobenius norm. Bytes are those of the tensors, `file_bytes`
    those of the weight file once it is written.
    """

    rule: str
    rows: list[Row]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    error: float
    file_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from ..render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from .cards import resized_table

        return resized_table(self)


def thin_svd(product: LowRank) -> SVD:
    """Return the SVD of `product.left (m, r) @ product.right (r, n)` in O((m + n) r^2).

    QR of both factors, SVD of the r x r core; min(r, m, n) values, in the dtype of the factors.
    """
    left, core_left = torch.linalg.qr(product.left)
    right, core_right = torch.linalg.qr(product.right.T)
    inner_left, values, inner_right = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    return SVD(left @ inner_left, values, inner_right @ right.T)


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    params: int | None = None,
    size: int | None = None,
) -> tuple[Adapter, Resized]:
    """Return the best approximation of every update of `adapter` at new ranks, and what it cost.

    Exact (to rounding in the dtype of the factors) where the rank allows. Under a budget, the sum over
    all modules of ||s B A - its approximation||_F^2 is the least that fits.

    Args:
        adapter: of any kind but DoRA.
        rank: at most this rank for every module, or
        energy: the share of every squared spectrum to hold, or
        params: parameters of the whole adapter, tensors that are kept whole counted, or
        size: bytes of the weight file.

    Raises:
        ConfigError: not exactly one of these, or an illegal value.
        ModelError: DoRA: its magnitudes belong to the sum of base and update.
        RankError: the budget cannot be reached.
        NotFinite: a factor is NaN or infinite.
    """
    if params is not None and size is not None:
        raise ConfigError("got params and size: give one of them")
    _refuse_dora(adapter)
    limit = params if size is None else _fitting(adapter, size)
    chosen = spectrum.rule(rank, energy, limit)
    svds = {name: thin_svd(_checked(name, one)) for name, one in adapter.factors.items()}
    ranks = _ranks(chosen, adapter, svds)
    made = {name: _cut(one, svds[name], ranks[name]) for name, one in adapter.factors.items() if ranks[name]}
    resized = replace(adapter, factors=made)
    rows = [_row(name, one, svds[name].values, ranks[name]) for name, one in adapter.factors.items()]
    rule = spectrum.describe(chosen) if size is None else f"a file of at most {size:,} bytes"
    return resized, _resized(rule, adapter, resized, rows, svds)


def _refuse_dora(adapter: Adapter) -> None:
    found = next((name for name, one in adapter.factors.items() if one.magnitude is not None), None)
    if found is not None:
        raise ModelError(
            f"{found} is adapted by DoRA: its magnitudes belong to base plus update, so the update alone "
            "cannot be resized; merge it into the base, and extract from the result"
        )


def _checked(name: str, one: Factors) -> LowRank:
    product = one.product()
    for side in (product.left, product.right):
        if not bool(torch.isfinite(side).all()):
            raise ModelError(f"the update of {name} has NaN or infinite entries: the adapter is broken")
    return product


def _fitting(adapter: Adapter, size: int) -> int:
    """Return how many parameters fit into a file of `size` bytes; its header can only get shorter."""
    shapes = {f"{'x' * 60}{name}.{part}": one.left for name, one in adapter.factors.items() for part in "AB"}
    header = hub.accounted_bytes({name: tensor.to("meta") for name, tensor in shapes.items()})
    header -= sum(tensor.numel() * tensor.element_size() for tensor in shapes.values())
    whole = sum(tensor.numel() * tensor.element_size() for tensor in adapter.extras.values())
    itemsize = max((one.left.element_size() for one in adapter.factors.values()), default=4)
    room = (size - header - whole) // itemsize
    if room < 1:
        raise RankError(f"size {size:,} bytes: {whole:,} are whole tensors and {header:,} the file's header")
    return room + sum(tensor.numel() for tensor in adapter.extras.values())


def _ranks(chosen: Rule, adapter: Adapter, svds: Mapping[str, SVD]) -> dict[str, int]:
    shapes = {name: one.shape for name, one in adapter.factors.items()}
    if not isinstance(chosen, Budget):
        found = {name: spectrum.rank(chosen, svd.values, shapes[name]) for name, svd in svds.items()}
        return {name: max(rank, _least(adapter.factors[name])) for name, rank in found.items()}
    # A module with a bias keeps one term to hang it on.
    fixed = sum(_least(one) * sum(one.shape) for one in adapter.factors.values())
    fixed += adapter.parameters - sum(one.rank * sum(one.shape) for one in adapter.factors.values())
    if chosen.parameters <= fixed:
        raise RankError(
            f"a budget of {chosen.parameters:,} parameters: {fixed:,} are tensors that stay as they are"
        )
    skipped = {name: svd.values[_least(adapter.factors[name]) :] for name, svd in svds.items()}
    shared = spectrum.share(Budget(chosen.parameters - fixed), skipped, shapes)
    return {name: rank + _least(adapter.factors[name]) for name, rank in shared.items()}


def _least(one: Factors) -> int:
    return 0 if one.bias is None else 1


def _cut(one: Factors, svd: SVD, rank: int) -> Factors:
    root = svd.values[:rank].sqrt()
    dtype = one.left.dtype
    bias = None if one.bias is None else one.bias * one.scale
    left, right = svd.left[:, :rank] * root, svd.right[:rank] * root[:, None]
    return replace(one, left=left.to(dtype), right=right.to(dtype), scale=1.0, bias=bias)


def _row(name: str, one: Factors, values: Tensor, rank: int) -> Row:
    errors = tail(values)
    lost = float(errors[rank] / errors[0]) if float(errors[0]) > 0 else 0.0
    return Row(name, one.shape, one.rank, rank, 1 - lost, lost**0.5)


def _resized(rule: str, adapter: Adapter, made: Adapter, rows: list[Row], svds: Mapping[str, SVD]) -> Resized:
    whole = {name: float(svd.values.square().sum()) for name, svd in svds.items()}
    total, lost = sum(whole.values()), sum(whole[row.name] * row.error**2 for row in rows)
    return Resized(
        rule=rule,
        rows=rows,
        parameters_before=adapter.parameters,
        parameters_after=made.parameters,
        bytes_before=adapter.bytes,
        bytes_after=made.bytes,
        error=(lost / total) ** 0.5 if total else 0.0,
    )
