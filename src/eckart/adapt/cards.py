"""Show what was done to adapters: tables, model cards, JSON reports. Pure rendering."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..environment import name_of
from ..hub import MB
from ..measure import Comparison
from ..modelcard import ADAPTER, FINETUNE, Facts, perplexity_figure
from ..render import markdown_table, table, to_json
from .difference import Changed, Difference
from .extract import Extracted
from .merge import Merged
from .resize import Resized
from .store import Adapter, Nf4

Rows = list[tuple[str, ...]]
_SHOWN = 12


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _change(change: float) -> str:
    return "from zero" if change == float("inf") else f"{change:.2e}"


def _megabytes(size: int) -> str:
    return f"{size / MB:,.3f} MB"


def _notes(lines: Sequence[str]) -> list[RenderableType]:
    return [Text(f"note: {line}") for line in lines]


def _rest(shown: int, total: int, order: str) -> list[str]:
    return [f"{shown} of {total} are shown, {order} first; --json has all"] if total > shown else []


RESIZED_SIZES = ("", "before", "after", "share")
RESIZED_MODULES = ("module", "shape", "rank before", "after", "energy kept", "error")


def resized_sizes(done: Resized) -> Rows:
    """Return the rows of the table of sizes."""
    sizes = [("parameters", done.parameters_before, done.parameters_after)]
    sizes.append(("sum of ranks", sum(row.before for row in done.rows), sum(row.after for row in done.rows)))
    rows: Rows = [
        (what, f"{old:,}", f"{new:,}", f"{new / old:.3f}" if old else "") for what, old, new in sizes
    ]
    old, new = done.bytes_before, done.bytes_after
    rows.append(("bytes of tensors", _megabytes(old), _megabytes(new), f"{new / old:.3f}"))
    if done.file_bytes is not None:
        rows.append(("weight file, on disk", "", _megabytes(done.file_bytes), ""))
    return rows


def resized_modules(done: Resized) -> Rows:
    """Return a row for each module, those with the largest error first."""
    return [
        (
            row.name,
            _by(row.shape),
            str(row.before),
            str(row.after),
            _percent(row.energy),
            _percent(row.error),
        )
        for row in sorted(done.rows, key=lambda row: -row.error)
    ]


def _resized_line(done: Resized) -> str:
    return f"error of all updates together, relative, in Frobenius norm: {_percent(done.error)}"


def resized_table(done: Resized) -> RenderableType:
    """Return the tables that end a resize."""
    rows = resized_modules(done)
    return Group(
        table(f"adapter resized: {done.rule}", RESIZED_SIZES, resized_sizes(done)),
        table("modules", RESIZED_MODULES, rows[:_SHOWN]),
        Text(_resized_line(done)),
        *_notes(_rest(_SHOWN, len(rows), "largest error")),
    )


DIFFERENCE_COLUMNS = ("tensor", "shape", "change", "norm", "largest", "stable rank", "rank at 50, 90, 99 %")


def difference_rows(found: Difference) -> Rows:
    """Return a row for each tensor that differs, in the order of the model."""
    return [_changed(one) for one in found.tensors if one.norm]


def _changed(one: Changed) -> tuple[str, ...]:
    row = (one.name, _by(one.shape), _change(one.change), f"{one.norm:.3g}")
    if one.ranks is None or one.spectral is None or one.stable_rank is None:
        return (*row, "", "", "")
    ranks = f"{', '.join(map(str, one.ranks))} of {min(one.shape)}"
    return (*row, f"{one.spectral:.3g}", f"{one.stable_rank:.1f}", ranks)


def difference_table(found: Difference) -> RenderableType:
    """Return the tables of a comparison."""
    rows = difference_rows(found)
    title = f"{found.second} minus {found.first}"
    same = f"{len(found.tensors) - len(rows)} of {len(found.tensors)} tensors of the same shape are equal"
    notes = [f"only in {found.first}: {', '.join(found.only_first)}"] if found.only_first else []
    notes += [f"only in {found.second}: {', '.join(found.only_second)}"] if found.only_second else []
    notes += [
        f"{name} is {_by(own)} in the first and {_by(other)} in the second"
        for name, own, other in found.reshaped
    ]
    tables = [table(title, DIFFERENCE_COLUMNS, rows)] if rows else [Text(title)]
    return Group(*tables, Text(same), *_notes(notes))


EXTRACTED_MODULES = ("matrix", "shape", "rank", "change", "error", "error of outputs")
EXTRACTED_OTHERS = ("other tensors that differ", "shape", "change", "")
QUALITY_COLUMNS = ("against the tuned model", "perplexity", "KL", "same first token")


def extracted_modules(done: Extracted) -> Rows:
    """Return a row for each matrix that differs, those with the largest error first."""
    rows = sorted(done.rows, key=lambda row: -(row.error if row.weighted is None else row.weighted))
    return [
        (
            row.name,
            _by(row.shape),
            str(row.rank),
            _change(row.change),
            _percent(row.error),
            "" if row.weighted is None else _percent(row.weighted),
        )
        for row in rows
    ]


def extracted_others(done: Extracted) -> Rows:
    """Return a row for each other tensor that differs."""
    return [
        (other.name, _by(other.shape), _change(other.change), "carried" if other.carried else "left out")
        for other in done.others
    ]


def quality_rows(done: Extracted) -> Rows:
    """Return the rows of base and base with adapter against the tuned model; empty without text."""
    if done.before is None or done.after is None:
        return []
    return [
        *(_compared(what, one) for what, one in (("base", done.before), ("base and adapter", done.after))),
        ("tuned", f"{done.after.reference.perplexity:.3f}", "", ""),
    ]


def _compared(what: str, found: Comparison) -> tuple[str, ...]:
    return what, f"{found.model.perplexity:.3f}", f"{found.kl:.5f}", _percent(found.agreement)


def _extracted_lines(done: Extracted) -> list[str]:
    weighted = "" if done.weighted is None else f", of the outputs {_percent(done.weighted)}"
    size = done.bytes if done.file_bytes is None else done.file_bytes
    how = "in tensors" if done.file_bytes is None else "on disk"
    return [
        f"{len(done.rows)} matrices and {len(done.others)} other tensors differ, {done.unchanged} are equal",
        f"{done.parameters:,} parameters in {done.dtype}, {_megabytes(size)} {how}",
        f"error of all matrices together, relative: {_percent(done.error)}{weighted}",
    ]


def extracted_table(done: Extracted) -> RenderableType:
    """Return the tables that end an extraction."""
    title = f"adapter that makes {done.base} the nearest to {done.tuned}: {done.rule}"
    rows, others, quality = extracted_modules(done), extracted_others(done), quality_rows(done)
    parts: list[RenderableType] = [table(title, EXTRACTED_MODULES, rows[:_SHOWN])]
    if others:
        parts.append(table("", EXTRACTED_OTHERS, others[:_SHOWN]))
    if quality:
        parts.append(table("quality on held-out text", QUALITY_COLUMNS, quality))
    notes = [
        *done.warnings,
        *_rest(_SHOWN, len(rows), "largest error"),
        *_rest(_SHOWN, len(others), "other tensors"),
    ]
    return Group(
        *parts, *map(Text, _extracted_lines(done)), *_notes(notes), Text(f"time: {done.seconds:.1f} s")
    )


MERGED_COLUMNS = ("low-rank module", "merged", "rank", "error", "of the update")
_HOW = {"exact": "exactly", "truncated": "truncated", "basis": "in its shared basis"}


def merged_modules(done: Merged) -> Rows:
    """Return a row for each low-rank module that had to be cut, those that lost most first."""
    return [
        (row.name, _HOW[row.how], str(row.rank), _percent(row.error), _percent(row.lost))
        for row in sorted(done.rows, key=lambda row: -row.lost)
    ]


def _merged_lines(done: Merged) -> list[str]:
    lines = [f"{done.exact} updates merged exactly, to rounding in {done.dtype}"]
    if done.whole:
        lines.append(f"{len(done.whole)} whole tensors replaced")
    if done.rows:
        metric = "in the metric of the inputs" if done.weighted else "in Frobenius norm"
        lines.append(
            f"{len(done.rows)} merged at the rank of their module: {_percent(done.lost)} of the norm of "
            f"their updates was cut away, {metric}"
        )
    found = done.comparison
    if found is not None:
        lines.append(
            f"against the sum of base and adapter: KL {found.kl:.5f} nats per token, same first token "
            f"{_percent(found.agreement)}, perplexity {found.model.perplexity:.3f} and "
            f"{found.reference.perplexity:.3f}"
        )
    return lines


def merged_table(done: Merged) -> RenderableType:
    """Return the tables that end a merge."""
    rows = merged_modules(done)
    parts: list[RenderableType] = [Text(f"adapter merged into {done.source}")]
    if rows:
        parts = [table(f"adapter merged into {done.source}", MERGED_COLUMNS, rows[:_SHOWN])]
    notes = [*done.warnings, *_rest(_SHOWN, len(rows), "largest loss")]
    return Group(*parts, *map(Text, _merged_lines(done)), *_notes(notes), Text(f"time: {done.seconds:.1f} s"))


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _with_storage(values: Mapping[str, Any], storage: Nf4 | None) -> dict[str, Any]:
    return {**values} if storage is None else {**values, "base": storage.to_dict()}


def extracted_documents(done: Extracted) -> dict[str, str]:
    """Return the texts that stand beside an extracted adapter: what was done, and machine-readable report."""
    rows, others, quality = extracted_modules(done), extracted_others(done), quality_rows(done)
    measured = markdown_table(QUALITY_COLUMNS, quality) if quality else "Quality was not measured."
    left = f"\n{markdown_table(EXTRACTED_OTHERS, others[:_SHOWN])}\n" if others else ""
    card = f"""## Extracted

