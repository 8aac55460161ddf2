"""Show what healing did. Pure rendering."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from .environment import name_of
from .healing import Healing, Refined
from .hub import MB
from .lessons import learned
from .modelcard import REPORT, Facts, perplexity_figure
from .render import markdown_table, table, to_json
from .result import Healed, Quality

STEP_COLUMNS = ("refinement", "KL before", "KL after", "tokens", "seconds", "")


def step_rows(steps: Sequence[Refined]) -> list[tuple[str, ...]]:
    """Return a row per refinement: divergence from the dense model on held-out text, nats per token."""
    return [
        (
            step.step,
            f"{step.before:.4f}",
            f"{step.after:.4f}",
            f"{step.tokens:,}",
            f"{step.seconds:.0f}",
            step.detail if step.gain else f"no gain beyond the noise, taken back ({step.detail})",
        )
        for step in steps
    ]


def quality_rows(what: str, found: Quality | None) -> list[tuple[str, ...]]:
    """Return the row of one text: dense, before healing, after, and after divided by dense."""
    if found is None:
        return []
    dense, before, now = (value.perplexity for value in (found.dense, found.one_shot, found.compressed))
    return [(what, f"{dense:.2f}", f"{before:.2f}", f"{now:.2f}", f"x {now / dense:.3f}")]


QUALITY_COLUMNS = ("perplexity", "dense", "before healing", "healed", "against dense")


def remarks(settings: Healing, steps: Sequence[Refined], foreign: Quality | None) -> list[str]:
    """Return what a reader must not overlook."""
    found = []
    if settings.text_loss:
        found.append(
            f"text_loss {settings.text_loss:g}: the text itself was learned too, its domain with it; compare "
            "with the dense model tuned on the same tokens"
        )
    found += [f"{step.step}: {step.detail}" for step in steps if "diverged" in step.detail]
    if foreign is not None and foreign.compressed.loss > foreign.one_shot.loss:
        found.append(
            "on the foreign text healing made it worse: mix other text in (NAME=WEIGHT, or self=WEIGHT for "
            "what the dense model writes itself)"
        )
    return found


def healed_table(healed: Healed) -> RenderableType:
    """Return the tables that end a run of heal."""
    parts: list[RenderableType] = [
        table(f"{healed.source} healed towards {healed.teacher}", STEP_COLUMNS, step_rows(healed.steps))
    ]
    rows = [*quality_rows("own text", healed.quality), *quality_rows("foreign text", healed.foreign)]
    if rows:
        parts.append(table("perplexity", QUALITY_COLUMNS, rows))
    parts += [Text(f"note: {line}") for line in remarks(healed.settings, healed.steps, healed.foreign)]
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in healed.seconds.items())
    memory = ", ".join(f"{name} {size / MB:,.1f} MB" for name, size in healed.peak_memory.items())
    return Group(*parts, Text(f"time: {seconds}"), Text(f"peak memory: {memory}"))


def card_section(healed: Healed, columns: str, rows: str) -> str:
    """Return what a model card says of it, given the two tables in Markdown."""
    sources = ", ".join(Path(source.partition("=")[0]).name for source in healed.settings.text)
    return f"""
## Healed

Towards the next-token distribution of {Path(healed.teacher).name}, on {sources}; divergence in nats per
token on the last tenth of the text, which nothing was fitted to.

{columns}

{rows}
"""


def known(folder: str | Path | None) -> dict[str, Any]:
    """Return the JSON report in `folder`, empty where there is none."""
    report = None if folder is None else Path(folder) / REPORT
    if report is None or not report.is_file():
        return {}
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def documents(healed: Healed, known: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts to stand beside the weights of a healed model.

    Args:
        healed: what was done.
        known: JSON report of the folder that was healed; empty where there is none.
    """
    steps = markdown_table(STEP_COLUMNS, step_rows(healed.steps))
    rows = [
        *quality_rows("own text", healed.quality),
        *quality_rows("foreign text", healed.foreign),
    ]
    quality = markdown_table(QUALITY_COLUMNS, rows) if rows else "Perplexity was not measured."
    before = [*known.get("healed", []), healed.to_dict()]
    return {
        "README.md": card_section(healed, steps, quality),
        "eckart.json": to_json({**known, "healed": before}),
    }


def facts(healed: Healed, source: str, licence: str | None = None) -> Facts:
    """Return what the model card says beside it; `source` is the folder that was healed."""
    figures = [
        perplexity_figure([], found.compressed, what)
        for what, found in (("own text", healed.quality), ("foreign text", healed.foreign))
        if found is not None
    ]
    name = name_of(source)
    return Facts(
        f"{name}, healed by eckart towards {Path(healed.teacher).name}.",
        (source,),
        tags=("low-rank", "compressed"),
        texts=learned(healed.settings.text),
        licence=licence,
        figures=tuple(figure for found in figures for figure in found),
        continued=True,
    )
