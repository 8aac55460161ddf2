"""Low-rank maps as values, the modules that run them, and what they cost."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .errors import ConfigError, RankError
from .linalg import RowSkeleton, check_rank, pivot_rows

Form = Literal["factored", "pivoted"]
FORMS: tuple[Form, ...] = ("factored", "pivoted")
Side = Literal["rows", "columns"]
_LITTLE = 2048


@dataclass(frozen=True, slots=True)
class LowRank:
    """`left (m, r) @ right (r, n)`: two products, r (m + n) parameters."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Return the product (m, n)."""
        return self.left @ self.right

    def balanced(self) -> "LowRank":
        """Return the same product made of orthogonal columns and rows of matching norms.

        The factors of a weighted SVD are as ill-conditioned as the metric; rounded to 16 bits they
        would lose what the metric protects. These are not.
        """
        basis, mix = torch.linalg.qr(self.left)
        rows = mix @ self.right
        norms = rows.norm(dim=1)
        scale = torch.where(norms > 0, norms.sqrt(), torch.ones_like(norms))
        return LowRank(basis * scale, rows / scale[:, None])


@dataclass(frozen=True, slots=True)
class Pivoted:
    """r rows of the map and the multipliers of the others: r (m + n - r) parameters.

    `rows (r, n)` are the rows `skeleton.pivots` of the map; the rows `skeleton.rest` are
    `skeleton.multipliers @ rows`.
    """

    rows: Tensor
    skeleton: RowSkeleton

    def dense(self) -> Tensor:
        """Return the map (m, n)."""
        outputs = len(self.skeleton.pivots) + len(self.skeleton.rest)
        dense = self.rows.new_empty(outputs, self.rows.shape[1])
        dense[self.skeleton.pivots] = self.rows
        dense[self.skeleton.rest] = self.skeleton.multipliers.to(self.rows) @ self.rows
        return dense


def pivot(low_rank: LowRank, bound: float = 2.0) -> Pivoted:
    """Return the same map as `low_rank` with r^2 fewer parameters and |multipliers| <= `bound`.

    The gauge freedom of a factorization spent on an identity block (PIFA, Zhao et al. 2025).

    Raises:
        NotPositiveDefinite: the left factor has dependent columns.
    """
    skeleton = pivot_rows(low_rank.left, bound)
    left = low_rank.left.to(skeleton.multipliers)
    rows = left[skeleton.pivots] @ low_rank.right.to(skeleton.multipliers)
    return Pivoted(rows, skeleton)


def parameters(form: Form, shape: tuple[int, int], rank: int) -> int:
    """Return the parameters of a rank-`rank` map of `shape` (m, n) in `form`, bias not counted."""
    outputs, inputs = shape
    size = rank * (outputs + inputs)
    return size - rank * rank if form == "pivoted" else size


def index_bytes(form: Form, shape: tuple[int, int]) -> int:
    """Return the bytes of the row order that `form` keeps beside its parameters."""
    return 4 * shape[0] if form == "pivoted" else 0


def break_even(form: Form, shape: tuple[int, int]) -> int:
    """Return the largest rank at which `form` has fewer parameters than the dense matrix (0: none)."""
    dense = shape[0] * shape[1]
    ranks = range(min(shape), 0, -1)
    return next((rank for rank in ranks if parameters(form, shape, rank) < dense), 0)


def rearranged(values: Tensor, places: Tensor) -> Tensor:
    """Return `values[..., places]`, with gradients to `values` (..., k), for `places` (j,) int32 or int64.

    PyTorch selects from the last of two dimensions many times as fast as from that of three, unless there is
    little to select, and gathers back faster than it adds up by index. A compiler needs no such help.
    """
    if torch.compiler.is_compiling() or values.ndim < 2 or values.numel() <= _LITTLE:
        return values.index_select(-1, places)
    flat = values.reshape(-1, values.shape[-1])
    if torch.is_grad_enabled() and values.requires_grad:
        found = flat.gather(1, places.to(torch.int64).expand(flat.shape[0], -1))
    else:
        found = flat.index_select(1, places)
    return found.view(*values.shape[:-1], len(places))


class Replacement(nn.Module):
    """What stands where a linear was. Code that asks its weight for a dtype or a device gets an answer."""

    @property
    def weight(self) -> Tensor:
        """An empty tensor in the dtype and on the device of what is inside: there is no such matrix."""
        floats = (part for part in self.parameters() if part.is_floating_point() and part.ndim > 1)
        found = next(floats, None)
        if found is not None:
            return found.detach().new_empty(0)
        return next(self.buffers()).new_empty(0, dtype=torch.int8)


