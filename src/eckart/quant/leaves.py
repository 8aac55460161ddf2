"""The linear leaves of a module, the metric that each of them sees, and how they are rounded together.

A module computes W' = A @ leaf @ B. An error E of the leaf is the error A E B of the map, so that the
leaf's own metrics are B H B^T and A^T C A.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..factors import FactoredLinear, LowRank, PartialLinear, PivotedLinear
from ..linalg import Metric, to_float64
from .grid import Grid
from .rounding import DAMP, OUTPUT_DAMP, Feedback, carried

_LEAF_DAMP = 1e-6
"""The metrics of the module are damped; those of its leaves need that only where a leaf is singular."""
_SOLVE_DAMP = 1e-10
_KEPT = 0.03
"""The share that an error of the right factor, where the left one can make it good, counts all the same."""


class Gridded(Protocol):
    """What gives the values that a matrix may have; a storage."""

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """Return the grid for `weight` (m, n) whose columns count by `importance` (n,)."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A linear leaf of a module: W' = left @ linear.weight @ right.

    Args:
        name: of the leaf inside the module; empty where the module is its own leaf.
        linear: the leaf, (p, q).
        left: A (m, p), or int64 places (p,) of the rows of the leaf among those of the map; None for
            the identity.
        right: B (q, n), or places (q,) of its columns among those of the map, or None.
    """

    name: str
    linear: nn.Linear
    left: Tensor | None = None
    right: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rounded:
    """What a leaf becomes: codes (p, q) uint8 on a grid, and the bias (p,) that goes with them."""

    codes: Tensor
    grid: Grid
    bias: Tensor | None

    def values(self) -> Tensor:
        """Return the weight (p, q) that the codes stand for, in float64."""
        return to_float64(self.grid.values(self.codes))


def leaves(module: nn.Module) -> dict[str, Leaf]:
    """Return the linear leaves of `module` by name.

    A FactoredLinear has `down` and `up`, a PivotedLinear `pivot` and (unless every row is a pivot)
    `rest`, a PartialLinear `inner`; an nn.Linear is itself the leaf "". So is a NarrowLinear: its map
    is that between the channels it has, and the metrics are those of these channels, which the
    caller takes out of the metrics before.

    Raises:
        ModelError: another module, or one with a leaf that is no nn.Linear any more.
    """
    return {leaf.name: leaf for leaf in _leaves(module)}


def _leaves(module: nn.Module) -> list[Leaf]:
    if isinstance(module, FactoredLinear):
        return [
            Leaf("down", module.down, left=_weight(module.up)),
            Leaf("up", module.up, right=_weight(module.down)),
        ]
    if isinstance(module, PivotedLinear):
        return _pivoted_leaves(module)
    if isinstance(module, PartialLinear):
        places, rows = module.places.to(torch.int64), module.side == "rows"
        left, right = (places, None) if rows else (None, places)
        return [Leaf("inner", _linear(module.inner), left, right)]
    if isinstance(module, nn.Linear):
        return [Leaf("", module)]
    raise ModelError(
        f"{type(module).__name__} has no known linear leaves: legal are nn.Linear, NarrowLinear, "
        "PartialLinear, FactoredLinear and PivotedLinear"
    )


def _pivoted_leaves(module: PivotedLinear) -> list[Leaf]:
    pivots, rest = _places(module)
    right = _weight(module.pivot)
    left = right.new_zeros(module.out_features, module.rank)
    left[pivots] = torch.eye(module.rank).to(left)
    if module.rest is None:
        return [Leaf("pivot", module.pivot, left=left)]
    left[rest] = _weight(module.rest)
    return [Leaf("pivot", module.pivot, left=left), Leaf("rest", module.rest, left=rest, right=right)]


def _places(module: PivotedLinear) -> tuple[Tensor, Tensor]:
    places = torch.argsort(module.order.to(torch.int64))
    return places[: module.rank], places[module.rank :]


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise ModelError(
            f"a module of type {type(module).__name__} in place of an nn.Linear: leaves are rounded only once"
        )
    return module


def _weight(module: nn.Module) -> Tensor:
    return to_float64(_linear(module).weight.detach())


def metrics(leaf: Leaf, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the metrics (q, q) and (p, p), float64, that `leaf` (p, q) sees.

    Args:
        leaf: of a module (m, n).
        inputs: H (n, n).
        outputs: C (m, m).
    """
    columns = leaf.right
    if columns is not None and columns.ndim == 2:
        columns = columns.T
    return _seen(to_float64(inputs), columns), _seen(to_float64(outputs), leaf.left)


def _seen(metric: Tensor, through: Tensor | None) -> Tensor:
    if through is None:
        return metric
    if through.ndim == 1:
        return metric[through][:, through]
    return through.T @ metric @ through


