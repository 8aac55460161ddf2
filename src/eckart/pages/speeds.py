"""Reports of bench: tokens per second of models, times of single maps."""

from typing import Any

from . import facts
from .parts import Axis, Chart, Part, Point, Record, Section, Series, Table, Values

_FIGURES = {
    "prefill_tokens_per_second": "prefill, tokens/s",
    "decode_tokens_per_second": "decode, tokens/s",
    "first_token_seconds": "first token, s",
}
_SIDES = ("model", "against")


def known(values: Values) -> bool:
    """Tell whether `values` are the speed of models."""
    return {"settings", "model", "options", "device"} <= set(values) and isinstance(values["settings"], list)


def of_layers(values: Values) -> bool:
    """Tell whether `values` are the times of single maps."""
    return {"layers", "model", "options", "device"} <= set(values)


def sections(values: Values) -> list[Section]:
    """Return what was measured, as medians with quartiles."""
    sides = [side for side in _SIDES if values.get(side)]
    names = [facts.short(values[side]["source"]) for side in sides]
    rows = [
        (
            _setting(row), label,
            *(_spread(row[side][key]) for side in sides),
            *([f"{row['ratio'][key]['value']:.3f}"] if row.get("ratio") else []),
        )
        for row in values["settings"]
        for key, label in _FIGURES.items()
    ]  # fmt: skip
    ratio = ["model / against"] if len(sides) == 2 else []
    parts: list[Part] = [
        Table("Models", ("", *names), _models(values, sides)),
        Table("Medians (quartiles)", ("setting", "figure", *names, *ratio), rows),
        *_charts(values, sides, names),
    ]
    title = f"Speed of {' against '.join(names)}"
    again = facts.reproduce(values, "eckart bench MODEL --against OTHER", _options(values))
    return [Section(title, parts), Section("To repeat it", again)]


def _options(values: Values) -> dict[str, Any]:
    return {**values["options"], **{key: values.get(key) for key in ("device", "dtype", "threads")}}


def _setting(row: Values) -> str:
    return f"batch {row['batch']}, prompt {row['prompt_tokens']}, {row['new_tokens']} new"


def _spread(found: Values) -> str:
    return f"{found['median']:.4g} ({found['lower']:.4g} to {found['upper']:.4g})"


def _models(values: Values, sides: list[str]) -> list[tuple[object, ...]]:
    labels = {
        "kind": "kind",
        "dtype": "computes in",
        "parameters": "parameters",
        "file_bytes": "weight files",
    }
    rows: list[tuple[object, ...]] = []
    for key, label in labels.items():
        found = [values[side].get(key) for side in sides]
        rows.append((label, *(facts.megabytes(one) if key == "file_bytes" else one for one in found)))
    return rows


def _charts(values: Values, sides: list[str], names: list[str]) -> list[Part]:
    """Return prefill and decoding against the length of the prompt."""
    made: list[Part] = []
    for key, label in list(_FIGURES.items())[:2]:
        series = []
        for side, name in zip(sides, names, strict=True):
            found = sorted(
                (row["prompt_tokens"], row[side][key]["median"], _setting(row)) for row in values["settings"]
            )
            series.append(
                Series(name, [Point(x, y, f"{name}, {said}: {y:.4g}") for x, y, said in found], True)
            )
        title = f"{label.partition(',')[0].capitalize()} by length of the prompt"
        made.append(Chart(key.partition("_")[0], title, Axis("tokens of the prompt"), Axis(label), series))
    return made


def layer_sections(values: Values) -> list[Section]:
    """Return the times of every shape and form, as shares of the dense one."""
    columns = ("m x n", "in the model", "tokens", "form", "rank", "of the dense bytes", "of the dense time")
    rows = [
        (
            f"{one['rows']} x {one['columns']}", one["count"], one["tokens"], one["form"], one["rank"],
            f"{one['bytes']:,}", one["ratio"],
        )
        for one in layer_records(values)
    ]  # fmt: skip
    forms = dict.fromkeys(one["form"] for one in layer_records(values))
    series = [
        Series(form, [
            Point(float(one["rows"] * one["columns"]), one["ratio"],
                  f"{form}, {one['rows']} x {one['columns']}, "
                  f"{one['tokens']} tokens: {one['ratio']:.3f} of dense")
            for one in layer_records(values) if one["form"] == form
        ])
        for form in forms
    ]  # fmt: skip
    chart = Chart(
        "layers", "Time of single maps against the dense one", Axis("entries of the matrix, m n", log=True),
        Axis("time / time of the dense map"), series,
    )  # fmt: skip
    title = f"Speed of the maps of {facts.short(values['model'])}"
    again = facts.reproduce(values, "eckart bench MODEL --layers", _options(values))
    return [
        Section(title, [chart, Table("Every shape and form", columns, rows)]),
        Section("To repeat it", again),
    ]


def records(values: Values) -> list[Record]:
    """Return a record for each setting and model."""
    found = []
    for row in values["settings"]:
        for side in _SIDES:
            if row.get(side):
                own = {key: row[side][key]["median"] for key in _FIGURES}
                setting = {key: row[key] for key in ("batch", "prompt_tokens", "new_tokens")}
                found.append({"side": side, "source": values[side]["source"], **setting, **own})
    return found


def layer_records(values: Values) -> list[Record]:
    """Return a record for each shape, number of tokens and form."""
    return [
        {
            "rows": one["shape"][0], "columns": one["shape"][1], "count": one["count"],
            "tokens": one["tokens"],
            "form": form, "rank": found["rank"], "bytes": found["bytes"],
            "seconds": found["seconds"]["median"], "ratio": found["ratio"]["value"],
        }
        for one in values["layers"]
        for form, found in one["forms"].items()
    ]  # fmt: skip
