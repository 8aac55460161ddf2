"""Show what sharing between blocks, or tying, did: rich tables, Markdown model card, JSON. Pure rendering."""

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from . import environment
from .environment import name_of
from .hub import DTYPES, MB
from .joined import Joined, Tied
from .modelcard import QUANTISED, Facts, perplexity_figure
from .render import markdown_table, table, to_json
from .report_quality import calibration_line, figures_of, quality_remarks, quality_rows, texts_of
from .report_sizes import size_rows

GROUP_COLUMNS = ("blocks", "matrices", "parameters before", "after", "share", "energy kept", "estimated loss")
_COLUMNS = ("", "before", "after", "share")


def title(result: Joined) -> str:
    """Return what was done, in one line."""
    wanted = result.sharing
    parts = {"blocks": "whole blocks", "attention": "attention", "mlp": "feed-forward"}[wanted.what]
    extras = [f"differences of rank {wanted.differences}"] if wanted.differences else []
    extras += ["scales"] if wanted.scales else []
    extra = f" with {' and '.join(extras)}" if extras else ""
    how = "the first for all" if wanted.start == "first" else f"method {result.recipe.method}"
    return f"{result.source}: {parts} shared by groups {wanted.groups}{extra}, {how}"


def group_rows(result: Joined) -> list[tuple[str, ...]]:
    """Return a row for each group of blocks: what its matrices had, have, and are estimated to cost."""
    found: dict[str, list[str]] = {}
    for names in result.joined.values():
        found.setdefault(", ".join(_places(names)), []).extend(names)
    modules = {module.name: module for module in result.modules}
    rows: list[tuple[str, ...]] = []
    for blocks, inside in found.items():
        own = [modules[name] for name in inside]
        before, after = sum(module.before for module in own), sum(module.after for module in own)
        energy = sum(module.energy for module in own) / len(own)
        loss = f"{sum(module.loss for module in own):.4f}" if result.predicted_increase is not None else ""
        figures = (f"{before:,}", f"{after:,}", f"{after / before:.3f}", f"{energy:.3f}", loss)
        rows.append((blocks, str(len(own)), *figures))
    return rows


def _places(names: tuple[str, ...]) -> list[str]:
    """Return what tells the names of a group apart: the numbers of their blocks."""
    parts = [name.split(".") for name in names]
    place = next(i for i, values in enumerate(zip(*parts, strict=True)) if len(set(values)) > 1)
    return [part[place] for part in parts]


def remarks(result: Joined) -> list[str]:
    """Return what a reader must not overlook."""
    found = [*result.warnings, *quality_remarks(result)]
    if result.sharing.start == "first":
        found.append("the weights of each first block stand for all: train the model before use")
    elif result.compressed is not None:
        found.append("heal it towards the model that it comes from: eckart heal DIR --teacher MODEL")
    return found


def joined_table(result: Joined) -> RenderableType:
    """Return the tables that end a run of share."""
    parts: list[RenderableType] = [
        table(title(result), _COLUMNS, [*size_rows(result), *quality_rows(result)]),
        table("groups", GROUP_COLUMNS, group_rows(result)),
        *(Text(f"note: {remark}") for remark in remarks(result)),
    ]
    if result.calibration_tokens:
        parts.append(Text(calibration_line(result)))
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
    memory = ", ".join(f"{name} {size / MB:,.1f} MB" for name, size in result.peak_memory.items())
    return Group(*parts, Text(f"time: {seconds}"), Text(f"peak memory: {memory}"))


def _command(result: Joined) -> str:
    wanted = result.sharing
    flags = [f"--groups {wanted.groups}", f"--what {wanted.what}", f"--method {result.recipe.method}"]
    flags += [f"--differences {wanted.differences}"] if wanted.differences else []
    flags += ["--scales"] if wanted.scales else []
    flags += ["--start first"] if wanted.start == "first" else []
    flags += [f"--text {Path(source).name}" for source in result.recipe.text]
    return f"eckart share MODEL {' '.join(flags)} --out DIR"


