"""Show a tuning run: before, after, as a card, as a plot of AdaLoRA's ranks. Pure rendering."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..environment import name_of
from ..hub import MB
from ..modelcard import ACCURACY, ADAPTER, FINETUNE, Facts, Figure
from ..render import markdown_table, table, to_json
from ..scratch.decline import Decline, plot
from .judge import Judged
from .store import Nf4
from .tuned import Prospect, Tuned

Rows = list[tuple[str, ...]]
MEMORY_COLUMNS = ("estimate of memory, MB", "weights", "gradients", "optimizer", "activations", "in all")
_PARTS = ("weights", "gradients", "optimizer", "activations", "total")
RESULT_COLUMNS = ("", "before", "after")
RANK_COLUMNS = ("matrices", "rank at the start", "in the end", "least", "largest")


def _quality(judged: Judged) -> str:
    accuracy = "" if judged.accuracy is None else f", accuracy {judged.accuracy:.1%}"
    return f"{judged.loss:.4f} nats a token{accuracy}"


def prospect_rows(prospect: Prospect) -> Rows:
    """Return the rows of what is known before a run."""
    tuning = prospect.tuning
    rows: Rows = [
        ("parameters", f"{prospect.base:,}"),
        (
            "trainable",
            f"{prospect.trainable:,}, {prospect.trainable / prospect.total:.2%} of {prospect.total:,}",
        ),
        ("examples", f"{prospect.examples:,} to learn from, {prospect.held_out:,} held out"),
        ("steps", f"{prospect.steps:,} of {tuning.batch} {'packed rows' if tuning.packing else 'examples'}"),
        ("held-out loss now", _quality(prospect.start)),
    ]
    if prospect.cut:
        rows.append(("too long", f"{prospect.cut:,} were cut, {prospect.dropped:,} of them left out"))
    return rows


def memory_rows(memory: Mapping[str, Mapping[str, int]]) -> Rows:
    """Return a row for each method, in MB."""
    return [(method, *(f"{parts[part] / MB:,.1f}" for part in _PARTS)) for method, parts in memory.items()]


def prospect_table(prospect: Prospect) -> RenderableType:
    """Return what is shown before the first step."""
    parts: list[RenderableType] = [
        table(f"{prospect.source} by {prospect.tuning.method}", ("", ""), prospect_rows(prospect))
    ]
    if prospect.memory:
        parts.append(table("", MEMORY_COLUMNS, memory_rows(prospect.memory)))
    return Group(*parts, *(Text(f"note: {line}") for line in prospect.notes))


def result_rows(tuned: Tuned) -> Rows:
    """Return the rows of what changed on held-out examples."""
    before, after = tuned.prospect.start, tuned.end
    rows: Rows = [("held-out loss, nats a token", f"{before.loss:.4f}", f"{after.loss:.4f}")]
    if before.accuracy is not None and after.accuracy is not None:
        rows.append(("accuracy", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}"))
    return rows


def lines(tuned: Tuned) -> list[str]:
    """Return what else there is to say of a run."""
    prospect = tuned.prospect
    found = [
        f"best at step {tuned.best:,} of {tuned.done:,} done and {prospect.steps:,} planned: {tuned.ended}",
        f"{prospect.trainable:,} of {prospect.total:,} parameters trained "
        f"({prospect.trainable / prospect.total:.2%})",
        f"{tuned.per_step:.2f} s a step, {tuned.seconds:.0f} s in all",
    ]
    found.append(_memory(tuned))
    if tuned.error is not None:
        found.append(f"the start of the adapter left {tuned.error:.1%} of the quantisation error")
    if tuned.stored_bytes is not None:
        found.append(f"{tuned.stored_bytes / MB:,.3f} MB of weight files")
    if not tuned.gain:
        found.append("the held-out loss did not fall: lower --rate, or give more data")
    return found


def _memory(tuned: Tuned) -> str:
    whole = f"peak memory {tuned.peak / MB:,.0f} MB, of which {tuned.resting / MB:,.0f} MB before training"
    estimated = tuned.prospect.memory.get(tuned.prospect.tuning.method, {}).get("total")
    if tuned.needed is None or not estimated:
        return whole
    return (
        f"{whole}; with its weights the training took {tuned.needed / MB:,.0f} MB, where "
        f"{estimated / MB:,.0f} MB were estimated ({tuned.needed / estimated - 1:+.0%})"
    )


def rank_rows(tuned: Tuned) -> Rows:
    """Return what AdaLoRA or rank auto gave each kind of matrix, mean ranks; empty for uniform ranks."""
    start = dict(tuned.trajectory[0][1]) if tuned.trajectory else dict(tuned.ranks)
    if len(set(tuned.ranks.values())) <= 1 and not tuned.trajectory:
        return []
    rows: Rows = []
    for kind, names in _kinds(tuned.ranks).items():
        now = [tuned.ranks[name] for name in names]
        before = sum(start.get(name, 0) for name in names) / len(names)
        rows.append((kind, f"{before:.1f}", f"{sum(now) / len(now):.1f}", str(min(now)), str(max(now))))
    return rows


def _kinds(ranks: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the names by what a matrix is called inside its block."""
    found: dict[str, list[str]] = {}
    for name in ranks:
        parts = name.split(".")
        last = max((at for at, part in enumerate(parts) if part.isdigit()), default=-1)
        found.setdefault(".".join(parts[last + 1 :]), []).append(name)
    return found


