"""Reports of spectrum: what singular values say, and the values themselves."""

from . import facts
from .parts import Curve, Notes, Part, Record, Section, Spectra, Table, Values

METRICS = {
    "plain": "of the weights alone",
    "activation": "weighed by the inputs: W H^1/2",
    "two-sided": "weighed by inputs and output gradients: C^1/2 W H^1/2",
}


def known(values: Values) -> bool:
    """Tell whether `values` are what `eckart spectrum --json` prints."""
    return {"matrices", "kinds", "answers"} <= set(values) and isinstance(values["kinds"], dict)


def spectra(values: Values) -> bool:
    """Tell whether `values` are what `eckart spectrum --out` writes."""
    found = values.get("matrices")
    return bool(found) and isinstance(found, list) and "values" in found[0]


def sections(values: Values) -> list[Section]:
    """Return what the spectra say, and with the values, where Survey gave them along, the spectra."""
    source = facts.short(values["source"])
    metrics = list(values["metrics"])
    parts: list[Part] = [Notes(values["answers"])]
    columns = ("kind", "metric", "matrices", "top 5 % hold", "top 10 % hold", "rank at 95 % / break-even")
    rows = [
        (kind, metric, found[metric]["count"], *(f"{share[0]:.1%}" for share in found[metric]["shares"]),
         float(found[metric]["rank"]))
        for kind, found in values["kinds"].items()
        for metric in metrics
    ]  # fmt: skip
    parts.append(Table("Energy by kind of matrix (means)", columns, rows))
    parts.append(Table("Every matrix", _MATRIX, [tuple(one.values()) for one in _short(values)], folded=True))
    notes = list(values.get("warnings") or ())
    if values.get("tokens"):
        notes.append(
            f"Second moments from {values['tokens']:,} tokens, {values['gradient_tokens']:,} with gradients."
        )
    if notes:
        parts.append(Notes(notes))
    found = [Section(f"How low-rank is {source}?", parts)]
    if values.get("spectra"):
        found += values_sections(values["spectra"])
    again = facts.reproduce(values, "eckart spectrum MODEL --text FILE --out spectra.json", None)
    return [*found, Section("To repeat it", again)]


_MATRIX = (
    "matrix",
    "kind",
    "metric",
    "m",
    "n",
    "break-even",
    "90 %",
    "95 %",
    "99 %",
    "99.9 %",
    "stable",
    "effective",
)


def _short(values: Values) -> list[Record]:
    names = ("name", "kind", "metric", "rows", "columns", "break_even", "90%", "95%", "99%", "99.9%",
             "stable_rank", "effective_rank")  # fmt: skip
    return [{name: one[name] for name in names} for one in records(values)]


def values_sections(values: Values) -> list[Section]:
    """Return the spectra with their slider."""
    return [Section(f"Spectra of {facts.short(values['source'])}", [_spectra(values)])]


def _spectra(values: Values) -> Spectra:
    curves = [
        Curve(one["name"], one["kind"], (one["shape"][0], one["shape"][1]), one["values"])
        for one in values["matrices"]
    ]
    metrics = {metric: METRICS.get(metric, metric) for metric in curves[0].values}
    return Spectra("spectra", metrics, curves)


def records(values: Values) -> list[Record]:
    """Return a record for each matrix and metric."""
    found = []
    for one in values["matrices"]:
        for metric, measured in one["metrics"].items():
            found.append({
                "name": one["name"], "kind": one["kind"], "metric": metric, "rows": one["shape"][0],
                "columns": one["shape"][1], "break_even": one["break_even"], **measured["ranks"],
                "stable_rank": measured["stable_rank"], "effective_rank": measured["effective_rank"],
                "condition": measured["condition"], "above_noise": one["noise"]["above"],
            })  # fmt: skip
    return found


def values_records(values: Values) -> list[Record]:
    """Return a record for each singular value."""
    return [
        {"name": one["name"], "kind": one["kind"], "metric": metric, "index": at + 1, "value": value}
        for one in values["matrices"]
        for metric, found in one["values"].items()
        for at, value in enumerate(found)
    ]
