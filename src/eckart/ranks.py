"""How many terms each matrix keeps: pure functions of spectra, costs and a budget.

A `Curve` is everything that a part of the model may become: one cost and one loss per option. What
an option is (a rank, a width, what becomes of several matrices) is the caller's business.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, merge
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .errors import ConfigError, RankError
from .factors import Form, parameters


@dataclass(frozen=True, slots=True)
class Fixed:
    """Keep `rank` terms of every matrix."""

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RankError(f"rank {self.rank}: must be at least 1")


@dataclass(frozen=True, slots=True)
class Energy:
    """Keep the fewest terms that hold this fraction of the squared (weighted) spectrum."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"energy {self.fraction}: must lie in (0, 1]")


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep this fraction of the parameters of every matrix."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"keep {self.fraction}: must lie in (0, 1]")


Option = TypeVar("Option")


@dataclass(frozen=True, slots=True)
class Curve(Generic[Option]):
    """What one part of the model may become, by increasing cost: three tuples of equal length.

    The last option is the dense part, of loss 0.
    """

    options: tuple[Option, ...]
    costs: tuple[int, ...]
    losses: tuple[float, ...]


def legal_ranks(form: Form, shape: tuple[int, int], multiple: int = 1) -> list[int]:
    """Return the ranks at which `form` is smaller than dense: multiples of `multiple`, ascending."""
    if multiple < 1:
        raise ConfigError(f"multiple {multiple}: must be at least 1")
    dense = shape[0] * shape[1]
    ranks = range(multiple, min(shape) + 1, multiple)
    return [rank for rank in ranks if parameters(form, shape, rank) < dense]


def curve(
    form: Form, shape: tuple[int, int], tail: Tensor, *, multiple: int = 1, unit: float = 1.0
) -> Curve[int]:
    """Return the ranks of a matrix of `shape`, in parameters, given `tail` (k + 1,) of losses per rank.

    Losses are `unit * tail`. The dense matrix is the last option (rank min(m, n)).
    """
    ranks = legal_ranks(form, shape, multiple)
    losses = [unit * float(loss) for loss in tail[torch.tensor(ranks, dtype=torch.int64)]]
    costs = [parameters(form, shape, rank) for rank in ranks]
    return Curve((*ranks, min(shape)), (*costs, shape[0] * shape[1]), (*losses, 0.0))


def legal_widths(units: int, multiple: int = 1) -> list[int]:
    """Return the widths below `units` that may be kept: multiples of `multiple`, ascending."""
    if multiple < 1:
        raise ConfigError(f"multiple {multiple}: must be at least 1")
    return list(range(multiple, units, multiple))