{measured}

{_bullets([*_extracted_lines(done), *done.warnings])}

### Matrices with the largest error

{markdown_table(EXTRACTED_MODULES, rows[:_SHOWN])}
{left}
The full list is in `eckart.json`.
"""
    return {"README.md": card, "eckart.json": to_json({"extracted": done.to_dict()})}


def extracted_facts(done: Extracted, texts: Sequence[tuple[str, str]], licence: str | None) -> Facts:
    """Return what the card of an extracted adapter says beside it; `texts` are (source, what for)."""
    summary = (
        f"LoRA that makes {name_of(done.base)} the nearest to {name_of(done.tuned)}, by eckart: {done.rule}."
    )
    figures = (
        () if done.after is None else perplexity_figure(_measured(texts), done.after.model, "held-out text")
    )
    return Facts(
        summary, (done.base, done.tuned), ADAPTER, ("lora",),
        texts=tuple(texts), licence=licence, figures=figures,
    )  # fmt: skip


def _measured(texts: Sequence[tuple[str, str]]) -> list[str]:
    return [source for source, use in texts if use == "measuring"]


def resized_documents(adapter: Adapter, done: Resized, known: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that stand beside a resized adapter.

    Args:
        adapter: as it is written.
        done: what was done.
        known: the JSON report of the adapter that was resized, empty where there is none.
    """
    card = f"""## Resized

{markdown_table(RESIZED_SIZES, resized_sizes(done))}

{_bullets([_resized_line(done)])}

### Modules with the largest error

{markdown_table(RESIZED_MODULES, resized_modules(done)[:_SHOWN])}

The full list is in `eckart.json`.
"""
    values = {**known, "resized": [*known.get("resized", []), done.to_dict()]}
    return {"README.md": card, "eckart.json": to_json(_with_storage(values, adapter.storage))}


