"""Reports of compare: two models side by side."""

from ..survey import kinds
from . import facts
from .modules import kept_grid, layer, sum_grid
from .parts import Grid, Notes, Part, Record, Samples, Section, Table, Values

MATRICES = ("matrix", "m x n in A", "m x n in B", "parameters of A", "of B", "B / A", "relative change")


def known(values: Values) -> bool:
    """Tell whether `values` are such a report."""
    return {"a", "b", "matrices", "samples"} <= set(values)


def sections(values: Values) -> list[Section]:
    """Return sizes, quality, differences matrix by matrix, what both write, how to repeat it."""
    first, second = values["a"], values["b"]
    names = [facts.short(first["source"]), facts.short(second["source"])]
    parts: list[Part] = [
        Table("Side by side", ("", f"A: {names[0]}", f"B: {names[1]}", "B / A"), _rows(values))
    ]
    if values.get("notes"):
        parts.append(Notes(values["notes"]))
    parts += _grids(values)
    rows = [
        (one["name"], _by(one["shape_a"]), _by(one["shape_b"]), one["parameters_a"], one["parameters_b"],
         _quotient(one["parameters_b"], one["parameters_a"]), one["change"])
        for one in values["matrices"]
    ]  # fmt: skip
    if rows:
        parts.append(Table(f"All {len(rows)} matrices", MATRICES, rows, folded=True))
    found = [Section(f"{names[0]} and {names[1]}", parts)]
    if values["samples"]:
        own = values["samples"]
        texts = [(one["a"], one["b"]) for one in own]
        shown = Samples([f"A: {names[0]}", f"B: {names[1]}"], [one["prompt"] for one in own], texts)
        found.append(Section("What they write (greedy)", [shown]))
    command = "eckart compare A B --text FILE --out FILE.html"
    return [*found, Section("To repeat it", facts.reproduce(values, command, values.get("options")))]


def _rows(values: Values) -> list[tuple[object, ...]]:
    first, second = values["a"], values["b"]
    rows: list[tuple[object, ...]] = [
        ("architecture", first["architecture"], second["architecture"], None),
        *(
            (label, first[key], second[key], _quotient(second[key], first[key]))
            for label, key in (("parameters", "parameters"), ("FLOPs per token, linear maps", "flops"))
        ),
        ("weight files", facts.megabytes(first["file_bytes"]), facts.megabytes(second["file_bytes"]),
         _quotient(second["file_bytes"], first["file_bytes"])),
    ]  # fmt: skip
    quality = values.get("quality")
    if quality:
        own, other = quality["reference"], quality["model"]
        label = f"perplexity on {own['predicted']:,} tokens, windows of {own['seq_len']}"
        rows.append(
            (label, own["perplexity"], other["perplexity"], _quotient(other["perplexity"], own["perplexity"]))
        )
        error = quality["standard_error"]
        paired = "" if error is None else f" ± {error:.4f}"
        rows += [
            (
                "loss of B minus that of A, nats per token (paired)",
                None,
                f"{quality['difference']:+.4f}{paired}",
                None,
            ),
            ("KL(A || B), nats per token", None, f"{quality['kl']:.4f}", None),
            ("same first choice", None, f"{quality['agreement']:.1%}", None),
        ]
    return rows


def _grids(values: Values) -> list[Part]:
    sizes = {
        one["name"]: (one["parameters_b"], one["parameters_a"])
        for one in values["matrices"]
        if one["parameters_a"] and one["parameters_b"] is not None
    }
    changes = {one["name"]: one["change"] for one in values["matrices"] if one["change"] is not None}
    parts: list[Part] = [kept_grid(sizes, title="Parameters of B over those of A")] if sizes else []
    if any(changes.values()):
        parts.append(_mean(changes))
    return parts


def _mean(changes: dict[str, float]) -> Grid:
    """Return the relative changes; where several matrices stand in one place, their largest."""
    largest: dict[tuple[str, str], str] = {}
    kind = kinds(changes)
    for name, value in changes.items():
        place = (kind[name], layer(name))
        if place not in largest or value > changes[largest[place]]:
            largest[place] = name
    kept = {name: changes[name] for name in largest.values()}
    title = "Relative change of the weights, ‖A - B‖ / ‖A‖"
    return sum_grid(kept, "change", title, "relative change", shares=False)


def _by(shape: list[int] | None) -> str | None:
    return None if shape is None else " x ".join(map(str, shape))


def _quotient(other: float | None, own: float | None) -> str | None:
    return f"{other / own:.3f}" if own and other is not None else None


def records(values: Values) -> list[Record]:
    """Return a record for each matrix."""
    return [{**one, "layer": layer(one["name"])} for one in values["matrices"]]
