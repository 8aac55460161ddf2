"""The table and the plot of benchmarks/equal_bytes.py."""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eckart import render

Rows = dict[str, dict[str, Any]]
REFERENCE = "dense float32"
COLORS = {"dense": "tab:gray", "llama.cpp": "tab:orange", "eckart": "tab:blue"}
HIGHEST = 5.0
"""In times the lowest perplexity: what is above is in the table alone."""
COLUMNS = [
    "row", "MB", "perplexity", "against dense", "foreign against dense", "RAM MB", "of it the model",
    "decode tok/s", "prefill tok/s", "seconds to make",
]  # fmt: skip


def cells(name: str, row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    def against(key: str) -> str:
        return f"{row[key] / dense[key]:.3f}" if key in row and key in dense else ""

    def median(key: str) -> str:
        return f"{statistics.median(row[key]):.1f}" if key in row else ""

    loaded = row["resident"] - row["resident_before"] if "resident" in row else None
    return [
        name, f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:,.2f}", against("perplexity"),
        against("foreign"), "" if loaded is None else f"{row['resident'] / 1e6:,.0f}",
        "" if loaded is None else f"{loaded / 1e6:,.0f}", median("decode"), median("prefill"),
        "" if row["seconds"] is None else f"{row['seconds']:.0f}",
    ]  # fmt: skip


def show(rows: Rows, out: Path) -> None:
    """Print the table, the largest file first, and draw the front beside `out`."""
    if not rows:
        return
    order = sorted(rows, key=lambda name: -rows[name]["bytes"])
    print(
        render.markdown_table(COLUMNS, [cells(name, rows[name], rows.get(REFERENCE, {})) for name in order])
    )
    for name in order:
        how, loss = rows[name]["how"], rows[name]["perplexity"]
        if how.get("predicted") and REFERENCE in rows:
            found = math.log(loss / rows[REFERENCE]["perplexity"])
            ranked = {form: sum(own.values()) for form, own in how["forms"].items()}
            print(f"{name}: estimated {how['predicted']:.3f} nats, measured {found:.3f}; matrices {ranked}")
    headers = {row["how"]["header_bytes"] for row in rows.values() if "header_bytes" in row["how"]}
    if headers:
        print(f"\nOf the bytes of a GGUF, {max(headers) / 1e6:.1f} MB are its header and tokenizer.")
    plot(rows, out.with_suffix(".png"))


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one is both smaller and better than, the smallest first."""
    found: list[tuple[float, float]] = []
    for size, value in sorted(points):
        if not found or value < found[-1][1]:
            found.append((size, value))
    return found


def plot(rows: Rows, path: Path) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lowest = min(row["perplexity"] for row in rows.values())
    for what, color in COLORS.items():
        own = {
            name: row
            for name, row in rows.items()
            if row["kind"] == what and row["perplexity"] < HIGHEST * lowest
        }
        points = [(row["bytes"] / 1e6, row["perplexity"]) for row in own.values()]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), "o", color=color, label=what)
        axes.plot(*zip(*front(points), strict=True), "-", color=color, linewidth=0.8)
        for (name, _), point in zip(own.items(), points, strict=True):
            axes.annotate(
                name.removeprefix(what).strip(), point, xytext=(4, 4), textcoords="offset points",
                fontsize=7, color=color,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="weight files, MB", ylabel="perplexity")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(which="both", linewidth=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"\nplot: {path}")
