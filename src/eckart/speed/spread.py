"""Median and quartiles of runs, and of their quotients."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Spread:
    """What the runs gave, in order.

    Raises:
        ConfigError: there are none.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError("no runs: there is no median of nothing")

    @property
    def median(self) -> float:
        """The middle of all runs."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """What a quarter of the runs are below, and a quarter above."""
        return _quartiles(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        lower, upper = self.quartiles
        return {"median": self.median, "lower": lower, "upper": upper, "values": list(self.values)}


@dataclass(frozen=True, slots=True)
class Quotient:
    """The quotient of two medians, with the quartiles of the quotients in each round (both, side by side)."""

    value: float
    lower: float
    upper: float

    def to_dict(self) -> dict[str, float]:
        """Return it as plain JSON values."""
        return {"value": self.value, "lower": self.lower, "upper": self.upper}


def quotient(own: Spread, other: Spread) -> Quotient:
    """Return `own` / `other`, paired round by round: what slows both in one round is in neither quartile.

    Raises:
        ConfigError: they have not as many runs.
    """
    if len(own.values) != len(other.values):
        raise ConfigError(f"{len(own.values)} runs against {len(other.values)}: pairs need as many of both")
    each = [mine / yours for mine, yours in zip(own.values, other.values, strict=True)]
    return Quotient(own.median / other.median, *_quartiles(each))


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper
