"""Reports of heal: each refinement, and the divergence from the dense model on the way."""

from collections.abc import Mapping, Sequence
from typing import Any

from . import facts
from .parts import Axis, Chart, Code, Notes, Part, Point, Record, Section, Series, Table, Values

_COLUMNS = ("refinement", "KL before", "KL after", "tokens", "seconds", "")


def known(values: Values) -> bool:
    """Tell whether `values` are such a report."""
    return {"teacher", "steps", "settings"} <= set(values)


def steps(found: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Return the table of refinements and the chart of those that have a course; nothing without any."""
    if not found:
        return []
    caption = "Healing: divergence from the dense model on held-out text, nats per token"
    rows = [
        (
            one["step"], one["before"], one["after"], one["tokens"], round(one["seconds"]),
            one["detail"] if one["gain"] else f"no gain beyond the noise, taken back ({one['detail']})",
        )
        for one in found
    ]  # fmt: skip
    series = [
        Series(
            one["step"],
            [Point(x, y, f"{one['step']}, step {x:,}: {y:.4f}") for x, y in one["curve"]],
            line=True,
        )
        for one in found
        if len(one.get("curve") or ()) > 1
    ]
    chart = Chart(
        "healing",
        "Divergence while healing",
        Axis("step"),
        Axis("KL from the dense model, nats per token"),
        series,
    )
    return [Table(caption, _COLUMNS, rows), *([chart] if series else [])]


def sections(values: Values) -> list[Section]:
    """Return what healing did, and how."""
    title = f"{facts.short(values['source'])} healed towards {facts.short(values['teacher'])}"
    parts: list[Part] = list(steps(values["steps"]))
    rows = [
        (label, *(found[stage]["perplexity"] for stage in ("dense", "one_shot", "compressed")),
         f"{found['compressed']['perplexity'] / found['dense']['perplexity']:.3f}")
        for key, label in (("quality", "own text"), ("foreign", "foreign text"))
        if (found := values.get(key))
    ]  # fmt: skip
    if rows:
        columns = ("perplexity", "dense", "before healing", "healed", "healed / dense")
        parts.insert(0, Table("Before and after", columns, rows))
    else:
        parts.append(Notes(["Perplexity was not measured."]))
    spent = facts.spent_rows(values)
    if spent:
        parts.append(Table("Time and memory", ("", ""), spent, folded=True))
    parts.append(Code("Settings (section heal of a recipe)", facts.settings(values["settings"])))
    return [Section(title, parts)]


def records(values: Values) -> list[Record]:
    """Return a record for each refinement."""
    names = ("step", "before", "after", "gain", "tokens", "seconds", "detail")
    return [{name: one[name] for name in names} for one in values["steps"]]
