"""Statistics of experts that saw few tokens, or none: filled up from the other experts of their layer.

A moment of width n needs n tokens to have full rank. One that saw t of them becomes
(t own + (n - t) target) / n. The target is the mean of the other experts' where the space is common (what
experts read, what they add to), and a multiple of the identity where it is an expert's own (its hidden
dimension, whose channels have nothing in common with another's): shrinkage as Ledoit & Wolf's (2004), with
the weight by what is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import dimensions, mixtures, models
from .models import Target
from .stats import Moment, Statistic, Stats

_LISTED = 8


@dataclass(frozen=True, slots=True)
class _Layer:
    """The experts of one layer: the name of their list, how many, and what of their matrices is common.

    common: statistics of spaces that all experts share, with the matrix's name inside an expert.
    """

    name: str
    count: int
    matrices: tuple[str, ...]
    common: frozenset[tuple[str, str]]

    def member(self, index: int, matrix: str) -> str:
        return f"{self.name}.{index}.{matrix}"


def fill(model: nn.Module, found: Sequence[Target], stats: Stats) -> list[str]:
    """Fill up the statistics of experts among `found`, in place, and return what there is to warn of.

    An expert that saw no token gets the target itself and counts as if it had seen one.
    """
    warnings = []
    for layer in _layers(model, found):
        least: dict[int, int] = {}
        need = 0
        kinds: list[Statistic] = list(dict.fromkeys(kind for kind, _ in stats.moments if kind != "sketch"))
        for kind in kinds:
            for matrix in layer.matrices:
                size, short = _filled(layer, kind, matrix, stats)
                need = max(need, size) if short else need
                for index, seen in short.items():
                    least[index] = min(seen, least.get(index, seen))
        if least:
            warnings.append(_warning(layer, least, need))
    return warnings


def _layers(model: nn.Module, found: Sequence[Target]) -> list[_Layer]:
    names = [target.name for target in found]
    hidden = {dimension.name: dimension for dimension in dimensions.find(model, found)}
    layers = []
    for name, experts in mixtures.expert_lists(model, models.all_blocks(model)).items():
        own = [target.removeprefix(f"{name}.0.") for target in names if target.startswith(f"{name}.0.")]
        common: set[tuple[str, str]] = set()
        dimension = hidden.get(f"{name}.0")
        if dimension is not None and dimension.kind == "mlp":
            writers = [writer.removeprefix(f"{name}.0.") for writer, _ in dimension.writers]
            common = {(kind, writer) for kind in ("gram", "absolute", "fisher") for writer in writers}
            common.add(("gradient", dimension.reader.removeprefix(f"{name}.0.")))
        layers.append(_Layer(name, len(experts), tuple(own), frozenset(common)))
    return layers


def _filled(layer: _Layer, kind: Statistic, matrix: str, stats: Stats) -> tuple[int, dict[int, int]]:
    """Fill one statistic of one matrix; return its width, and what the experts that lacked tokens saw."""
    names = [layer.member(index, matrix) for index in range(layer.count)]
    _follow(layer, matrix, names, stats)
    if kind in ("gram", "absolute") and any(stats.leader(name) != name for name in names):
        return 0, {}  # filled along with the matrix that reads the same
    places = {index: (kind, name) for index, name in enumerate(names)}
    seen = {index: stats.moments[key] for index, key in places.items() if key in stats.moments}
    counts = [seen[index].count if index in seen else 0 for index in range(layer.count)]
    if len(seen) < 2 or len(set(counts)) == 1:  # nothing to learn from, or nothing is routed
        return 0, {}
    first = next(iter(seen.values())).total
    need, common = (len(first) if first.ndim == 2 else 1), (kind, matrix) in layer.common
    made = {
        index: _shrunk(seen.get(index), [m for i, m in seen.items() if i != index], need, common)
        for index, count in enumerate(counts)
        if count < need
    }
    for index, moment in made.items():
        stats.moments[places[index]] = moment
    return need, {index: counts[index] for index in made}


def _follow(layer: _Layer, matrix: str, names: Sequence[str], stats: Stats) -> None:
    """Let an expert that did not run share its statistics among its matrices as the others do."""
    for index, name in enumerate(names):
        known = stats.leaders.get(name)
        if known is not None and known.startswith(f"{layer.name}.{index}."):
            leader = known.removeprefix(f"{layer.name}.{index}.")
            for other, missing in enumerate(names):
                stats.leaders.setdefault(missing, layer.member(other, leader))
            return


def _shrunk(own: Moment | None, others: Sequence[Moment], need: int, common: bool) -> Moment:
    count = 0 if own is None else own.count
    pooled = torch.stack([moment.total for moment in others]).sum(0) / sum(moment.count for moment in others)
    target = pooled if common else _level(pooled if own is None else own.mean())
    lack = need - count
    total = target * lack if own is None else own.total + target * lack
    return Moment(total / need * max(count, 1), max(count, 1), filled=True)


def _level(moment: Tensor) -> Tensor:
    """Return the multiple of the identity (of a vector: the constant one) with the same trace."""
    if moment.ndim == 1:
        return moment.mean().expand(len(moment))
    return moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


def _warning(layer: _Layer, least: dict[int, int], need: int) -> str:
    shown = sorted(least.items(), key=lambda pair: pair[1])
    listed = ", ".join(f"{index}: {count}" for index, count in shown[:_LISTED])
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return (
        f"{layer.name}: {len(least)} of {layer.count} experts saw fewer tokens than the {need:,} that their "
        f"moments need for full rank ({listed}{more}): these are filled up from the layer's other experts"
    )
