"""A table of times of linear maps, by shape, form, rank and tokens at once: read, and interpolated.

Everything here is a pure function of the table.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from ..errors import ConfigError, StoreError
from ..factors import FORMS, Form, break_even

Kind = Literal["dense", "factored", "pivoted", "rows", "columns"]
"""A form, or a dense map of which so many rows, or columns, are left."""
Shape = tuple[int, int]
Points = tuple[tuple[int, float], ...]
"""(rank, seconds), both ascending."""
FORMAT = 1
_UNITS = (64, 32, 16, 8, 4, 2, 1)
_POINTS = 8
_PROBES = (1, 4, 8, 16, 32)
SLOWER = 0.02
"""Below, a difference between two times is not taken for one."""
_WIDE = 0.25


@dataclass(frozen=True, slots=True)
class Where:
    """What times depend on besides the map.

    Args:
        device: its kind, as torch calls it.
        processor: what it is called.
        dtype: of weights and inputs.
        threads: of a CPU, else None.
        torch: its version.
    """

    device: str
    processor: str | None
    dtype: str
    threads: int | None
    torch: str

    def differences(self, other: "Where") -> list[str]:
        """Return what of `other` is not as here, as text."""
        pairs = [
            (field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        ]
        return [f"{name} {there!r}, here {here!r}" for name, here, there in pairs if here != there]


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds of a call of a map: median and quartiles of `runs`; of a dense map, rank is min(m, n)."""

    shape: Shape
    kind: Kind
    rank: int
    tokens: int
    seconds: float
    lower: float
    upper: float
    runs: int

    @property
    def noisy(self) -> bool:
        """Tell whether the quartiles are apart by more than a quarter of the median."""
        return self.upper - self.lower > _WIDE * self.seconds


@dataclass(frozen=True, slots=True)
class Times:
    """Rows that were measured in one place."""

    where: Where
    rows: tuple[Row, ...] = ()

    def lacking(self, wanted: Iterable[tuple[Shape, Kind]], tokens: int) -> list[tuple[Shape, Kind]]:
        """Return those of `wanted` that have no row for so many tokens."""
        known = {(row.shape, row.kind) for row in self.rows if row.tokens == tokens}
        return [one for one in dict.fromkeys(wanted) if one not in known]

    def to_json(self) -> str:
        """Return the table as JSON text."""
        rows = ",\n  ".join(json.dumps(asdict(row)) for row in self.rows)
        return (
            f'{{"format": {FORMAT},\n "where": {json.dumps(asdict(self.where))},\n "rows": [\n  {rows}]}}\n'
        )


def from_json(text: str, name: str) -> Times:
    """Return the table that `to_json` wrote.

    Raises:
        StoreError: it is no such table, or one of another format; `name` is how the message calls it.
    """
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise StoreError(f"{name} is a table of times of format {values['format']}: legal is {FORMAT}")
        rows = tuple(Row(**(row | {"shape": tuple(row["shape"])})) for row in values["rows"])
        if any(row.kind not in get_args(Kind) or not 0 < row.seconds < float("inf") for row in rows):
            raise ValueError("a row has an unknown kind, or no positive time")
        return Times(Where(**values["where"]), rows)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{name} is no table of times ({error}): delete it, or name another file to have one measured"
        ) from error


def check_same(found: Times, here: Where, name: str) -> None:
    """Raise ConfigError, with what differs, unless the table was measured where it is to be used."""
    differ = found.where.differences(here)
    if differ:
        there = "; ".join(here.differences(found.where))
        raise ConfigError(
            f"{name} holds times of another place ({there}): name another file to have them measured here, "
            "or run it as there"
        )


def largest(kind: Kind, shape: Shape) -> int:
    """Return the largest rank of the grid: the last at which a form is smaller than dense."""
    if kind in FORMS:
        return break_even(kind, shape)
    return {"rows": shape[0], "columns": shape[1]}.get(kind, min(shape))


def _unit(most: int) -> int:
    return next((unit for unit in _UNITS if most // unit >= _POINTS), 1)


def grid(kind: Kind, shape: Shape) -> list[int]:
    """Return the ranks to measure a map of `shape` at: about eight, evenly, and what `step` looks at."""
    most = largest(kind, shape)
    if kind == "dense" or most < 1:
        return [most] if most else []
    unit = _unit(most)
    count = most // unit
    even = {unit * max(1, round(count * place / _POINTS)) for place in range(1, _POINTS + 1)} | {unit}
    if kind not in FORMS:
        return sorted(even - {most}) or [most]
    anchor = _anchor(most)
    return sorted(even | {most, anchor} | {anchor - probe for probe in _PROBES if probe < anchor})


def _anchor(most: int) -> int:
    unit = _unit(most)
    return max(unit, most // 2 // unit * unit)


def step(form: Form, shape: Shape, rows: Mapping[int, Row]) -> tuple[int, str]:
    """Return what ranks should be multiples of by `rows`, by rank, and why.

    Near the middle of the grid stands a rank R of many powers of two. R - 1, R - 4, R - 8 and so on are
    smaller, so they should take less: the first of them that is not clearly slower than R gives the step.
    Where all are slower, the step is the power of two in R. Clearly slower: the median by more than
    `SLOWER`, and the quartiles apart.
    """
    most = largest(form, shape)
    anchor = _anchor(most) if most else 0
    probes = [probe for probe in _PROBES if anchor - probe in rows]
    if anchor not in rows or not probes:
        return 1, "there are too few ranks to see steps in"
    at, told = rows[anchor], ""
    for probe in probes:
        smaller = rows[anchor - probe]
        ratio = smaller.seconds / at.seconds
        if ratio <= 1 + SLOWER or smaller.lower <= at.upper:
            seen = f"rank {anchor - probe} takes {ratio:.2f} of the time of rank {anchor}"
            return probe, told or f"{seen}, which is not clearly more"
        told = told or f"rank {anchor - probe} takes {ratio:.2f} of the time of rank {anchor}"
    return anchor & -anchor, told


def monotone(points: Sequence[tuple[int, float]]) -> Points:
    """Return `points` with the nearest times, in least squares, that never fall (pool adjacent violators).

    Barlow et al. 1972, Statistical Inference under Order Restrictions, chapter 1.
    """
    pools: list[tuple[float, list[int]]] = []
    for rank, seconds in sorted(points):
        pools.append((seconds, [rank]))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (last, many), (before, few) = pools.pop(), pools.pop()
            mean = (before * len(few) + last * len(many)) / (len(few) + len(many))
            pools.append((mean, [*few, *many]))
    return tuple((rank, seconds) for seconds, ranks in pools for rank in ranks)


def between(points: Points, rank: int) -> float:
    """Return the seconds at `rank`: linear between two of `points`, and level beyond them."""
    place = bisect_left(points, (rank, 0.0))
    if place == len(points):
        return points[-1][1]
    after = points[place]
    if place == 0 or after[0] == rank:
        return after[1]
    before = points[place - 1]
    share = (rank - before[0]) / (after[0] - before[0])
    return before[1] + share * (after[1] - before[1])