def card(result: Joined) -> str:
    """Return what the model card of the output says of what was done, in Markdown."""
    notes = "\n".join(f"- {remark}" for remark in remarks(result))
    calibration = f"\n{calibration_line(result)}\n" if result.calibration_tokens else ""
    return f"""## Shared

What blocks share is stored once and trained once; biases and normalisation are their own.

{markdown_table(_COLUMNS, [*size_rows(result), *quality_rows(result)])}

{markdown_table(GROUP_COLUMNS, group_rows(result))}
{calibration}
Notes:

{notes}

To repeat it: `{_command(result)}`; all settings are in `eckart.json`.
"""


def documents(result: Joined) -> dict[str, str]:
    """Return the texts that stand beside the weights: what was done, and machine-readable report."""
    return {"README.md": card(result), "eckart.json": to_json(result.to_dict())}


def facts(result: Joined, licence: str | None = None) -> Facts:
    """Return what the model card says beside it; `licence` is that of the texts."""
    version = environment.describe()["versions"]["eckart"]
    summary = (
        f"{title(result)} ({result.architecture}), by eckart {version}. `eckart.densify(model)` gives back "
        "an ordinary model of the original shape."
    )
    return Facts(
        summary,
        (result.source,),
        tags=("low-rank", "compressed", "shared"),
        task=result.task,
        texts=texts_of(result),
        licence=licence,
        figures=figures_of(result),
        continued=True,
    )


def tied_rows(found: Tied) -> list[tuple[str, ...]]:
    """Return the rows (what, before, after, change)."""
    before, after = found.parameters
    rows: list[tuple[str, ...]] = [
        ("parameters of the model", f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    ]
    if found.error is not None:
        unit = "nats per token" if found.method == "eckart" else "in the metric of the method"
        for what, value in zip(("embeddings", "output head"), found.error, strict=True):
            rows.append((f"estimated cost at the {what}, {unit}", "", "", f"{value:+.4f}"))
    if found.dense is not None and found.compressed is not None:
        first, last = found.dense.loss, found.compressed.loss
        rows.append(("loss, nats per token", f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}"))
    return rows


def tied_table(found: Tied) -> RenderableType:
    """Return the table that ends a run of tie or untie."""
    head = {
        "tied": "embeddings and output head are one matrix now",
        "untied": "embeddings and output head are two matrices now, with the same values",
        "nothing": "nothing to do",
    }[found.done]
    size = found.vocabulary * found.width
    line = (
        f"a matrix is {found.vocabulary:,} x {found.width:,} = {size:,} parameters, "
        f"{size * DTYPES[found.dtype].itemsize / MB:,.1f} MB in {found.dtype}"
    )
    return Group(table(f"{found.source}: {head}", (*_COLUMNS[:3], "change"), tied_rows(found)), Text(line))


def tied_documents(found: Tied, known: dict[str, Any]) -> dict[str, str]:
    """Return the texts that stand beside the weights, given the report of the model before."""
    rows = markdown_table(("", "before", "after", "change"), tied_rows(found))
    section = f"## Embeddings {found.done}\n\n{rows}\n" if found.done != "nothing" else ""
    return {"README.md": section, "eckart.json": to_json({**known, "tied": found.to_dict()})}


def tied_facts(found: Tied, source: str, licence: str | None = None) -> Facts:
    """Return what the model card says beside it; `source` is the model before."""
    what = {"tied": "one matrix", "untied": "two matrices", "nothing": "as they were"}[found.done]
    name = name_of(source)
    return Facts(
        f"{name} with embeddings and output head {what}, by eckart.",
        (source,),
        relation=QUANTISED if found.done == "tied" else None,
        texts=found.texts,
        licence=licence,
        figures=perplexity_figure([], found.compressed, "held-out text"),
        continued=True,
    )
