"""What narrower attention heads are estimated to cost, summed over the model, in nats per token.

    python benchmarks/heads.py MODEL --text CALIBRATION

A stock config has one size of heads for queries, keys and values, and the rotary frequencies follow from
it: only evenly spaced pairs, the same in all blocks, could stay. A loader of ours may keep any.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eckart import environment, pipeline, recipe, render
from eckart.heads import PairNarrowing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/heads.json"))
    return parser.parse_args()


def even_loss(found: PairNarrowing, kept: Tensor) -> float:
    """What is lost where every group keeps the pairs `kept` alone; terms between pairs are left out."""
    costs = torch.zeros_like(found.losses).scatter(1, found.order, found.losses)
    costs[:, kept] = 0
    return float(costs.sum())


def rows(prepared: pipeline.Prepared) -> list[dict[str, Any]]:
    decomposed = prepared.decomposed
    size = decomposed.heads[0].size
    half = size // 2
    made = []
    for count in (half * 7 // 8, half * 3 // 4, half // 2):
        values = sum(float(decomposed.parts[own.values].losses()[2 * count]) for own in decomposed.heads)
        pairs = [decomposed.parts[own.pairs] for own in decomposed.heads]
        free = sum(float(part.losses()[count]) for part in pairs)
        even = {}
        for step in range(1, (half - 1) // (count - 1) + 1):
            kept = torch.arange(count) * step
            even[step] = sum(
                part.unit * even_loss(part.found, kept)
                for part in pairs
                if isinstance(part.found, PairNarrowing)
            )
        step = min(even, key=lambda one: even[one])
        made.append(
            {
                "head": f"{2 * count} of {size}",
                "values": values,
                "pairs, any": free,
                "pairs, evenly spaced": even[step],
                "spacing": step,
            }
        )
    return made


def main() -> None:
    options = arguments()
    own = recipe.from_mapping(
        {
            "model": options.model, "keep": 0.8, "of": "linears", "form": "width", "text": options.text,
            "tokens": options.tokens, "gradient_tokens": options.tokens // 2, "eval_tokens": 1024,
        }
    )  # fmt: skip
    found = rows(pipeline.prepare(own, pipeline.load_for(own)))
    protocol = {"model": Path(options.model).name, "text": [Path(name).name for name in options.text],
                "tokens": options.tokens}  # fmt: skip
    result = {"protocol": protocol, "rows": found, "environment": environment.describe()}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    lines = [[str(value) if not isinstance(value, float) else f"{value:.3f}" for value in row.values()]
             for row in found]  # fmt: skip
    print(render.markdown_table(list(found[0]), lines))


if __name__ == "__main__":
    main()