def resized_facts(adapter: Adapter, done: Resized, source: str | None) -> Facts:
    """Return what the card of a resized adapter says beside it; `source` is its folder before, if any."""
    base = (adapter.base,) if adapter.base else ()
    return Facts(
        f"LoRA resized by eckart: {done.rule}.", base if source is None else (source, *base), ADAPTER,
        ("lora",), continued=source is not None,
    )  # fmt: skip


def merged_documents(done: Merged, adapter: str, known: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that stand beside a merged model.

    Args:
        done: what was done.
        adapter: where it came from.
        known: JSON report of the folder it was merged into; empty where there is none.
    """
    rows = merged_modules(done)
    cut = f"\n{markdown_table(MERGED_COLUMNS, rows[:_SHOWN])}\n" if rows else ""
    section = f"""## Merged

The adapter {name_of(adapter)}, by eckart, into {name_of(done.source)}.

{_bullets([*_merged_lines(done), *done.warnings])}
{cut}"""
    merged = [*known.get("merged", []), {"adapter": adapter, **done.to_dict()}]
    return {"README.md": section, "eckart.json": to_json({**known, "merged": merged})}


def merged_facts(
    done: Merged, adapter: str | None, texts: Sequence[tuple[str, str]], licence: str | None
) -> Facts:
    """Return what the card of a merged model says beside it; `adapter` is its folder or hub id, if any."""
    found = done.comparison
    return Facts(
        f"{name_of(done.source)} with the adapter {name_of(adapter or 'adapter')} merged into it, by eckart.",
        (done.source,) if adapter is None else (done.source, adapter),
        FINETUNE,
        texts=tuple(texts),
        licence=licence,
        figures=() if found is None else perplexity_figure(_measured(texts), found.model, "held-out text"),
        continued=True,
    )
