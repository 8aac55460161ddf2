"""Matrices by where they stand: rows of kinds, columns of layers."""

from collections.abc import Iterable, Mapping

from ..survey import kinds
from .parts import Cell, Grid

NO_LAYER = "-"
"""The column of matrices outside all blocks."""
Shared = tuple[float, float]
"""What a matrix adds to the numerator and to the denominator of its cell."""


def layer(name: str) -> str:
    """Return the first number in a dotted name: that of the block."""
    return next((part for part in name.split(".") if part.isdigit()), NO_LAYER)


def layers(names: Iterable[str]) -> list[str]:
    """Return the layers of `names`, in order of their numbers, what is outside of them last."""
    found = {layer(name) for name in names}
    numbers = sorted((one for one in found if one != NO_LAYER), key=int)
    return [*numbers, *([NO_LAYER] if NO_LAYER in found else [])]


def kept_grid(
    sizes: Mapping[str, Shared], name: str = "kept", title: str = "Kept share of parameters"
) -> Grid:
    """Return the share (after, before) of each matrix; matrices of one place, such as experts, add up."""
    cells = {}
    for place, names in places(sizes).items():
        after, before = (sum(sizes[one][at] for one in names) for at in (0, 1))
        value = after / before if before else 1.0
        said = f"{_what(names)}: {value:.1%} kept, {after:,.0f} of {before:,.0f} parameters"
        cells[place] = Cell(value, said)
    return _grid(
        name, title, "share kept", cells, sizes, 0.0, max(1.0, *(one.value for one in cells.values()))
    )


def sum_grid(values: Mapping[str, float], name: str, title: str, unit: str, shares: bool = True) -> Grid:
    """Return the sum of `values` in each place; `shares` says what part it is of all."""
    whole = sum(values.values())
    cells = {}
    for place, names in places(values).items():
        value = sum(values[one] for one in names)
        share = f", {value / whole:.1%} of all" if whole and shares else ""
        cells[place] = Cell(value, f"{_what(names)}: {value:.3g} {unit}{share}")
    return _grid(
        name, title, unit, cells, values, 0.0, max((one.value for one in cells.values()), default=1.0)
    )


def places(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Return the names by (kind, layer)."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, kind in kinds(names).items():
        found.setdefault((kind, layer(name)), []).append(name)
    return found


def _what(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _grid(
    name: str,
    title: str,
    unit: str,
    cells: Mapping[tuple[str, str], Cell],
    names: Iterable[str],
    low: float,
    high: float,
) -> Grid:
    rows = list(dict.fromkeys(kind for kind, _ in cells))
    return Grid(name, title, unit, rows, layers(names), cells, low, high if high > low else low + 1.0)
