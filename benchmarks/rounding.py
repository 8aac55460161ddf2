"""What each form of a matrix loses when it is stored in few bits, rounded to nearest or with compensation.

    python benchmarks/rounding.py MODEL --text CALIBRATION --other-text TEXT [--blocks 10]

For all linear maps of the given blocks together: tr(C D H D^T) / 2, the estimated loss per token, with H and
C of the text that was calibrated on and of another one; dense, and at a share of the parameters as two
factors and pivoted. `nearest` is what naive storage does to the factors as they are in a folder; GPTQ
compensates along columns, `two-sided` is what eckart does (eckart.quant.leaves).
"""

import argparse
import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart import calibrate, environment, hub, models, recipe, render, windows
from eckart.factors import Form, LowRank, build
from eckart.linalg import Metric, to_float64, weighted_error, weighted_svd
from eckart.quant import leaves, rounding, storage
from eckart.ranks import Keep, uniform

DENSE = ("int8", "nf4-dq", "int4", "int3", "int2")
PAIRS = (("int8", "int8"), ("nf4-dq", "nf4-dq"), ("nf4-dq", "int8"))
KEEPS = (0.9, 0.7)
Pair = tuple[Metric, Metric]
Totals = defaultdict[tuple[str, int], float]


def metrics(options: argparse.Namespace, loaded: hub.Loaded, names: list[str], text: Path) -> list[Pair]:
    """H and C of each of the maps on `text`, damped a little."""
    own = recipe.from_mapping({"keep": 1.0, "text": [str(text)], "tokens": options.tokens})
    rows = windows.read(own, loaded.tokenizer, []).calibration
    assert rows is not None
    found = calibrate.calibrate(
        loaded.model, rows, names, ("gram", "gradient"), gradient_windows=len(rows),
        generator=torch.Generator().manual_seed(0),
        watch=lambda done, total: print(f"  {text.name}: window {done} of {total}", flush=True),
    )  # fmt: skip
    made = []
    for name in names:
        inputs, outputs = (found.stats.moment(kind, name).mean() for kind in ("gram", "gradient"))
        made.append((Metric(len(inputs), inputs, 1e-4), Metric(len(outputs), outputs, 1e-4)))
    return made


def add(totals: Totals, name: str, error: Tensor, pair: list[Pair]) -> None:
    for place, own in enumerate(pair):
        totals[name, place] += weighted_error(error, *own) / 2


def whole(totals: Totals, weight: Tensor, pair: list[Pair]) -> None:
    inputs, outputs = pair[0]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    for name in DENSE:
        kind = storage.get(name)
        grid = kind.grid(weight)
        one_sided = rounding.compensated(weight, grid, inputs.moment)
        both = leaves.quantise(linear, {"": kind}, inputs.moment, outputs.moment)[""]
        for how, found in (
            ("nearest", grid.rounded(weight)), ("GPTQ", grid.values(one_sided)), ("two-sided", both.values()),
        ):  # fmt: skip
            add(totals, f"dense | {name} | {how}", to_float64(weight) - to_float64(found), pair)


def low_rank(totals: Totals, weight: Tensor, pair: list[Pair]) -> None:
    inputs, outputs = pair[0]
    svd = weighted_svd(weight, inputs, outputs)
    forms: tuple[Form, ...] = ("factored", "pivoted")
    for keep in KEEPS:
        for form in forms:
            rank = uniform(Keep(keep), form, (weight.shape[0], weight.shape[1]))
            assert rank is not None
            module = build(LowRank(svd.left[:, :rank], svd.right[:rank]), form)
            what = f"{form} at {keep:g}"
            add(totals, f"{what} | float | ", to_float64(weight) - module.map().dense(), pair)
            for names in PAIRS:
                if form == "factored" and names[0] != names[1]:
                    continue
                kinds = dict(zip(leaves.leaves(module), map(storage.get, names), strict=True))
                nearest, both = copy.deepcopy(module), copy.deepcopy(module)
                for part, leaf in leaves.leaves(module).items():
                    own = leaf.linear.weight.detach().float()
                    put(nearest, part, kinds[part].grid(own).rounded(own))
                for part, found in leaves.quantise(module, kinds, inputs.moment, outputs.moment).items():
                    put(both, part, found.values())
                label = names[0] if names[0] == names[1] else " + ".join(names)
                for how, made in (("nearest", nearest), ("two-sided", both)):
                    add(totals, f"{what} | {label} | {how}", to_float64(weight) - made.map().dense(), pair)


@torch.no_grad()
def put(module: nn.Module, part: str, values: Tensor) -> None:
    module.get_submodule(part).get_parameter("weight").copy_(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--other-text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[10])
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rounding.json"))
    options = parser.parse_args()
    loaded = hub.load(options.model)
    blocks = [models.block_names(loaded.model)[place] for place in options.blocks]
    names = [t.name for t in models.targets(loaded.model) if models.owner(t.name, blocks)]
    pairs = list(zip(*(metrics(options, loaded, names, t) for t in (options.text, options.other_text))))
    totals: Totals = defaultdict(float)
    for name, pair in zip(names, pairs, strict=True):
        weight = models.find(loaded.model, name).weight.detach()
        whole(totals, weight, list(pair))
        low_rank(totals, weight, list(pair))
        print(f"  {name}", flush=True)
    rows: list[dict[str, Any]] = [
        {"form": form, "storage": stored, "rounding": how, "loss": totals[key, 0], "other": totals[key, 1]}
        for key in dict.fromkeys(key for key, _ in totals)
        for form, stored, how in [map(str.strip, key.split("|"))]
    ]
    protocol = {"model": Path(options.model).name, "text": options.text.name, "blocks": options.blocks,
                "other_text": options.other_text.name, "tokens": options.tokens}  # fmt: skip
    result = {"protocol": protocol, "rows": rows, "environment": environment.describe()}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    lines = [(r["form"], r["storage"], r["rounding"], f"{r['loss']:.5f}", f"{r['other']:.5f}") for r in rows]
    print(render.markdown_table(("form", "stored as", "rounding", "loss", "on another text"), lines))


if __name__ == "__main__":
    main()
