"""What reports are made of: plain values that a page, a picture and a data frame are drawn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
"""A row of a data frame."""
Values = Mapping[str, Any]
"""A report as it was read from JSON."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells, the first of which names the row; `folded` tables are shown on demand."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Notes:
    """Sentences."""

    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Code:
    """A text to copy: a recipe, a command."""

    caption: str
    text: str


@dataclass(frozen=True, slots=True)
class Axis:
    """What is drawn along an axis, with its unit; `log` needs positive values."""

    label: str
    log: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a chart, and what is said of it."""

    x: float
    y: float
    said: str


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one name; `line` joins them, `marks` shows them one by one."""

    name: str
    points: Sequence[Point]
    line: bool = False
    marks: bool = True


@dataclass(frozen=True, slots=True)
class Chart:
    """Series over two axes. `name` is that of its file."""

    name: str
    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of a grid, and what is said of it."""

    value: float
    said: str


@dataclass(frozen=True, slots=True)
class Grid:
    """Values by row and column, as colours between `low` and `high`; places without one stay empty."""

    name: str
    title: str
    unit: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[str, str], Cell]
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """The singular values (k,) of a matrix of `shape` (m, n), descending, by metric."""

    name: str
    kind: str
    shape: tuple[int, int]
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Spectra:
    """The singular values of matrices, and what the metrics are."""

    name: str
    metrics: Mapping[str, str]
    curves: Sequence[Curve]


@dataclass(frozen=True, slots=True)
class Samples:
    """What models write after the same prompts: a row for each prompt, a column for each model."""

    names: Sequence[str]
    prompts: Sequence[str]
    texts: Sequence[Sequence[str]]


Part = Table | Notes | Code | Chart | Grid | Spectra | Samples


@dataclass(frozen=True, slots=True)
class Section:
    """Parts under a title."""

    title: str
    parts: Sequence[Part]
