"""Accuracies, and how far two of them on the same samples are apart. Pure numbers: no model, no harness."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a model got on each sample of one task.

    Args:
        task: its name; `version` is that of its definition, `shots` the examples before each question.
        documents: a digest of each sample, in order.
        values: by metric, a figure for each sample: 0 or 1 for accuracies.
        chance: the accuracy of guessing, the mean of 1 / choices; None where there are no choices.
        cut: samples that were longer than the model's window, whose beginning it did not see.
    """

    task: str
    version: str
    shots: int
    documents: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]
    chance: float | None = None
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over samples: s / sqrt(n) is its standard error, s with n - 1; None of a single sample."""

    value: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Paired:
    """A model minus a reference on the same n samples.

    `difference` is the mean d of d_i = a_i - b_i and `standard_error` = sqrt(sum (d_i - d)^2 / (n - 1) / n):
    the spread of the differences, which is smaller than that of two independent accuracies where both models
    get the same samples right. `gained` are the samples that the model alone got right, `lost` those that the
    reference alone did, `p` the exact two-sided McNemar test of these two numbers being equal in expectation;
    all three are None for metrics that are not 0 or 1.
    """

    difference: float
    standard_error: float | None
    gained: int | None
    lost: int | None
    p: float | None


def score(values: Sequence[float]) -> Score:
    """Return the mean of `values` (n,) with its standard error.

    Raises:
        ConfigError: there are none.
    """
    if not values:
        raise ConfigError("no samples: raise limit, or name a task that has some")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Score(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Score(mean, math.sqrt(variance / len(values)))


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p of McNemar's test (McNemar 1947; exact: binomial, one half).

    2 P(X <= min(gained, lost)) for X of gained + lost fair coins, at most 1; computed in whole numbers.
    """
    total, term, tail = gained + lost, 1, 0
    for heads in range(min(gained, lost) + 1):
        tail += term
        term = term * (total - heads) // (heads + 1)
    return min(1.0, float(2 * tail / 2**total))


def paired(own: Sequence[float], other: Sequence[float]) -> Paired:
    """Compare what two models got on the same samples, `own` (n,) minus `other` (n,).

    Raises:
        ConfigError: there are no samples, or not as many of both.
    """
    if len(own) != len(other):
        raise ConfigError(
            f"{len(own)} samples of one model and {len(other)} of the other: they must be the same"
        )
    found = score([a - b for a, b in zip(own, other)])
    if not set(own) | set(other) <= {0.0, 1.0}:
        return Paired(found.value, found.standard_error, None, None, None)
    gained = sum(a > b for a, b in zip(own, other))
    lost = sum(a < b for a, b in zip(own, other))
    return Paired(found.value, found.standard_error, gained, lost, mcnemar(gained, lost))


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A task: what a model got, and what a reference got on the same samples (None without one).

    Raises:
        ConfigError: the two are not of the same samples.
    """

    model: Outcomes
    reference: Outcomes | None = None

    def __post_init__(self) -> None:
        other = self.reference
        if other is not None and (other.task, other.documents) != (self.model.task, self.model.documents):
            raise ConfigError(
                f"{self.model.task} and {other.task} were run on different samples: run both with the same "
                "limit, on the same data"
            )

    @property
    def scores(self) -> dict[str, Score]:
        """Return the score of the model by metric."""
        return {name: score(values) for name, values in self.model.values.items()}

    @property
    def reference_scores(self) -> dict[str, Score]:
        """Return the score of the reference by metric; empty without one."""
        values = {} if self.reference is None else self.reference.values
        return {name: score(own) for name, own in values.items()}

    @property
    def differences(self) -> dict[str, Paired]:
        """Return the paired difference by metric; empty without a reference."""
        other = {} if self.reference is None else self.reference.values
        return {name: paired(own, other[name]) for name, own in self.model.values.items() if name in other}

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values, each sample among them."""
        return {
            "task": self.model.task,
            "version": self.model.version,
            "shots": self.model.shots,
            "samples": len(self.model.documents),
            "chance": self.model.chance,
            "cut": self.model.cut,
            "scores": {name: asdict(one) for name, one in self.scores.items()},
            "reference": {name: asdict(one) for name, one in self.reference_scores.items()},
            "differences": {name: asdict(one) for name, one in self.differences.items()},
            "documents": list(self.model.documents),
            "outcomes": {name: list(values) for name, values in self.model.values.items()},
            "reference_outcomes": None
            if self.reference is None
            else {name: list(values) for name, values in self.reference.values.items()},
        }


def of_tasks(parts: Sequence[Score | Paired]) -> Score:
    """Return the mean over tasks, each counting alike: its standard error is sqrt(sum s_t^2) / k.

    The tasks are taken as fixed, their samples as drawn.
    """
    values = [part.value if isinstance(part, Score) else part.difference for part in parts]
    errors = [part.standard_error for part in parts]
    known = [error for error in errors if error is not None]
    mean = math.fsum(values) / len(values)
    if len(known) < len(errors):
        return Score(mean, None)
    return Score(mean, math.sqrt(math.fsum(error**2 for error in known)) / len(errors))
