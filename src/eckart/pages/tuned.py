"""Reports of tune and pretrain: loss over the steps, ranks, spectra under a penalty."""

import math
from collections.abc import Mapping
from typing import Any

from . import facts
from .modules import sum_grid
from .parts import Axis, Chart, Notes, Part, Point, Record, Section, Series, Table, Values

_PARTS = ("weights", "gradients", "optimizer", "activations", "total")


def known(values: Values) -> bool:
    """Tell whether `values` are a report of tune."""
    return {"prospect", "end", "curve"} <= set(values)


def trained(values: Values) -> bool:
    """Tell whether `values` are a report of pretrain."""
    return {"tuned", "settings", "vocabulary"} <= set(values)


def sections(values: Values) -> list[Section]:
    """Return what a tuning run did."""
    prospect = values["prospect"]
    title = f"{facts.short(prospect['source'])} tuned by {prospect['tuning']['method']}"
    again = facts.reproduce(values, "eckart tune MODEL --recipe recipe.yaml --out DIR", prospect["tuning"])
    return [Section(title, [*_before_after(values), *_course(values)]), Section("To repeat it", again)]


def trained_sections(values: Values) -> list[Section]:
    """Return what a training from scratch did."""
    tuned = values["tuned"]
    title = f"{facts.short(tuned['prospect']['source'])} trained from scratch"
    size = (
        f"{values['parameters']:,} parameters, {values['parameters'] / values['dense']:.1%} of full rank; "
        f"{values['vocabulary']:,} tokens in the vocabulary."
    )
    again = facts.reproduce(
        values, "eckart pretrain CONFIG --recipe recipe.yaml --out DIR", values["settings"]
    )
    parts = [*_before_after(tuned), Notes([size]), *_course(tuned)]
    return [Section(title, parts), Section("To repeat it", again)]


def _before_after(values: Values) -> list[Part]:
    prospect, end = values["prospect"], values["end"]
    start = prospect["start"]
    rows: list[tuple[object, ...]] = [
        ("held-out loss, nats per token", start["loss"], end["loss"]),
        ("held-out perplexity", *(math.exp(min(one["loss"], 700.0)) for one in (start, end))),
    ]
    if start.get("accuracy") is not None and end.get("accuracy") is not None:
        rows.append(("accuracy", *(f"{one['accuracy']:.1%}" for one in (start, end))))
    said = (
        f"{prospect['trainable']:,} of {prospect['total']:,} parameters trained; best at step "
        f"{values['best']:,} of {values['done']:,} ({values['ended']}); {values['per_step']:.2f} s a step, "
        f"{values['seconds']:.0f} s in all; peak memory {facts.megabytes(values['peak'])}."
    )
    return [
        Table("Before and after", ("", "before", "after"), rows),
        Notes([*prospect.get("notes", ()), said]),
    ]


def _course(values: Values) -> list[Part]:
    """Return the charts of the run, and the memory that was foreseen."""
    parts: list[Part] = []
    series = [
        Series(name, [Point(x, y, f"{name}, step {x:,}: {y:.4f}") for x, y in found], True, marks)
        for name, found, marks in (
            ("held out", values["curve"], True), ("learned from", values.get("learned") or (), False),
        )
        if found
    ]  # fmt: skip
    if series:
        parts.append(
            Chart("tuning", "Loss over the steps", Axis("step"), Axis("loss, nats per token"), series)
        )
    ranks = values.get("ranks") or {}
    if len(set(ranks.values())) > 1:
        found = {name: float(rank) for name, rank in ranks.items()}
        parts.append(sum_grid(found, "ranks", "Ranks in the end", "rank"))
    parts += _decline(values.get("decline"))
    memory = values["prospect"].get("memory") or {}
    if memory:
        rows = [
            (method, *(facts.megabytes(found.get(part)) for part in _PARTS))
            for method, found in memory.items()
        ]
        columns = ("method", "weights", "gradients", "optimizer", "activations", "in all")
        parts.append(Table("Memory as it was foreseen", columns, rows, folded=True))
    return parts


def _decline(found: Mapping[str, Any] | None) -> list[Part]:
    """Return the chart of what a penalty did to the spectra."""
    points = []
    for entry in (found or {}).get("steps") or ():
        ranks = [one["stable_rank"] for one in entry["matrices"].values()]
        if ranks:
            mean = sum(ranks) / len(ranks)
            points.append(Point(entry["step"], mean, f"step {entry['step']:,}: mean stable rank {mean:.2f}"))
    if not points:
        return []
    series = [Series("mean stable rank", points, True)]
    title = "Decline of the spectra under the penalty"
    return [Chart("decline", title, Axis("step"), Axis("mean stable rank"), series)]


def records(values: Values) -> list[Record]:
    """Return a record for each judgement on held-out examples."""
    right = dict(map(tuple, values.get("accuracy") or ()))
    return [{"step": step, "loss": loss, "accuracy": right.get(step)} for step, loss in values["curve"]]


def trained_records(values: Values) -> list[Record]:
    """Return a record for each judgement on held-out windows."""
    return records(values["tuned"])
