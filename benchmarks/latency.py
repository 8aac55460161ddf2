"""Plans that spend measured time beside plans that spend bytes: what was promised, and what each model does.

    python benchmarks/latency.py MODEL --text CALIBRATION --eval-text TEST --cache FOLDER --times times.json

Four models from one calibration, which is kept in --cache: of a size; of the same size with nothing slower
than dense; as fast as that size, in whatever size; of a share of the time. Each has a row with its linear
maps' parameters, its perplexity, their time by the table and measured map by map, and tokens per second of
the whole model beside the dense one, as it is and fused (eckart.fuse), in rounds by turns. Finished rows
are kept, and the same command goes on.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import eckart
from eckart import environment, hub, render
from eckart.bars import Bars
from eckart.errors import RankError
from eckart.measure import Perplexity
from eckart.recipe import Recipe
from eckart.speed.timing import fixed_threads

COLUMNS = (
    "plan", "linears left", "perplexity", "time of linears: foretold", "measured", "decode, to dense",
    "decode, fused", "prefill, to dense", "prefill, fused",
)  # fmt: skip


def plans(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    size: dict[str, Any] = {"keep": options.keep, "of": "linears"}
    return {
        f"keep {options.keep:g}": size,
        f"keep {options.keep:g}, nothing slower than dense": {**size, "objective": "balanced"},
        f"as fast as keep {options.keep:g}": {**size, "objective": "latency"},
        f"latency {options.latency:g}": {"latency": options.latency},
    }


def row(options: argparse.Namespace, plan: dict[str, Any], dense: Any, bars: Bars) -> dict[str, Any]:
    """Make the model of `plan`, and measure it beside `dense`."""
    spent = {"times": options.times} if "objective" in plan or "latency" in plan else {}
    model, result = eckart.compress(
        options.model, **plan, **spent, text=options.text, eval_text=options.eval_text, form=options.form,
        tokens=options.tokens, gradient_tokens=options.tokens // 2, dtype="float32", cache=options.cache,
        recipe=Recipe(keep=1.0, eval_tokens=options.eval_tokens), watch=bars.watch,
    )  # fmt: skip
    assert isinstance(result.dense, Perplexity)
    assert isinstance(result.compressed, Perplexity)
    found: dict[str, Any] = {
        "linears": result.after.linears / result.before.linears,
        "dense_perplexity": result.dense.perplexity, "perplexity": result.compressed.perplexity,
    }  # fmt: skip
    if (timing := result.timing) is not None:
        assert timing.measured is not None
        assert timing.measured_dense is not None
        found["foretold"] = timing.planned / timing.dense
        found["measured"] = timing.measured / timing.measured_dense
        found["remarks"] = timing.remarks()
    for name, fuse in (("as it is", False), ("fused", True)):
        speed = eckart.bench(
            model, against=dense, prompt_tokens=128, new_tokens=32, runs=options.runs, loads=0, fuse=fuse,
            watch=bars.watch,
        )  # fmt: skip
        found[name] = speed.to_dict()["settings"]
    return found


def cells(name: str, found: dict[str, Any]) -> list[str]:
    if "refused" in found:
        return [name, found["refused"], *("" for _ in COLUMNS[2:])]

    def share(key: str) -> str:
        return f"{found[key]:.3f}" if key in found else ""

    def ratio(kind: str, key: str) -> str:
        one = found[kind][0]["ratio"][f"{key}_tokens_per_second"]
        return f"{one['value']:.2f} ({one['lower']:.2f} to {one['upper']:.2f})"

    speeds = [ratio(kind, key) for key in ("decode", "prefill") for kind in ("as it is", "fused")]
    return [
        name, f"{found['linears']:.3f}", f"{found['perplexity']:.2f}", share("foretold"), share("measured"),
        *speeds,
    ]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--eval-text", nargs="+", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--times", type=Path, required=True, help="the table; what it lacks is measured")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--latency", type=float, default=0.6)
    parser.add_argument("--form", default="pivoted")
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--eval-tokens", type=int, default=6_144)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latency.json"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    taken = ("keep", "latency", "form", "tokens", "eval_tokens", "runs", "threads")
    protocol = {name: getattr(options, name) for name in taken} | {"model": Path(options.model).name}
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": {}}
    if kept["rows"] and kept["protocol"] != protocol:
        sys.exit(f"{options.out} was made by another protocol, {kept['protocol']}: another --out")
    rows: dict[str, Any] = kept["rows"]
    with Bars() as bars, fixed_threads(options.threads):
        dense = hub.load(options.model, compute=torch.float32).model
        for name, plan in plans(options).items():
            if name in rows:
                continue
            try:
                rows[name] = row(options, plan, dense, bars)
            except RankError as refused:  # nothing is faster than dense by so much
                rows[name] = {"refused": str(refused)}
            report = {
                "protocol": protocol, "rows": rows, "command": environment.command(),
                "environment": environment.describe(),
            }  # fmt: skip
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(render.markdown_table(COLUMNS, [cells(name, found) for name, found in rows.items()]))


if __name__ == "__main__":
    main()
