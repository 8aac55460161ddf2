"""The tables and the plot of benchmarks/adapters.py, means and ranges over the seeds that are there."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eckart import render

Row = dict[str, Any]
COLUMNS = [
    "method", "seeds", "trainable", "share", "test loss", "accuracy", "share of full's gain", "stored MB",
    "peak MB", "to full", "s a step",
]  # fmt: skip
CUTS = ["difference of full cut to", "test loss, linears alone", "test loss, all else as tuned"]
SPECTRUM = ["matrices", "stable rank", "energy in top 2", "top 8", "top 32", "top 5 %", "top 10 %"]


def name(row: Row) -> str:
    return row["method"] if row["method"] == "full" else f"{row['method']} {row['rank']}"


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(
            f"{name(row)} at {row['rate']:g}" if row["task"] == "rates" else name(row), []
        ).append(row)
    return found


def spread(values: list[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def cells(what: str, rows: list[Row], full: list[Row]) -> list[str]:
    def mean(key: str, of: list[Row]) -> float:
        return statistics.fmean(row[key] for row in of)

    losses = [row["test"]["loss"] for row in rows]
    right = [row["test"]["accuracy"] for row in rows if row["test"]["accuracy"] is not None]
    gain = ratio = ""
    if full:
        best = statistics.fmean(row["test"]["loss"] for row in full)
        base = rows[0]["base"]["loss"]
        gain = f"{(base - statistics.fmean(losses)) / (base - best):.1%}"
        ratio = f"{mean('peak_bytes', rows) / mean('peak_bytes', full):.2f}"
    return [
        what, str(len(rows)), f"{mean('trainable', rows):,.0f}",
        f"{mean('trainable', rows) / rows[0]['parameters']:.2%}", spread(losses, ".3f"),
        spread(right, ".1%") if right else "", gain, f"{mean('bytes', rows) / 1e6:,.1f}",
        f"{mean('peak_bytes', rows) / 1e6:,.0f}", ratio, f"{mean('seconds_per_step', rows):.2f}",
    ]  # fmt: skip


def spectra(row: Row) -> list[list[str]]:
    kinds: dict[str, list[Row]] = {}
    for one in row["spectra"]:
        kinds.setdefault(one["name"].split(".")[-2], []).append(one)
    keys = ("stable_rank", *(f"energy_top_{top}" for top in ("2", "8", "32", "5%", "10%")))
    return [
        [kind, *(f"{statistics.fmean(one[key] for one in found):{'.1f' if at == 0 else '.0%'}}"
                 for at, key in enumerate(keys))]
        for kind, found in kinds.items()
    ]  # fmt: skip


def cuts(row: Row) -> list[list[str]]:
    ranks = dict.fromkeys(what.partition(",")[0] for what in row["cut"])
    return [
        [
            f"rank {rank}",
            *(f"{row['cut'][f'{rank}, {kind}']['loss']:.3f}" for kind in ("linears alone", "all")),
        ]
        for rank in ranks
    ]


def answers(own: list[Row]) -> list[str]:
    """Return what the rows of one task say: the best rank, and AdaLoRA and QLoRA beside LoRA of their rank.

    Methods are compared where they had the same seed: the same examples in the same order.
    """
    by: dict[str, dict[tuple[int, int], Row]] = {}
    for row in own:
        by.setdefault(row["method"], {})[row["seed"], row["rank"]] = row
    lora = by.get("lora", {})
    losses: dict[int, dict[int, float]] = {}
    for (seed, rank), row in sorted(lora.items()):
        losses.setdefault(seed, {})[rank] = row["test"]["loss"]
    best = [str(min(one, key=one.__getitem__)) for one in losses.values() if len(one) > 1]
    found = [f"best rank of LoRA on each seed: {', '.join(best)}"] if best else []
    for method in ("adalora", "qlora"):
        pairs = [(row, lora[place]) for place, row in by.get(method, {}).items() if place in lora]
        if pairs:
            found.append(f"{LABELS[method]} to LoRA of rank {pairs[0][0]['rank']}: {beside(pairs)}")
    return found


def beside(pairs: list[tuple[Row, Row]]) -> str:
    """Return how the losses of the first of each pair do beside those of the second."""

    def change(part: str) -> float:
        ours, theirs = (statistics.fmean(pair[side][part]["loss"] for pair in pairs) for side in (0, 1))
        return ours / theirs - 1

    lower = sum(ours["test"]["loss"] < theirs["test"]["loss"] for ours, theirs in pairs)
    return (
        f"held-out loss {change('held_out'):+.1%}, test loss {change('test'):+.1%}, "
        f"lower on {lower} of {len(pairs)} seeds"
    )


def show(rows: list[Row], out: Path) -> None:
    """Print the tables of every task that has rows, and draw the plot beside `out`."""
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        full = [row for row in own if row["method"] == "full"]
        base = own[0]["base"]
        right = "" if base["accuracy"] is None else f", accuracy {base['accuracy']:.1%}"
        print(f"\n{task}: the base has test loss {base['loss']:.3f}{right}\n")
        print(render.markdown_table(COLUMNS, [cells(what, of, full) for what, of in groups(own).items()]))
        if task != "rates":
            print("".join(f"\n- {line}" for line in answers(own)))
        for row in full:
            if "spectra" in row:
                print("\n" + render.markdown_table(SPECTRUM, spectra(row)))
                print("\n" + render.markdown_table(CUTS, cuts(row)))
    plot([row for row in rows if row["task"] != "rates"], out.with_suffix(".png"))


LABELS = {"full": "all parameters", "lora": "LoRA", "adalora": "AdaLoRA", "qlora": "QLoRA"}
TITLES = {"sst2": "SST-2", "e2e": "E2E", "gsm8k": "GSM8K"}


def plot(rows: list[Row], path: Path) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if not tasks:
        return
    figure = Figure(figsize=(4.8 * len(tasks), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = [row for row in rows if row["task"] == task]
        for method, marker in zip(dict.fromkeys(row["method"] for row in own), "sovD", strict=False):
            draw(axes, method, marker, [row for row in own if row["method"] == method])
        seeds = len({row["seed"] for row in own})
        axes.set(
            xscale="log", xlabel="trainable parameters (LoRA: with its rank)",
            ylabel="test loss, nats a token",
            title=f"{TITLES[task]}, " + ("one seed" if seeds == 1 else f"mean and range of {seeds} seeds"),
        )  # fmt: skip
        axes.legend()
    figure.savefig(path, dpi=110)
    print(f"\nplot: {path}")


def draw(axes: Any, method: str, marker: str, rows: list[Row]) -> None:
    """Draw the mean and the range of the losses of each rank."""
    ranks = {rank: [row for row in rows if row["rank"] == rank] for rank in sorted({r["rank"] for r in rows})}
    losses = [[row["test"]["loss"] for row in found] for found in ranks.values()]
    means = [statistics.fmean(own) for own in losses]
    places = [found[0]["trainable"] for found in ranks.values()]
    ranges = [
        [mean - min(own) for mean, own in zip(means, losses, strict=True)],
        [max(own) - mean for mean, own in zip(means, losses, strict=True)],
    ]
    line = "-" if len(ranks) > 1 else "none"
    axes.errorbar(places, means, ranges, marker=marker, capsize=3, linestyle=line, label=LABELS[method])
    if method == "lora":
        for rank, place, mean in zip(ranks, places, means, strict=True):
            axes.annotate(str(rank), (place, mean), xytext=(6, 6), textcoords="offset points")
