"""Single linear maps in the shapes of larger models: dense, two factors, pivoted, fused and folded.

    OMP_NUM_THREADS=1 python benchmarks/layers.py --out benchmarks/results/layers.json

prints, for each shape, number of tokens and keep, the ratio to the dense time and that ratio in units of the
share of bytes (one token) or of FLOPs (more) that the form has of the dense map: the target for pivoted maps
is 1.10. Weights are random; forms run in turn, each with copies of its own.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import eckart
from eckart.bars import Bars
from eckart.speed.layers import LayerTime
from eckart.speed.result import LayerSpeeds

SHAPES = ("4096x4096", "4096x11008", "4096x14336")
TARGET = 1.10


def measure(options: argparse.Namespace, keep: float) -> list[LayerSpeeds]:
    """Time `--shapes` at `--tokens`, and the transposes of those that are not square."""
    turned = ["x".join(reversed(shape.split("x"))) for shape in options.shapes]
    turned = [shape for shape in turned if shape not in options.shapes]
    plans = [(options.shapes, options.tokens), (turned, options.transposed_tokens)]
    with Bars() as bars:
        return [
            eckart.bench_layers(
                keep=keep, shape=shapes, tokens=tokens, runs=options.runs, warmup=2, threads=options.threads,
                fuse=True, watch=bars.watch,
            )
            for shapes, tokens in plans
            if shapes and tokens
        ]  # fmt: skip


def lines(found: Sequence[LayerSpeeds]) -> list[str]:
    """Return the table in Markdown."""
    names = list(dict.fromkeys(name for one in found for layer in one.layers for name in layer.forms))
    rows = ["| keep | m x n | tokens | dense, ms | " + " | ".join(names) + " |"]
    rows.append("|---" * (4 + len(names)) + "|")
    for one in found:
        for layer in one.layers:
            own = [_cell(layer, name) if name in layer.forms else "" for name in names]
            head = (
                f"{one.options.keep:g}",
                f"{layer.shape[0]} x {layer.shape[1]}",
                str(layer.tokens),
                f"{layer.dense.median * 1e3:.2f}",
            )
            rows.append(f"| {' | '.join([*head, *own])} |")
    return rows


def _cell(layer: LayerTime, name: str) -> str:
    return f"{layer.forms[name].ratio.value:.2f} ({layer.excess(name):.2f})"


def missed(found: Sequence[LayerSpeeds]) -> list[str]:
    """Return where a pivoted map takes more than `TARGET` times what its share allows."""
    return [
        f"above {TARGET:.2f}: {name}, keep {one.options.keep:g}, {layer.shape[0]} x {layer.shape[1]}, "
        f"{layer.tokens} tokens: {layer.excess(name):.2f}"
        for one in found
        for layer in one.layers
        for name in layer.forms
        if name.startswith("pivoted, ") and layer.excess(name) > TARGET
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="outputs x inputs")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
    parser.add_argument("--transposed-tokens", nargs="*", type=int, default=[1, 16, 512])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.6, 0.4])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layers.json"))
    options = parser.parse_args()
    found = [one for keep in options.keep for one in measure(options, keep)]
    print(
        "\n".join(["Ratio to the dense time (in units of the share):", "", *lines(found), "", *missed(found)])
    )
    made: dict[str, Any] = {"parts": [one.to_dict() for one in found]}
    options.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
