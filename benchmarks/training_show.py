"""The tables of benchmarks/training.py, means and ranges over the seeds that are there."""

import statistics
from typing import Any

from eckart import render

Row = dict[str, Any]
WORDS = {
    "full": "full rank",
    "preset": "low rank from the first step",
    "warm": "full rank for half of the steps, then factored",
    "persuaded": "the same, with a penalty on the tail before",
    "shared": "neighbouring blocks share all matrices",
    "differences": "shared by twice as many, with low-rank differences",
    "narrow": "full rank, narrower",
    "penalised": "full rank, with a penalty on the tail to the end",
    "factor decay": "low rank from the first step, weight decay on the factors",
    "galore": "full rank, GaLore",
    "untied": "full rank, embeddings and head of their own",
}
COLUMNS = ["way", "seeds", "parameters", "loss", "against narrower", "s a step", "optimizer MB"]
CUT = "cut by SVD after training"


def spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def against(found: dict[int, float], reference: dict[int, float]) -> str:
    """Return the mean difference over the seeds that both have, with the range."""
    differences = [loss - reference[seed] for seed, loss in found.items() if seed in reference]
    if not differences:
        return ""
    mean = f"{statistics.fmean(differences):+.3f}"
    return mean if len(differences) == 1 else f"{mean} ({min(differences):+.3f} to {max(differences):+.3f})"


def losses(rows: list[Row], way: str, keep: float) -> dict[int, float]:
    return {row["seed"]: row["loss"] for row in rows if (row["way"], row["keep"]) == (way, keep)}


def after(rows: list[Row], way: str, keep: float) -> tuple[int, dict[int, float]]:
    """Return parameters and losses of what compression by SVD leaves of a model trained at full rank."""
    found, size = {}, 0
    for row in rows:
        for cut in row.get("after", []) if row["way"] == way else []:
            if (cut["method"], cut["keep"]) == ("svd", keep):
                found[row["seed"]], size = cut["loss"], cut["parameters"]
    return size, found


def cells(rows: list[Row], way: str, keep: float) -> list[str]:
    own = [row for row in rows if (row["way"], row["keep"]) == (way, keep)]
    narrow = losses(rows, "narrow", keep) if way != "narrow" else {}
    return [
        WORDS[way], str(len(own)), f"{own[0]['parameters']:,}", spread([row["loss"] for row in own]),
        against(losses(rows, way, keep), narrow),
        f"{statistics.fmean(row['seconds_per_step'] for row in own):.3f}",
        f"{own[0]['optimizer_bytes'] / 1e6:.1f}",
    ]  # fmt: skip


def table(rows: list[Row], keep: float) -> list[list[str]]:
    ways = list(dict.fromkeys(row["way"] for row in rows if row["keep"] == keep))
    found = [cells(rows, way, keep) for way in sorted(ways, key=list(WORDS).index)]
    for way in ("full", "penalised"):
        size, cut = after(rows, way, keep)
        if cut:
            difference = against(cut, losses(rows, "narrow", keep))
            shown = [f"{WORDS[way]}; {CUT}", str(len(cut)), f"{size:,}", spread([*cut.values()]), difference]
            found.append([*shown, "", ""])
    return found


def tied(rows: list[Row]) -> list[list[str]]:
    """Return what embeddings and head as one matrix cost: from the first step, and after training."""
    own = {row["seed"]: row for row in rows if row["way"] == "untied"}
    if not own:
        return []
    apart = {seed: row["loss"] for seed, row in own.items()}
    first = next(iter(own.values()))
    found = [["two matrices", f"{first['parameters']:,}", spread([*apart.values()]), ""]]
    one = {seed: loss for seed, loss in losses(rows, "full", 1.0).items() if seed in own}
    size = first["tied"][0]["parameters"]
    if one:
        found.append(["one, from the first step", f"{size:,}", spread([*one.values()]), against(one, apart)])
    for place, cut in enumerate(first["tied"]):
        loss = {seed: row["tied"][place]["loss"] for seed, row in own.items()}
        words = f"one, fitted after training by {cut['method']}"
        found.append([words, f"{size:,}", spread([*loss.values()]), against(loss, apart)])
    return found


def rates(rows: list[Row]) -> list[list[str]]:
    """Return the loss of each way at every rate that it was tried at, seed 0."""
    tried = sorted({row["rate"] for row in rows})
    keys = dict.fromkeys((row["way"], row["keep"]) for row in rows if row["seed"] == 0)
    found = []
    for way, keep in keys:
        mine = [row for row in rows if (row["way"], row["keep"], row["seed"]) == (way, keep, 0)]
        own = {row["rate"]: row["loss"] for row in mine}
        if len(own) > 1:
            found.append([WORDS[way], f"{keep:g}", *(f"{own[r]:.3f}" if r in own else "" for r in tried)])
    return found


def show(rows: list[Row], rates_of: dict[str, float]) -> None:
    """Print the tables of every shape that has rows, at the rate that it is trained with."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        every = [row for row in rows if row["shape"] == shape]
        rate = rates_of[shape]
        own = [row for row in every if row["rate"] == rate]
        for keep in sorted({row["keep"] for row in own}, reverse=True):
            print(f"\nmodel of {shape}, rate {rate:g}, keep {keep:g} of the linear maps\n")
            print(render.markdown_table(COLUMNS, table(own, keep)))
        pairs = tied(own)
        if pairs:
            columns = ["embeddings and head", "parameters", "loss", "against two"]
            print("\n" + render.markdown_table(columns, pairs))
        tried = rates(every)
        if tried:
            columns = ["seed 0", "keep", *(f"loss at {one:g}" for one in sorted({r["rate"] for r in every}))]
            print("\n" + render.markdown_table(columns, tried))
