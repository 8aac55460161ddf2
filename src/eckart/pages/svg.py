"""Charts and heat maps as SVG, in colours of the page's style sheet: they follow light, dark and print."""

import math
from collections.abc import Sequence

from .html import Html, element, join
from .parts import Chart, Grid, Point, Series
from .scales import Scale, label

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 84, 18, 14, 52
_COLOURS = 6
_CELL, _ROW = 20, 24
_LETTER = 7.2
"""Width of a letter of the labels of rows."""
_WIDEST = 34
_EVERY = 26
"""Pixels that the number of a column takes."""


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _text(x: float, y: float, text: str, anchor: str = "middle", **more: object) -> Html:
    given = {"x": _number(x), "y": _number(y), "text-anchor": anchor, **more}
    return element("text", given, text)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return element("line", {key: _number(value) for key, value in places.items()} | {"class": kind})


def frame(x: Scale, y: Scale, x_label: str, y_label: str) -> Html:
    """Return the axes of a chart with their labels."""
    parts = []
    for value in x.ticks():
        place = x(value)
        parts += [
            _line(place, TOP, place, HEIGHT - BOTTOM, "grid"),
            _text(place, HEIGHT - BOTTOM + 18, label(value)),
        ]
    for value in y.ticks():
        place = y(value)
        parts += [
            _line(LEFT, place, WIDTH - RIGHT, place, "grid"),
            _text(LEFT - 8, place + 4, label(value), "end"),
        ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts += [
        _line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label, **{"class": "title"}),
        _text(16, middle, y_label, transform=f"rotate(-90 16 {_number(middle)})", **{"class": "title"}),
    ]
    return join(parts)


def marker(shape: int, x: float, y: float) -> str:
    """Return the path of a mark around (x, y): shapes differ, so that colours need not tell series apart."""
    if shape % 4 == 0:
        return f"M{_number(x - 5)},{_number(y)}a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z"
    corners = ((4, 45), (3, 90), (4, 0))[shape % 4 - 1]
    count, turn = corners
    places = [
        (
            x + 6.2 * math.cos(math.radians(turn + 360 * k / count)),
            y - 6.2 * math.sin(math.radians(turn + 360 * k / count)),
        )
        for k in range(count)
    ]
    return "M" + "L".join(f"{_number(a)},{_number(b)}" for a, b in places) + "Z"


def chart(made: Chart) -> Html:
    """Return a chart whose points are reached with the pointer and with the tab key."""
    points = [point for series in made.series for point in series.points]
    x = Scale.over((point.x for point in points), LEFT, WIDTH - RIGHT, made.x.log)
    y = Scale.over((point.y for point in points), HEIGHT - BOTTOM, TOP, made.y.log)
    drawn = [_series(series, colour, x, y) for colour, series in coloured(made.series)]
    said = f"{made.title}: {made.y.label} against {made.x.label}, {len(points)} points"
    shape = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "group", "aria-label": said, "class": "chart"}
    return element("svg", shape, frame(x, y, made.x.label, made.y.label), *drawn)


def coloured(series: Sequence[Series]) -> list[tuple[int | None, Series]]:
    """Return each of `series` with the number of its colour; lines without marks have none of their own."""
    marked = [one for one in series if one.marks]
    numbers = {id(one): at for at, one in enumerate(marked)}
    return [(numbers.get(id(one)), one) for one in series]


def _series(series: Series, colour: int | None, x: Scale, y: Scale) -> Html:
    kind = "plain" if colour is None else f"s{colour % _COLOURS}"
    places = [(x(point.x), y(point.y), point) for point in series.points]
    parts = []
    if series.line and places:
        path = "M" + "L".join(f"{_number(a)},{_number(b)}" for a, b, _ in places)
        parts.append(element("path", {"d": path, "class": f"line {kind}"}))
    if series.marks and colour is not None:
        parts += [_mark(colour, kind, a, b, point) for a, b, point in places]
    return join(parts)


def _mark(colour: int, kind: str, x: float, y: float, point: Point) -> Html:
    given = {
        "d": marker(colour, x, y),
        "class": f"mark {kind}",
        "tabindex": 0,
        "role": "img",
        "aria-label": point.said,
    }
    return element("path", given, element("title", None, point.said))


def legend(series: Sequence[Series]) -> Html:
    """Return what the marks and lines of a chart stand for."""
    items = []
    for colour, one in coloured(series):
        kind = "plain" if colour is None else f"s{colour % _COLOURS}"
        shape = (
            element("path", {"d": "M1,8L23,8", "class": f"line {kind}"})
            if colour is None
            else element("path", {"d": marker(colour, 12, 8), "class": f"mark {kind}"})
        )
        icon = element("svg", {"viewBox": "0 0 24 16", "aria-hidden": "true"}, shape)
        items.append(element("li", None, icon, one.name))
    return element("ul", {"class": "legend"}, *items)


def grid(made: Grid) -> Html:
    """Return a heat map; what its cells say is shown under the pointer, and in the table beside it."""
    names = [name if len(name) <= _WIDEST else f"…{name[1 - _WIDEST :]}" for name in made.rows]
    left = 14 + _LETTER * max(map(len, names))
    width, height = left + _CELL * len(made.columns) + 8, _ROW * len(made.rows) + 40
    every = math.ceil(_EVERY / _CELL) if len(made.columns) <= 12 else 5
    parts = [_text(left - 8, _ROW * at + 17, name, "end") for at, name in enumerate(names)]
    for at, column in enumerate(made.columns):
        if at % every == 0 or not column.isdigit():
            parts.append(_text(left + _CELL * (at + 0.5), _ROW * len(made.rows) + 16, column))
    across = left + _CELL * len(made.columns) / 2
    parts.append(_text(across, height - 6, "layer", **{"class": "title"}))
    for (row, column), cell in made.cells.items():
        share = (cell.value - made.low) / (made.high - made.low)
        place = {
            "x": _number(left + _CELL * made.columns.index(column)), "y": _ROW * made.rows.index(row),
            "width": _CELL - 1, "height": _ROW - 1, "class": "cell", "style": f"--at:{100 * share:.1f}%",
        }  # fmt: skip
        parts.append(element("rect", place, element("title", None, cell.said)))
    said = f"{made.title}: heat map of {len(made.rows)} kinds of matrices by {len(made.columns)} layers"
    size = {"viewBox": f"0 0 {_number(width)} {height}", "style": f"width:{_number(width)}px"}
    return element("svg", {**size, "role": "img", "aria-label": said, "class": "heat"}, *parts)


def bar(made: Grid) -> Html:
    """Return what the colours of a heat map stand for."""
    low, high = label(float(f"{made.low:.3g}")), label(float(f"{made.high:.3g}"))
    ramp = element("span", {"class": "ramp", "aria-hidden": "true"})
    return element("p", {"class": "bar"}, low, " ", ramp, " ", f"{high} {made.unit}")
