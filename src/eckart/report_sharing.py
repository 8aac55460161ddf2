"""Show what sharing between blocks, or tying, did: rich tables, Markdown model card, JSON. Pure rendering."""

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from . import environment
from .hub import DTYPES, MB
from .joined import Joined, Tied
from .render import markdown_table, table, to_json
from .report_quality import calibration_line, not_measured, quality_remarks, quality_rows
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


def card(result: Joined, folder: str) -> str:
    """Return README.md for the output folder."""
    version = environment.describe()["versions"]["eckart"]
    notes = "\n".join(f"- {remark}" for remark in remarks(result))
    calibration = f"\n{calibration_line(result)}\n" if result.calibration_tokens else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [eckart, low-rank, compressed, shared]
---
# {folder}

{title(result)} ({result.architecture}), by eckart {version}. What blocks share is stored once and trained
once; biases and normalisation are their own.

```python
import eckart  # pip install eckart
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

`eckart.densify(model)` gives back an ordinary model of the original shape.

{markdown_table(_COLUMNS, [*size_rows(result), *quality_rows(result)])}

{markdown_table(GROUP_COLUMNS, group_rows(result))}
{calibration}
Notes:

{notes}

Not measured: anything but {not_measured(result)}. The licence and terms of the base model apply.

To repeat it: `{_command(result)}`; all settings are in `eckart.json`.
"""


def documents(result: Joined, folder: str) -> dict[str, str]:
    """Return the texts that stand beside the weights: card and machine-readable report."""
    return {"README.md": card(result, folder), "eckart.json": to_json(result.to_dict())}


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


def tied_documents(found: Tied, card: str, known: dict[str, Any]) -> dict[str, str]:
    """Return the texts that stand beside the weights, given those of the model before; none for its card."""
    rows = markdown_table(("", "before", "after", "change"), tied_rows(found))
    section = f"\n## Embeddings {found.done}\n\n{rows}\n" if found.done != "nothing" else ""
    return {
        "README.md": (card.rstrip("\n") + "\n" if card else f"# {Path(found.source).name}\n") + section,
        "eckart.json": to_json({**known, "tied": found.to_dict()}),
    }
