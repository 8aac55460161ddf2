"""What was found when the spectra of a model were looked at: per matrix, per head, per kind of matrix."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from .pages.notebook import Shown
from .spectra import ENERGIES, SHARES, TOP, Measures, Noise, measure, noise

if TYPE_CHECKING:
    from rich.console import RenderableType

MetricName = Literal["plain", "activation", "two-sided"]
METRICS: dict[MetricName, str] = {
    "plain": "singular values of W",
    "activation": "of W H^1/2, H = E[x x^T] of the inputs",
    "two-sided": "of C^1/2 W H^1/2, C = E[g g^T] of the gradients at the outputs",
}
ENOUGH = 0.95
"""The share of the energy that is asked for."""
_RANK = ENERGIES.index(ENOUGH)
_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of a matrix of `shape` (m, n), or of what a head has of it, by metric."""

    shape: tuple[int, int]
    values: Mapping[MetricName, Tensor]
    measures: Mapping[MetricName, Measures]
    noise: Noise

    @classmethod
    def of(cls, shape: tuple[int, int], values: Mapping[MetricName, Tensor]) -> "Spectrum":
        """Return the spectrum with what it says. The noise is that of the plain one: in a metric it has
        no edge, since it is not white there."""
        measures = {metric: measure(found, shape) for metric, found in values.items()}
        return cls(shape, values, measures, noise(values["plain"], shape))

    @property
    def break_even(self) -> float:
        """The rank mn / (m + n) at which two factors are as large as the matrix."""
        rows, columns = self.shape
        return rows * columns / (rows + columns)

    def share(self, metric: MetricName) -> float:
        """Return the rank that holds 95 % of the energy over the break-even rank: below 1, factors pay."""
        return self.measures[metric].ranks[_RANK] / self.break_even

    def to_dict(self) -> dict[str, Any]:
        """Return what it says as plain JSON values; an infinite condition is None."""
        return {
            "shape": list(self.shape),
            "break_even": self.break_even,
            "noise": asdict(self.noise),
            "metrics": {metric: _measured(found) for metric, found in self.measures.items()},
        }

    def listed(self) -> dict[str, list[float]]:
        """Return all singular values, to nine digits."""
        return {
            metric: [float(f"{value:.{_DIGITS}g}") for value in found.tolist()]
            for metric, found in self.values.items()
        }