class FactoredLinear(Replacement):
    """y = up(down(x)): a linear map of rank `rank` as two nn.Linear, the bias on the second.

    Args:
        in_features, out_features: n and m of the map.
        rank: 1 <= rank <= min(m, n).
    """

    kind: Form = "factored"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        check_rank(rank, (out_features, in_features))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        return cast(Tensor, self.up(self.down(inputs)))

    def map(self) -> LowRank:
        """Return the linear map without its bias."""
        return LowRank(self.up.weight.detach(), self.down.weight.detach())

    def dense_bias(self) -> Tensor | None:
        """Return the bias (m,) of the map, or None."""
        return None if self.up.bias is None else self.up.bias.detach()

    def extra_repr(self) -> str:
        """Describe the map for print(model)."""
        return f"{self.in_features} -> {self.rank} -> {self.out_features}"


class PivotedLinear(Replacement):
    """Some outputs from the input, the others from those outputs; then put in order.

    y[pivots] = pivot(x), y[rest] = rest(y[pivots]). `order (m,)` int32 says where each output
    stands in the concatenation of both. The bias of the map is split over the two nn.Linear so
    that the sum is the same.

    Args:
        in_features, out_features: n and m of the map.
        rank: 1 <= rank <= min(m, n).
    """

    kind: Form = "pivoted"
    order: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        check_rank(rank, (out_features, in_features))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.pivot = nn.Linear(in_features, rank, bias=bias)
        self.rest = nn.Linear(rank, out_features - rank, bias=bias) if rank < out_features else None
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        return rearranged(self.joined(inputs), self.order)

    def joined(self, inputs: Tensor) -> Tensor:
        """Return the outputs (..., m) as they are made: the pivots, then the rest."""
        pivots: Tensor = self.pivot(inputs)
        return pivots if self.rest is None else torch.cat([pivots, self.rest(pivots)], dim=-1)

    def map(self) -> Pivoted:
        """Return the linear map without its bias."""
        places = torch.argsort(self.order.to(torch.int64))
        rows = self.pivot.weight.detach()
        multipliers = rows.new_zeros(0, self.rank) if self.rest is None else self.rest.weight.detach()
        return Pivoted(rows, RowSkeleton(places[: self.rank], places[self.rank :], multipliers))

    def dense_bias(self) -> Tensor | None:
        """Return the bias (m,) of the map, or None."""
        if self.pivot.bias is None:
            return None
        first = self.pivot.bias.detach()
        if self.rest is None:
            return first.index_select(0, self.order)
        second = self.rest.weight.detach() @ first + cast(Tensor, self.rest.bias).detach()
        return torch.cat([first, second]).index_select(0, self.order)

    def extra_repr(self) -> str:
        """Describe the map for print(model)."""
        return f"{self.in_features} -> {self.rank} + {self.out_features - self.rank}"


