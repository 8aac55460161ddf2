"""Reports of compress, quantise and share: what became of every matrix, what it cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..survey import kinds
from . import facts, healed
from .modules import kept_grid, layer, sum_grid
from .parts import Notes, Part, Record, Section, Table, Values

_SIZES = {
    "linears": "parameters of the treated matrices",
    "model": "parameters of the model",
    "linear_flops": "FLOPs per token, treated matrices",
    "model_flops": "FLOPs per token, all linear maps",
}
MODULES = ("matrix", "m x n", "form", "rank", "storage", "before", "after", "kept", "energy", "loss")


def known(values: Values) -> bool:
    """Tell whether `values` are such a report."""
    return {"modules", "before", "after", "recipe"} <= set(values)


def name_of(values: Values) -> str:
    """Return what was done, in one line."""
    recipe = values["recipe"]
    budget = next(
        (f"{key} {recipe[key]}" for key in ("keep", "size", "rank", "energy") if recipe.get(key) is not None),
        "",
    )
    return f"{facts.short(values['source'])}: {recipe.get('method')}, {budget}"


def sections(values: Values) -> list[Section]:
    """Return what was done and what it cost, where it was saved and lost, the matrices, how to repeat it."""
    parts: list[Part] = [Table("Before and after", ("", "before", "after", "after / before"), rows(values))]
    notes = _notes(values)
    if notes:
        parts.append(Notes(notes))
    found = values["modules"]
    if found:
        parts += grids(values)
    parts += healed.steps(values.get("healing") or ())
    if found:
        parts.append(Table(f"All {len(found)} matrices", MODULES, _modules(found), folded=True))
    spent = facts.spent_rows(values)
    if spent:
        parts.append(Table("Time and memory", ("", ""), spent, folded=True))
    command = "eckart compress MODEL --recipe recipe.yaml --out DIR"
    again = facts.reproduce(values, command, values["recipe"])
    return [Section(name_of(values), parts), Section("To repeat it", again)]


def rows(values: Values) -> list[tuple[object, ...]]:
    """Return the rows of sizes and quality, before, after, and their quotient."""
    before, after = values["before"], values["after"]
    found: list[tuple[object, ...]] = [
        (label, before[key], after[key], _quotient(after[key], before[key])) for key, label in _SIZES.items()
    ]
    written, how = values.get("file_bytes"), "measured"
    if written is None:
        written, how = after["bytes"], "computed"
    found.append((
        f"weight files in {values.get('dtype')}, {how}", facts.megabytes(before["bytes"]),
        facts.megabytes(written), _quotient(written, before["bytes"]),
    ))  # fmt: skip
    found += _quality_rows("", values.get("dense"), values.get("one_shot"), values.get("compressed"))
    other = values.get("foreign")
    if other:
        found += _quality_rows(
            " on foreign text", other["dense"], other["one_shot"] if values.get("healing") else None,
            other["compressed"],
        )  # fmt: skip
    predicted = values.get("predicted_increase")
    if predicted is not None:
        found.append(("rise of the loss that curvature predicted, nats", None, f"{predicted:+.4f}", None))
    return found


def _quality_rows(where: str, dense: Any, shot: Any, now: Any) -> list[tuple[object, ...]]:
    """Return perplexity, or the loss where there is none; in between, before healing."""
    if not dense or not now:
        return []
    key = "perplexity" if "perplexity" in now else "loss"
    label = (
        f"perplexity{where}" if key == "perplexity" else f"loss, nats per {now.get('unit', 'token')}{where}"
    )
    found: list[tuple[object, ...]] = [(label, dense[key], now[key], _quotient(now[key], dense[key]))]
    if shot and shot[key] != now[key]:
        found.append((f"{label}, before healing", dense[key], shot[key], _quotient(shot[key], dense[key])))
    return found


def _quotient(after: float, before: float) -> str | None:
    return f"{after / before:.3f}" if before else None


def _notes(values: Values) -> list[str]:
    found = list(values.get("warnings") or ())
    measured = values.get("compressed")
    if not measured:
        return [*found, "Quality was not measured."]
    where = "the last of the calibration data, which nothing was fitted to"
    if not values.get("held_out"):
        named = ", ".join(map(str, facts.short(values["recipe"].get("eval_text") or ())))
        where = named or "data of its own"
    line = f"Quality was measured on {where}"
    if "predicted" in measured:
        line += f": {measured['predicted']:,} tokens in windows of {measured['seq_len']}"
    error = measured.get("standard_error")
    line += f"; the standard error of the loss is {error:.2g} nats." if error is not None else "."
    tokens = values.get("calibration_tokens")
    if tokens:
        unit = values.get("calibration_unit", "tokens")
        text = ", ".join(map(str, facts.short(values["recipe"].get("text") or ()))) or "the data given"
        line += f" Calibrated on {tokens:,} {unit} of {text}."
    return [*found, line]


def grids(values: Values) -> list[Part]:
    """Return the heat maps of the kept share and of the loss."""
    found = values["modules"]
    kept = {one["name"]: (one["after"], one["before"]) for one in found}
    losses = {one["name"]: max(float(one["loss"]), 0.0) for one in found}
    unit = "nats per token, estimated" if values.get("predicted_increase") is not None else (
        "squared error in the method's metric"
    )  # fmt: skip
    parts: list[Part] = [kept_grid(kept)]
    if any(losses.values()):
        parts.append(sum_grid(losses, "loss", "What each matrix adds to the loss", unit))
    return parts


def _modules(found: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    return [
        (
            one["name"], " x ".join(map(str, one["shape"])), one["form"], one["rank"],
            one.get("storage", "float"), one["before"], one["after"],
            _quotient(one["after"], one["before"]), float(one["energy"]), float(one["loss"]),
        )
        for one in found
    ]  # fmt: skip


def records(values: Values) -> list[Record]:
    """Return a record for each matrix."""
    kind = kinds(one["name"] for one in values["modules"])
    return [
        {
            "name": one["name"], "kind": kind[one["name"]], "layer": layer(one["name"]),
            "rows": one["shape"][0], "columns": one["shape"][1], "form": one["form"], "rank": one["rank"],
            "storage": one.get("storage", "float"), "before": one["before"], "after": one["after"],
            "kept": one["after"] / one["before"] if one["before"] else 1.0, "energy": one["energy"],
            "loss": one["loss"],
        }
        for one in values["modules"]
    ]  # fmt: skip
