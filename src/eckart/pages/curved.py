"""Reports of curve: loss against size for one model and method, predicted, corrected and measured."""

from collections.abc import Sequence

from . import facts
from .parts import Axis, Chart, Notes, Part, Point, Record, Section, Series, Table, Values

_SERIES = (("predicted", True), ("corrected", True), ("measured", False))
_COLUMNS = ("keep", "keep of the linears", "parameters", "weight files", "predicted rise", "corrected",
            "measured", "perplexity, predicted", "corrected", "measured")  # fmt: skip


def known(values: Values) -> bool:
    """Tell whether `values` are such a report."""
    rows = values.get("rows")
    keys = {"keep", "bytes", "predicted_increase", "measured_increase"}
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and keys <= set(rows[0])


def sections(values: Values) -> list[Section]:
    """Return loss and perplexity against size, every row, how to repeat it."""
    rows = values["rows"]
    parts: list[Part] = [
        made
        for made in (
            _chart("curve", "Perplexity against size", "perplexity", "perplexity", rows),
            _chart(
                "increase",
                "Rise of the loss against size",
                "increase",
                "rise of the loss, nats per token",
                rows,
            ),
        )
        if made.series
    ]
    cells = [
        (f"{row['keep']:g}", row["keep_linears"], row["parameters"], facts.megabytes(row["bytes"]),
         *(row.get(f"{name}_{what}") for what in ("increase", "perplexity") for name, _ in _SERIES))
        for row in rows
    ]  # fmt: skip
    parts.append(Table("Every size; rises of the loss in nats per token", _COLUMNS, cells))
    notes = list(values.get("warnings") or ())
    dense = values.get("dense")
    if dense:
        notes.append(
            f"The dense model: {facts.megabytes(values['bytes'])}, perplexity {dense['perplexity']:.2f}."
        )
    if notes:
        parts.append(Notes(notes))
    names = (
        "method",
        "form",
        "allocation",
        "storage",
        "of",
        "dtype",
        "calibration_tokens",
        "gradient_tokens",
    )
    settings = {name: values.get(name) for name in names}
    again = facts.reproduce(values, "eckart curve MODEL --text FILE", settings)
    title = f"Quality of {facts.short(values['source'])} at every size: {values.get('method')}"
    return [Section(title, parts), Section("To repeat it", again)]


def _chart(name: str, title: str, what: str, label: str, rows: Sequence[Values]) -> Chart:
    series = []
    for kind, line in _SERIES:
        key = f"{kind}_{what}"
        found = [row for row in rows if row.get(key) is not None and row[key] > 0]
        points = [
            Point(row["bytes"] / facts.MB, row[key],
                  f"keep {row['keep']:g}, {facts.megabytes(row['bytes'])}: {kind} {label} {row[key]:.4g}")
            for row in found
        ]  # fmt: skip
        if points:
            series.append(Series(kind, points, line))
    values = [point.y for one in series for point in one.points]
    log = bool(values) and max(values) > 3 * min(values)
    return Chart(name, title, Axis("weight files, MB"), Axis(label, log), series)


def records(values: Values) -> list[Record]:
    """Return a record for each size."""
    found: list[Record] = [dict(row) for row in values["rows"]]
    return found