class NarrowLinear(nn.Linear):
    """An nn.Linear without some of the rows or columns that it had: a hidden dimension made narrower.

    Args:
        in_features, out_features: what is left.
        bias: as in nn.Linear.
        whole: (m, n) before.
        copies: how many times the units of the dimension stand one after another in the rows.
    """

    kind: Literal["narrow"] = "narrow"

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, whole: tuple[int, int], copies: int = 1
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.whole, self.copies = whole, copies

    @classmethod
    def slice(
        cls, linear: nn.Linear, rows: Tensor | None, columns: Tensor | None, copies: int = 1
    ) -> "NarrowLinear":
        """Return `linear` with the given rows and columns alone (None: all of them)."""
        weight = linear.weight if rows is None else linear.weight[rows]
        weight = weight if columns is None else weight[:, columns]
        bias = linear.bias if rows is None or linear.bias is None else linear.bias[rows]
        whole = (linear.out_features, linear.in_features)
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], bias is not None, whole=whole, copies=copies)
        made.weight = nn.Parameter(weight.detach().clone())
        made.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return made

    def padded(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the size before, with zeros for what is missing: the same function."""
        outputs, inputs = self.whole
        weight = self.weight.detach().view(self.copies, -1, self.in_features)
        wide = weight.new_zeros(self.copies, outputs // self.copies, inputs)
        wide[:, : weight.shape[1], : self.in_features] = weight
        bias = None
        if self.bias is not None:
            bias = wide.new_zeros(self.copies, outputs // self.copies)
            bias[:, : weight.shape[1]] = self.bias.detach().view(self.copies, -1)
        return wide.flatten(0, 1), None if bias is None else bias.flatten()


class PartialLinear(Replacement):
    """A linear map of which only some rows (or columns) are stored; the others are zero.

    Unlike a NarrowLinear it keeps its outer shape, for neighbours whose code fixes it.

    Args:
        in_features, out_features: n and m of the map.
        kept: how many rows or columns are stored.
        side: which of the two; `places (kept,)` int32 says where they stand.
        bias: of the stored rows, or of all rows where columns are stored.
    """

    kind: Literal["partial"] = "partial"
    places: Tensor

    def __init__(
        self, in_features: int, out_features: int, kept: int, side: Side, bias: bool = False
    ) -> None:
        super().__init__()
        whole = {"rows": out_features, "columns": in_features}[side]
        if not 1 <= kept <= whole:
            raise RankError(f"{kept} of {whole} {side}: legal are 1 to {whole}")
        self.in_features, self.out_features, self.kept, self.side = in_features, out_features, kept, side
        inner = (in_features, kept) if side == "rows" else (kept, out_features)
        self.inner = nn.Linear(*inner, bias=bias)
        self.register_buffer("places", torch.arange(kept, dtype=torch.int32))

    @classmethod
    @torch.no_grad()
    def of(
        cls, linear: nn.Linear, side: Side, places: Tensor, weight: Tensor, bias: Tensor | None
    ) -> "PartialLinear":
        """Return the module that stands for `linear`, with `weight` at the `places` of `side`."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, len(places), side, bias is not None)
        made = made.to(weight.dtype).to_empty(device=weight.device)
        made.inner.weight.copy_(weight)
        made.places.copy_(places)
        if bias is not None:
            made.inner.bias.copy_(bias)
        return made

    @classmethod
    def slice(cls, linear: nn.Linear, side: Side, places: Tensor) -> "PartialLinear":
        """Return `linear` with the rows or columns at `places` alone."""
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        if side == "columns":
            return cls.of(linear, side, places, weight[:, places], bias)
        return cls.of(linear, side, places, weight[places], None if bias is None else bias[places])

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        if self.side == "columns":
            return cast(Tensor, self.inner(rearranged(inputs, self.places)))
        stored = self.inner(inputs)
        flat = stored.reshape(-1, self.kept)  # in two dimensions, for what `rearranged` says
        outputs: Tensor = flat.new_zeros(flat.shape[0], self.out_features)
        outputs = outputs.index_copy(1, self.places.to(torch.int64), flat)
        return outputs.view(*stored.shape[:-1], self.out_features)

    def padded(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (m, n) and bias of the same function."""
        places, weight = self.places.to(torch.int64), self.inner.weight.detach()
        axis = 0 if self.side == "rows" else 1
        wide = weight.new_zeros(self.out_features, self.in_features).index_copy(axis, places, weight)
        bias = None if self.inner.bias is None else self.inner.bias.detach()
        if bias is not None and self.side == "rows":
            bias = bias.new_zeros(self.out_features).index_copy(0, places, bias)
        return wide, bias

    def extra_repr(self) -> str:
        """Describe the map for print(model)."""
        return f"{self.in_features} -> {self.out_features}, {self.kept} {self.side}"


LowRankLinear = FactoredLinear | PivotedLinear
MODULES: dict[Form, type[FactoredLinear] | type[PivotedLinear]] = {
    "factored": FactoredLinear,
    "pivoted": PivotedLinear,
}


@torch.no_grad()
def build(low_rank: LowRank, form: Form, bias: Tensor | None = None) -> LowRankLinear:
    """Return the module of `form` that computes `low_rank` plus `bias` (m,), in float64.

    Convert it afterwards: every product is formed before any rounding to the final dtype.

    Raises:
        ConfigError: form is not one of FORMS, or the bias does not fit.
        NotPositiveDefinite: `form` is pivoted and the left factor has dependent columns.
    """
    if form not in FORMS:
        raise ConfigError(f"form {form!r}: legal are {', '.join(FORMS)}")
    rank, inputs = low_rank.right.shape
    outputs = low_rank.left.shape[0]
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ConfigError(f"bias of shape {tuple(bias.shape)} for {outputs} outputs")
    with torch.device("meta"):
        module = MODULES[form](inputs, outputs, rank, bias is not None)
    module = module.to(torch.float64).to_empty(device=low_rank.left.device)
    if isinstance(module, FactoredLinear):
        _fill_factored(module, low_rank, bias)
    else:
        fill_pivoted(module, pivot(low_rank), bias)
    return module


def _fill_factored(module: FactoredLinear, low_rank: LowRank, bias: Tensor | None) -> None:
    low_rank = low_rank.balanced()
    module.down.weight.copy_(low_rank.right)
    module.up.weight.copy_(low_rank.left)
    if bias is not None:
        module.up.bias.copy_(bias)


@torch.no_grad()
def fill_pivoted(module: PivotedLinear, pivoted: Pivoted, bias: Tensor | None) -> None:
    """Put `pivoted`, of the size of `module`, and the `bias` (m,) of the whole map into it."""
    skeleton = pivoted.skeleton
    module.pivot.weight.copy_(pivoted.rows)
    module.order.copy_(torch.argsort(torch.cat([skeleton.pivots, skeleton.rest])))
    if module.rest is not None:
        module.rest.weight.copy_(skeleton.multipliers)
    if bias is None:
        return
    bias = bias.to(skeleton.multipliers)
    module.pivot.bias.copy_(bias[skeleton.pivots])
    if module.rest is not None:
        carried = skeleton.multipliers @ bias[skeleton.pivots]
        cast(Tensor, module.rest.bias).copy_(bias[skeleton.rest] - carried)