def tuned_table(tuned: Tuned) -> RenderableType:
    """Return the tables that end a run."""
    source, method = tuned.prospect.source, tuned.prospect.tuning.method
    parts: list[RenderableType] = [table(f"{source} by {method}", RESULT_COLUMNS, result_rows(tuned))]
    ranks = rank_rows(tuned)
    if ranks:
        parts.append(table("ranks", RANK_COLUMNS, ranks))
    return Group(*parts, *map(Text, lines(tuned)))


def documents(tuned: Tuned, storage: Nf4 | None, plot: bool) -> dict[str, str]:
    """Return the texts that stand beside the weights: what was done, and machine-readable report.

    Args:
        tuned: what was done.
        storage: of the base, for an adapter on NF4.
        plot: whether ranks.png stands beside them.
    """
    ranks = rank_rows(tuned)
    sections = [f"\n### Ranks\n\n{markdown_table(RANK_COLUMNS, ranks)}\n"] if ranks else []
    if plot:
        sections.append("\n![ranks over the steps](ranks.png)\n")
    card = f"""## Tuned

{markdown_table(RESULT_COLUMNS, result_rows(tuned))}

{chr(10).join(f"- {line}" for line in lines(tuned))}
{"".join(sections)}
Measured on {tuned.prospect.held_out:,} held-out examples; the state was chosen by their loss. All settings
and the course of the run are in `eckart.json`.
"""
    report: dict[str, Any] = {"tuned": tuned.to_dict()}
    if storage is not None:
        report["base"] = storage.to_dict()
    return {"README.md": card, "eckart.json": to_json(report)}


def facts(tuned: Tuned, licence: str | None = None) -> Facts:
    """Return what the model card says beside it; `licence` is that of the data."""
    prospect = tuned.prospect
    adapter = prospect.tuning.method != "full"
    data = ", ".join(Path(source).name for source in prospect.tuning.data)
    on = ", ".join(Path(source).name for source in prospect.tuning.eval_data) or f"{data}, held out"
    protocol = {"examples": prospect.held_out, "chosen_by_it": True}
    figures = [Figure(on, "loss", "loss, nats a token", tuned.end.loss, protocol)]
    if tuned.end.accuracy is not None:
        figures.append(Figure(on, ACCURACY, "accuracy of label words", tuned.end.accuracy, protocol))
    uses = (("training", prospect.tuning.data), ("choosing the state", prospect.tuning.eval_data))
    return Facts(
        f"{name_of(prospect.source)} tuned by eckart: {_described(prospect)}, on {data}.",
        (prospect.source,),
        ADAPTER if adapter else FINETUNE,
        ("lora",) if adapter else (),
        texts=tuple((source, use) for use, sources in uses for source in sources),
        licence=licence,
        figures=tuple(figures),
        continued=not adapter,
    )


def _described(prospect: Prospect) -> str:
    tuning = prospect.tuning
    if tuning.method == "full":
        return "all parameters"
    rank = f"rank {tuning.rank}" if tuning.rank != "auto" else "ranks by the spectra of gradients"
    return f"{tuning.method}, {rank}, start {tuning.starting}"


def plot_spectra(tuned: Tuned, path: Path) -> bool:
    """Draw how the spectra declined under a penalty, as a PNG; return False where matplotlib is missing."""
    made = Decline()
    made.take(tuned.decline or {})
    return plot(made, path)


def plot_ranks(tuned: Tuned, path: Path) -> bool:
    """Draw how AdaLoRA moved the ranks, as a PNG; return False where matplotlib is missing.

    Above, the mean rank of each kind of matrix over the steps; below, the rank of every matrix in the end.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    kinds = _kinds(tuned.ranks)
    steps = [step for step, _ in tuned.trajectory]
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    for kind, names in kinds.items():
        means = [sum(ranks.get(name, 0) for name in names) / len(names) for _, ranks in tuned.trajectory]
        above.step([*steps, tuned.done], [*means, means[-1]], where="post", label=kind)
    above.set(xlabel="step", ylabel="mean rank", title="Ranks that AdaLoRA keeps")
    above.legend(fontsize=7, ncols=2)
    deepest = max(map(len, kinds.values()))
    grid = [[tuned.ranks[name] for name in names] + [0] * (deepest - len(names)) for names in kinds.values()]
    image = below.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    below.set_yticks(range(len(kinds)), list(kinds))
    below.set(xlabel="layer", title="in the end")
    figure.colorbar(image, ax=below, label="rank")
    figure.savefig(path, dpi=120)
    return True
