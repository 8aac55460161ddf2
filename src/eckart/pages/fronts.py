"""Size against quality: reports of many budgets or methods (curve, sweep), and many reports side by side."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import compressed, facts
from .parts import Axis, Chart, Part, Point, Record, Section, Series, Table, Values

_SIZES = {
    "file_bytes": ("weight files, MB", facts.MB),
    "bytes": ("weight files, MB", facts.MB),
    "keep_model": ("share of the model's parameters kept", 1.0),
    "keep_linears": ("share of the treated parameters kept", 1.0),
    "keep": ("share kept", 1.0),
}
_QUALITIES = {
    "perplexity": "perplexity",
    "loss": "loss, nats per token",
    "measured_increase": "rise of the loss, nats per token",
    "increase": "rise of the loss, nats per token",
    "measured": "rise of the loss, nats per token",
}
_MEASURED = ("measured_increase", "increase", "measured")
_PREDICTED = ("predicted_increase", "predicted")
_NAMES = ("preset", "method", "kind", "form")
_DETAILS = ("preset", "method", "form", "storage", "budget", "keep", "keep_linears", "keep_model", "bytes",
            "file_bytes", "perplexity", "loss", "seconds")  # fmt: skip
Sized = tuple[str, Point]
"""The name of a series, and a point of it."""


def rows_of(values: Values) -> list[dict[str, Any]]:
    """Return the rows of a report of many models: a list, or a mapping from labels; none without any."""
    found = values.get("rows", values.get("points"))
    if isinstance(found, Mapping):
        found = [{"label": label, **row} for label, row in found.items() if isinstance(row, Mapping)]
    if not isinstance(found, list):
        return []
    return [row for row in found if isinstance(row, Mapping) and _first(row, _SIZES)]  # type: ignore[misc]


def known(values: Values) -> bool:
    """Tell whether `values` hold rows with a size and a quality, measured or predicted."""
    return any(_first(row, (*_QUALITIES, *_PREDICTED)) for row in rows_of(values))


def _first(row: Values, keys: Iterable[str]) -> str | None:
    return next((key for key in keys if isinstance(row.get(key), (int, float))), None)


def _common(rows: Sequence[Values], keys: Iterable[str]) -> str | None:
    """Return the first of `keys` that most rows have: figures of different meaning share no axis."""
    counts = {key: sum(isinstance(row.get(key), (int, float)) for row in rows) for key in keys}
    best = max(counts.values(), default=0)
    return next((key for key, count in counts.items() if count == best), None) if best else None


def label_of(row: Values) -> str:
    """Return what a row is called."""
    given = row.get("label") or row.get("name")
    if given:
        return str(given)
    words = [str(row[key]) for key in ("preset", "method", "form", "storage", "budget") if row.get(key)]
    if not row.get("budget") and row.get("keep") is not None:
        words.append(f"keep {row['keep']}")
    return ", ".join(words) or "model"


def _series_of(row: Values) -> str:
    words = [str(row[key]) for key in _NAMES if row.get(key)][:1]
    storage = row.get("storage")
    return " ".join(words + ([str(storage)] if storage and storage != "float" else [])) or "measured"


def sections(values: Values) -> list[Section]:
    """Return size against quality, what was predicted, all rows, how to repeat it."""
    rows = rows_of(values)
    size = _common(rows, _SIZES)
    assert size is not None
    label, unit = _SIZES[size]
    parts: list[Part] = []
    quality = _common(rows, _QUALITIES)
    if quality:
        points = _points(rows, size, unit, quality, _QUALITIES[quality])
        parts.append(chart("front", "Size against quality", label, _QUALITIES[quality], points))
    predicted, measured = _common(rows, _PREDICTED), _common(rows, _MEASURED)
    if predicted and measured:
        made = _prediction(rows, predicted, measured)
        parts += [made] if made.series else []
    columns = [
        key for key in ("label", *_DETAILS, *_PREDICTED, "measured") if any(key in row for row in rows)
    ]
    cells = [
        (label_of(row), *(facts.short(row.get(key)) for key in columns if key != "label")) for row in rows
    ]
    parts.append(
        Table("Every model", ("model", *(key.replace("_", " ") for key in columns if key != "label")), cells)
    )
    source = facts.short(values.get("source") or (values.get("protocol") or {}).get("model") or "models")
    again = facts.reproduce(values, "eckart sweep MODEL --text FILE --out DIR", values.get("protocol"))
    return [Section(f"Size and quality of {source}", parts), Section("To repeat it", again)]


def _points(rows: Sequence[Values], size: str, unit: float, quality: str, what: str) -> list[Sized]:
    return [
        (
            _series_of(row),
            Point(row[size] / unit, row[quality], _said(row, row[size] / unit, row[quality], what)),
        )
        for row in rows
        if _first(row, [size]) and _first(row, [quality])
    ]


def _said(row: Values, size: float, value: float, what: str) -> str:
    return f"{label_of(row)}: size {size:,.4g}, {what} {value:,.4g}"


def _prediction(rows: Sequence[Values], key: str, measured: str) -> Chart:
    """Return the measured rise of the loss against the predicted one, and the line where both are equal."""
    groups: dict[str, list[Point]] = {}
    for row in rows:
        if _first(row, [key]) and _first(row, [measured]) and row[key] > 0 and row[measured] > 0:
            said = f"{label_of(row)}: predicted {row[key]:.4g}, measured {row[measured]:.4g} nats"
            groups.setdefault(_series_of(row), []).append(Point(row[key], row[measured], said))
    ends = (
        [bound(point.x for own in groups.values() for point in own) for bound in (min, max)] if groups else []
    )
    line = (
        [Series("as predicted", [Point(end, end, "") for end in ends], line=True, marks=False)]
        if groups
        else []
    )
    return Chart(
        "prediction", "Rise of the loss, measured against predicted",
        Axis("predicted, nats per token", log=True), Axis("measured, nats per token", log=True),
        [*line, *(Series(name, own) for name, own in groups.items())],
    )  # fmt: skip


def chart(name: str, title: str, size: str, quality: str, points: Sequence[Sized]) -> Chart:
    """Return the chart of `points` by series, with a line through those that nothing beats in both."""
    groups: dict[str, list[Point]] = {}
    for group, point in points:
        groups.setdefault(group, []).append(point)
    best = front([point for _, point in points])
    line = [Series("front", best, line=True, marks=False)] if len(best) > 1 else []
    values = [point.y for _, point in points]
    log = min(values) > 0 and max(values) > 3 * min(values)
    marks = [Series(group, own) for group, own in groups.items()]
    return Chart(name, title, Axis(size), Axis(quality, log), [*line, *marks])


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one equals or beats in both size and quality, by size."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.x, one.y)):
        if not found or point.y < found[-1].y:
            found.append(point)
    return found


def records(values: Values) -> list[Record]:
    """Return a record for each model."""
    return [{"label": label_of(row), **row} for row in rows_of(values)]


def overview(reports: Sequence[tuple[str, Values]]) -> list[Section]:
    """Return the front of several reports of compress that were measured alike; nothing for fewer than two.

    Alike are those with the same dense perplexity on as many tokens.
    """
    groups: dict[tuple[object, ...], list[tuple[str, Values]]] = {}
    for name, values in reports:
        now = values.get("compressed") if compressed.known(values) else None
        dense = values.get("dense")
        if now and dense and "perplexity" in now:
            key = (f"{dense['perplexity']:.4g}", dense["predicted"], dense["seq_len"])
            groups.setdefault(key, []).append((name, values))
    charts: list[Part] = [
        chart("overview", "Size against perplexity", "weight files, MB", "perplexity", _sized(own))
        for own in groups.values()
        if len(own) > 1
    ]
    return [Section("Overview", charts)] if charts else []


def _sized(reports: Sequence[tuple[str, Values]]) -> list[Sized]:
    first = reports[0][1]
    dense, size = first["dense"]["perplexity"], first["before"]["bytes"] / facts.MB
    points: list[Sized] = [("dense", Point(size, dense, f"dense: {size:,.1f} MB, perplexity {dense:.2f}"))]
    for name, values in reports:
        own = (values.get("file_bytes") or values["after"]["bytes"]) / facts.MB
        now = values["compressed"]["perplexity"]
        said = f"{name}, {compressed.name_of(values)}: {own:,.1f} MB, perplexity {now:.2f}"
        points.append((str(values["recipe"].get("method")), Point(own, now, said)))
    return points