def _measured(found: Measures) -> dict[str, Any]:
    made = asdict(found)
    made["ranks"] = {f"{100 * share:g}%": rank for share, rank in zip(ENERGIES, found.ranks, strict=True)}
    made["held"] = {f"top {100 * share:g}%": held for share, held in zip(SHARES, found.held, strict=True)}
    made[f"held_top_{TOP}"] = made.pop("held_top")
    made["condition"] = found.condition if math.isfinite(found.condition) else None
    return made


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix: its name, its kind (`kinds`), its spectrum, and those of its heads, in order.

    side: whether heads are `rows` (queries, keys, values) or `columns` (what reads them); None without any.
    """

    name: str
    kind: str
    whole: Spectrum
    heads: tuple[Spectrum, ...] = ()
    side: Literal["rows", "columns"] | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """How the energy is spread over the singular values of all matrices of a kind, in one metric.

    shares: the mean, the least and the most of what the top SHARES of the values hold, for each of them.
    top: the mean of what the TOP largest hold, of the matrices that have so many; None where none has.
    enough: in how many matrices each of SHARES holds ENOUGH.
    enough_top: in how many of `with_top` matrices the TOP largest do.
    rank: the median of the rank at ENOUGH over the break-even rank.
    """

    count: int
    shares: tuple[tuple[float, float, float], ...]
    top: float | None
    enough: tuple[int, ...]
    enough_top: int
    with_top: int
    rank: float


def held(matrices: Sequence[Matrix], metric: MetricName) -> Held:
    """Return how the energy of `matrices`, at least one, is spread in `metric`."""
    found = [one.whole.measures[metric] for one in matrices]
    columns = [[one.held[place] for one in found] for place in range(len(SHARES))]
    top = [one.held_top for one in found if one.held_top is not None]
    return Held(
        count=len(found),
        shares=tuple((statistics.fmean(own), min(own), max(own)) for own in columns),
        top=statistics.fmean(top) if top else None,
        enough=tuple(sum(share >= ENOUGH for share in own) for own in columns),
        enough_top=sum(share >= ENOUGH for share in top),
        with_top=len(top),
        rank=statistics.median(one.whole.share(metric) for one in matrices),
    )


@dataclass(frozen=True, slots=True)
class Survey(Shown):
    """The spectra of a model's matrices.

    metrics: which there are, the strongest last.
    tokens, gradient_tokens: what the second moments were taken on.
    damp: added to the metrics, in units of their mean.
    how: `files` where one matrix at a time was read, `memory` where the model was loaded.
    """

    source: str
    metrics: tuple[MetricName, ...]
    matrices: tuple[Matrix, ...]
    tokens: int
    gradient_tokens: int
    damp: float
    how: Literal["files", "memory"]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]

    @property
    def strongest(self) -> MetricName:
        """The metric that knows most."""
        return self.metrics[-1]

    def best(self) -> list[Matrix]:
        """Return the matrices by what compresses best.

        That is the rank that holds 95 % of the energy in the strongest metric, over the break-even rank.
        """
        return sorted(self.matrices, key=lambda one: one.whole.share(self.strongest))

    def kinds(self) -> dict[str, list[Matrix]]:
        """Return the matrices by kind, in the order of the model."""
        found: dict[str, list[Matrix]] = {}
        for one in self.matrices:
            found.setdefault(one.kind, []).append(one)
        return found

    def answers(self) -> list[str]:
        """Return, in words, whether few singular values hold 95 % of the energy."""
        from .report_survey import answers

        return answers(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the singular values as plain JSON values."""
        return {
            "schema": 1,
            "source": self.source,
            "metrics": {metric: METRICS[metric] for metric in self.metrics},
            "tokens": self.tokens,
            "gradient_tokens": self.gradient_tokens,
            "damp": self.damp,
            "how": self.how,
            "matrices": [
                {
                    "name": one.name, "kind": one.kind, **one.whole.to_dict(), "side_of_heads": one.side,
                    "heads": [head.to_dict() for head in one.heads],
                }
                for one in self.best()
            ],
            "kinds": {
                kind: {metric: asdict(held(own, metric)) for metric in self.metrics}
                for kind, own in self.kinds().items()
            },
            "answers": self.answers(),
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
        }  # fmt: skip

    def values_dict(self) -> dict[str, Any]:
        """Return all singular values, descending, as plain JSON values."""
        return {
            "schema": 1,
            "source": self.source,
            "matrices": [
                {
                    "name": one.name, "kind": one.kind, "shape": list(one.whole.shape),
                    "values": one.whole.listed(), "side_of_heads": one.side,
                    "heads": [{"shape": list(head.shape), "values": head.listed()} for head in one.heads],
                }
                for one in self.matrices
            ],
        }  # fmt: skip

    def document(self) -> dict[str, Any]:
        """Return everything, the singular values too, as plain JSON values."""
        return {**self.to_dict(), "spectra": self.values_dict()}

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from .render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from .report_survey import tables

        return tables(self)


def kinds(names: Iterable[str]) -> dict[str, str]:
    """Return what kind of matrix each of the dotted `names` is: where it stands, whatever the block.

    That is the name without its numbers, from the shortest end on that tells it from the others: `q_proj`,
    or `attention.output.dense` where there is an `output.dense` as well.
    """
    places = {name: ".".join(part for part in name.split(".") if not part.isdigit()) for name in names}
    distinct = set(places.values())
    return {name: _shortest(place, distinct) for name, place in places.items()}


def _shortest(place: str, places: set[str]) -> str:
    parts = place.split(".")
    for start in range(len(parts) - 1, 0, -1):
        end = ".".join(parts[start:])
        if all(other == place or not f".{other}".endswith(f".{end}") for other in places):
            return end
    return place