@torch.no_grad()
def quantise(
    module: nn.Module,
    storages: Mapping[str, Gridded],
    inputs: Tensor | None,
    outputs: Tensor | None,
    *,
    damp: float = DAMP,
    output_damp: float = OUTPUT_DAMP,
    generator: torch.Generator | None = None,
) -> dict[str, Rounded]:
    """Round all leaves of `module` (m, n), one after the other, for a small tr(C D H D^T), D = W - W'.

    Each leaf is rounded with compensation on both sides (`rounding.carried`) in its own metrics; the
    second of two is first fitted anew to the first as it was rounded. A factored map is first written
    as balanced factors of its SVD in a random basis (`mixed`), and its right factor rounded in the
    metric of what the left one cannot make good. The module itself is not changed. Fitted in float64,
    rounded in float32.

    Args:
        module: as for `leaves`.
        storages: of every leaf, by its name.
        inputs: H (n, n), (n,) or None.
        outputs: C (m, m), (m,) or None.
        damp, output_damp: added to the diagonals of H and C, in units of their means.
        generator: for the basis, on the CPU; without one it is that of seed 0.

    Raises:
        ModelError: as `leaves`.
        ConfigError: storages for other leaves than there are, a metric that does not fit.
        NotFinite, NotPositiveDefinite: as `rounding.Feedback.of`.
    """
    found = leaves(module)
    if set(found) != set(storages):
        raise ConfigError(
            f"storages for {sorted(storages)}: give one for each of the leaves {sorted(found)} "
            f"of a {type(module).__name__}"
        )
    shape = (cast(int, module.out_features), cast(int, module.in_features))
    ends = (Metric(shape[1], inputs, damp).dense(), Metric(shape[0], outputs, output_damp).dense())
    if isinstance(module, FactoredLinear):
        return _factored(module, storages, *ends, generator)
    if isinstance(module, PivotedLinear):
        return _pivoted(module, storages, *ends)
    (leaf,) = found.values()
    seen = metrics(leaf, *ends)
    return {leaf.name: _rounded(_weight(leaf.linear), storages[leaf.name], *seen, leaf.linear.bias)}


def _rounded(
    weight: Tensor, storage: Gridded, inputs: Tensor, outputs: Tensor, bias: Tensor | None
) -> Rounded:
    weight = weight.to(torch.float32)
    along = Feedback.of(weight.shape[1], inputs, damp=_LEAF_DAMP, order=True)
    down = Feedback.of(weight.shape[0], outputs, damp=_LEAF_DAMP, order=True)
    # What is left of an error in a column is weighed by its pivot: ranges are chosen for that.
    grid = storage.grid(weight, along.in_place())
    codes = carried(weight, grid, along, down)
    return Rounded(codes, grid, None if bias is None else bias.detach())


def _factored(
    module: FactoredLinear,
    storages: Mapping[str, Gridded],
    inputs: Tensor,
    outputs: Tensor,
    generator: torch.Generator | None,
) -> dict[str, Rounded]:
    factors = mixed(LowRank(_weight(module.up), _weight(module.down)), generator)
    reach = factors.right @ inputs
    made_good = reach.T @ _solved(reach @ factors.right.T, reach)
    remaining = inputs - (1 - _KEPT) * made_good
    seen = factors.left.T @ outputs @ factors.left
    down = _rounded(factors.right, storages["down"], remaining, seen, None)
    rows = down.values()
    left = _fitted(factors.dense(), rows, inputs)
    up = _rounded(left, storages["up"], rows @ inputs @ rows.T, outputs, module.up.bias)
    return {"down": down, "up": up}


def mixed(low_rank: LowRank, generator: torch.Generator | None = None) -> LowRank:
    """Return the same product as balanced factors of its SVD, in a random orthogonal basis between them.

    The columns of the left factor and the rows of the right one are then alike: none has a range of
    its own, and each mixes all singular directions, so that later ones can make good the errors of
    earlier ones. float64.
    """
    left, left_mix = torch.linalg.qr(to_float64(low_rank.left))
    right, right_mix = torch.linalg.qr(to_float64(low_rank.right).T)
    inner_left, values, inner_right = torch.linalg.svd(left_mix @ right_mix.T)
    generator = generator or torch.Generator().manual_seed(0)
    drawn = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn.to(values.device)).Q
    root = values.sqrt()
    return LowRank(left @ (inner_left * root) @ basis, basis.T @ (root[:, None] * inner_right) @ right.T)


def _pivoted(
    module: PivotedLinear, storages: Mapping[str, Gridded], inputs: Tensor, outputs: Tensor
) -> dict[str, Rounded]:
    found = leaves(module)
    first = found["pivot"]
    weight = _weight(first.linear)
    pivot = _rounded(weight, storages["pivot"], *metrics(first, inputs, outputs), first.linear.bias)
    if module.rest is None:
        return {"pivot": pivot}
    pivots, rest = _places(module)
    rows, seen = pivot.values(), outputs[rest][:, rest]
    goal = to_float64(module.map().dense())
    # The other rows also take up what they can of the errors of the pivots: the conditional mean.
    carried = _solved(seen, outputs[rest][:, pivots] @ (goal[pivots] - rows))
    multipliers = _fitted(goal[rest] + carried, rows, inputs)
    second = _rounded(multipliers, storages["rest"], rows @ inputs @ rows.T, seen, None)
    bias = module.dense_bias()
    if bias is not None:
        whole = to_float64(bias)
        bias = (whole[rest] - second.values() @ whole[pivots]).to(bias)
    return {"pivot": pivot, "rest": replace(second, bias=bias)}


def _fitted(goal: Tensor, rows: Tensor, inputs: Tensor) -> Tensor:
    """Return the L (m, r) of least tr((goal - L rows) H (goal - L rows)^T)."""
    reach = rows @ inputs
    return _solved(reach @ rows.T, reach @ goal.T).T


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    # Rows that are rounded to zero, or to one another, leave a singular matrix: any solution will do.
    floor = _SOLVE_DAMP * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    factor = torch.linalg.cholesky(gram + floor * torch.eye(len(gram)).to(gram))
    return torch.cholesky_solve(right, factor)
