"""Axes: where a value stands, and which values are written beside it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_WANTED = 6


@dataclass(frozen=True, slots=True)
class Scale:
    """Takes values from `low` to `high` to places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, log: bool = False) -> "Scale":
        """Return a scale that has room for `values`, at least one, with a margin.

        Raises:
            ValueError: `log`, and a value is not positive.
        """
        found = list(values)
        low, high = min(found), max(found)
        if log:
            if low <= 0:
                raise ValueError(f"a logarithmic axis cannot show {low}: values must be positive")
            margin = max((high / low) ** 0.06, 1.02)
            return cls(low / margin, high * margin, start, end, True)
        margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        return cls(low - margin if low < 0 or low - margin > 0 else 0.0, high + margin, start, end)

    def __call__(self, value: float) -> float:
        """Return the place of `value`."""
        share = (
            math.log(value / self.low) / math.log(self.high / self.low)
            if self.log
            else (value - self.low) / (self.high - self.low)
        )
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values within the scale, ascending, three at least."""
        return self._of_log() if self.log else steps(self.low, self.high)

    def _of_log(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            found = [digit * 10.0**decade for decade in decades for digit in digits]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) >= 3:
                return inside if len(inside) <= 2 * _WANTED else inside[:: math.ceil(len(inside) / _WANTED)]
        return steps(self.low, self.high)


def steps(low: float, high: float) -> list[float]:
    """Return round values from `low` to `high` in equal steps."""
    size = 10.0 ** math.floor(math.log10((high - low) / _WANTED))
    step = next(size * factor for factor in _STEPS if (high - low) / (size * factor) <= _WANTED)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """Return a value as it is written beside an axis."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.2e}".split("e")
        short = f"{float(mantissa):g}"
        power = f"10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
        return power if short == "1" else f"{short}·{power}"
    return f"{value:,.10g}"