def width_curve(size: int, tail: Tensor, *, multiple: int = 1, unit: float = 1.0) -> Curve[int]:
    """Return the widths of a hidden dimension whose matrices have `size` parameters, `tail` (units + 1,).

    Losses are `unit * tail`. Full width is the last option.
    """
    units = len(tail) - 1
    widths = legal_widths(units, multiple)
    losses = [unit * float(tail[width]) for width in widths]
    return Curve((*widths, units), (*(size // units * width for width in widths), size), (*losses, 0.0))


def together(curves: Sequence[Curve[tuple[Any, ...]]]) -> Curve[tuple[Any, ...]]:
    """Return the best joint options of several parts: an option is what becomes of each, in order.

    The sum of the lower convex hulls: every option on it is optimal at its cost.
    """
    chains = [hull(curve.costs, curve.losses) for curve in curves]
    chosen = [chain[0] for chain in chains]
    rows = [_joined(curves, chosen)]
    for _, place, end, _ in merge(*map(_steps, range(len(curves)), curves, chains), key=lambda step: step[0]):
        chosen[place] = end
        rows.append(_joined(curves, chosen))
    options, costs, losses = zip(*rows, strict=True)
    return Curve(options, costs, losses)


def _joined(curves: Sequence[Curve[tuple[Any, ...]]], chosen: Sequence[int]) -> tuple[Any, int, float]:
    pairs = list(zip(curves, chosen, strict=True))
    option = tuple(pick for curve, place in pairs for pick in curve.options[place])
    return option, sum(curve.costs[i] for curve, i in pairs), sum(curve.losses[i] for curve, i in pairs)


def either(curves: Sequence[Curve[Option]]) -> Curve[Option]:
    """Return the options of all `curves`, alternatives for one part, without those that another beats."""
    rows = sorted(
        (cost, loss, place, index)
        for place, curve in enumerate(curves)
        for index, (cost, loss) in enumerate(zip(curve.costs, curve.losses, strict=True))
    )
    kept = rows[:1]
    for row in rows[1:]:
        if row[1] < kept[-1][1]:
            kept.append(row)
    options = tuple(curves[place].options[index] for _, _, place, index in kept)
    return Curve(options, tuple(row[0] for row in kept), tuple(row[1] for row in kept))


def uniform(rule: Fixed | Keep, form: Form, shape: tuple[int, int], multiple: int = 1) -> int | None:
    """Return the rank that `rule` gives a matrix of `shape`, or None where it stays dense.

    A rank is rounded down to `multiple`, but not below it. None means that the form would not be
    smaller than the dense matrix.
    """
    ranks = legal_ranks(form, shape, multiple)
    if not ranks or (isinstance(rule, Keep) and rule.fraction == 1):
        return None
    if isinstance(rule, Fixed):
        rank = max(rule.rank // multiple, 1) * multiple
        return rank if rank <= ranks[-1] else None
    budget = rule.fraction * shape[0] * shape[1]
    fitting = [rank for rank in ranks if parameters(form, shape, rank) <= budget]
    return fitting[-1] if fitting else ranks[0]


def by_energy(
    rule: Energy, form: Form, shape: tuple[int, int], tail: Tensor, multiple: int = 1
) -> int | None:
    """Return the smallest legal rank that leaves at most 1 - energy of `tail[0]`, or None for dense."""
    allowed = (1 - rule.fraction) * float(tail[0])
    for rank in legal_ranks(form, shape, multiple):
        if float(tail[rank]) <= allowed:
            return rank
    return None


def hull(costs: tuple[int, ...], losses: tuple[float, ...]) -> list[int]:
    """Return the options on the lower convex hull of (cost, loss), from the cheapest to the best."""
    chain: list[int] = []
    for place in range(len(costs)):
        if chain and losses[place] >= losses[chain[-1]]:
            continue
        while len(chain) > 1 and _above(costs, losses, chain[-2], chain[-1], place):
            chain.pop()
        chain.append(place)
    return chain


def _above(costs: tuple[int, ...], losses: tuple[float, ...], first: int, middle: int, last: int) -> bool:
    left = (losses[middle] - losses[first]) * (costs[last] - costs[first])
    return left > (losses[last] - losses[first]) * (costs[middle] - costs[first])


def allocate(curves: Mapping[str, Curve[Any]], budget: int) -> dict[str, int]:
    """Choose one option per part: least summed loss with summed cost at most `budget`.

    Losses must be in one unit. Follows the convex hulls by falling gain per cost (one Lagrange
    multiplier for all parts), then fills what is left with the best options that still fit.
    Never above budget; optimal where the budget is a breakpoint of the joint hull, and otherwise
    at most one hull step from the optimum.

    Returns:
        The index into the curve's options, per name.

    Raises:
        RankError: the cheapest options cost more than `budget`.
    """
    least = sum(curve.costs[0] for curve in curves.values())
    if least > budget:
        raise RankError(f"a budget of {budget:,} cannot be reached: the least is {least:,}")
    chosen = dict.fromkeys(curves, 0)
    left = budget - least
    left = _follow_hulls(curves, chosen, left)
    _fill(curves, chosen, left)
    return chosen


Step = tuple[float, Any, int, int]
"""Slope, whose it is, the option that it leads to, what it costs."""


def _steps(whose: Any, curve: Curve[Any], chain: Sequence[int]) -> Iterator[Step]:
    for start, end in pairwise(chain):
        cost = curve.costs[end] - curve.costs[start]
        yield (curve.losses[end] - curve.losses[start]) / cost, whose, end, cost


def _follow_hulls(curves: Mapping[str, Curve[Any]], chosen: dict[str, int], left: int) -> int:
    """Take hull steps by falling gain per cost; a part whose next step does not fit is done."""
    chains = {name: hull(curve.costs, curve.losses) for name, curve in curves.items()}
    steps = {name: _steps(name, curve, chains[name]) for name, curve in curves.items()}
    queue: list[Step] = []

    def push_next(name: str) -> None:
        # One step of a part at a time: slopes that are equal but for rounding must not swap.
        for step in steps[name]:
            heappush(queue, step)
            return

    for name in curves:
        push_next(name)
    while queue:
        _, name, end, cost = heappop(queue)
        if cost <= left:
            chosen[name], left = end, left - cost
            push_next(name)
    return left


def _fill(curves: Mapping[str, Curve[Any]], chosen: dict[str, int], left: int) -> None:
    """Spend `left` greedily: always the fitting option with the largest gain per cost."""
    queue = [(_best_step(curve, chosen[name], left), name) for name, curve in curves.items()]
    heapify(queue)
    while queue:
        (slope, end), name = heappop(queue)
        if slope >= 0:
            return
        cost = curves[name].costs[end] - curves[name].costs[chosen[name]]
        if cost <= left:
            chosen[name], left = end, left - cost
        heappush(queue, (_best_step(curves[name], chosen[name], left), name))


def _best_step(curve: Curve[Any], start: int, left: int) -> tuple[float, int]:
    best = (0.0, start)
    for end in range(start + 1, len(curve.costs)):
        cost = curve.costs[end] - curve.costs[start]
        if cost > left:
            break
        best = min(best, ((curve.losses[end] - curve.losses[start]) / cost, end))
    return best
