"""Perplexity of presets at several budgets: one table, printed as Markdown and written as JSON.

    python benchmarks/quality.py MODEL --text CALIBRATION --eval-text TEST --keep 0.9 0.8 0.6
    python benchmarks/quality.py MODEL --text CALIBRATION --eval-text TEST --rank 16 32 64 128

A method is a preset, alone or with a form of its own: eckart/pivoted, eckart/width, eckart/stock. With
+depth blocks may be left out: eckart/stock+depth.
Finished rows are kept in the JSON file, and the same command continues after an interruption.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eckart import environment, models, pipeline, recipe, render
from eckart.methods import METHODS
from eckart.recipe import Recipe

FORMS = ("eckart/pivoted", "eckart/width", "eckart/stock")
DEFAULT = [*(name for name in METHODS if name != "eckart"), *FORMS, "eckart"]
COLUMNS = [
    "method",
    "budget",
    "keep of linears",
    "keep of model",
    "perplexity",
    "predicted",
    "measured",
    "seconds",
    "peak MB so far",
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--eval-text", required=True, nargs="+")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--keep", type=float, nargs="+")
    budget.add_argument("--rank", type=int, nargs="+")
    parser.add_argument("--of", default="linears", choices=["model", "linears"])
    parser.add_argument("--methods", nargs="+", default=DEFAULT)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--eval-tokens", type=int, default=24_576)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    return parser.parse_args()


def recipe_for(options: argparse.Namespace, method: str, name: str, value: float) -> Recipe:
    budget = {"rank": int(value)} if name == "rank" else {"keep": value, "of": options.of}
    method, _, depth = method.partition("+")
    method, _, form = method.partition("/")
    how: dict[str, Any] = {"stock": True} if form == "stock" else {"form": form} if form else {}
    return recipe.from_mapping(
        {
            **budget, **how, "depth": bool(depth),
            "model": options.model, "method": method, "tokens": options.tokens,
            "gradient_tokens": max(2, options.tokens // 2), "eval_tokens": options.eval_tokens,
            "text": options.text, "eval_text": options.eval_text, "dtype": options.dtype,
        }
    )  # fmt: skip


def measure(
    options: argparse.Namespace, method: str, name: str, values: list[float]
) -> Iterator[dict[str, Any]]:
    """Calibrate and decompose once, then yield a row per budget."""
    recipes = [recipe_for(options, method, name, value) for value in values]
    prepared = pipeline.prepare(recipes[0], pipeline.load_for(recipes[0]))
    model = prepared.loaded.model
    dense = {target.name: models.find(model, target.name) for target in prepared.found}
    once = sum(prepared.run.seconds.values()) - prepared.run.seconds["measure dense"]
    for value, own in zip(values, recipes, strict=True):
        prepared.run.seconds |= {"choose": 0.0, "replace": 0.0}
        _, result = pipeline.finish(own, prepared)
        assert result.dense is not None
        assert result.compressed is not None
        yield {
            "method": method,
            "budget": f"{name} {value:g}",
            "keep_linears": result.keep_linears,
            "keep_model": result.keep_model,
            "dense": result.dense.perplexity,
            "perplexity": result.compressed.perplexity,
            "predicted": result.predicted_increase,
            "measured": result.compressed.loss - result.dense.loss,
            "seconds": once + result.seconds["choose"] + result.seconds["replace"],
            "peak_mb_so_far": result.peak_memory["ram"] / 1e6,
        }
        for module_name, module in dense.items():
            models.replace(model, module_name, module)
        models.cast(model, next(iter(dense.values())).weight.dtype)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    predicted = "" if row["predicted"] is None else f"{row['predicted']:+.3f}"
    return (
        row["method"], row["budget"], f"{row['keep_linears']:.3f}", f"{row['keep_model']:.3f}",
        f"{row['perplexity']:,.2f}", predicted, f"{row['measured']:+.3f}", f"{row['seconds']:.0f}",
        f"{row['peak_mb_so_far']:,.0f}",
    )  # fmt: skip


def grid(rows: list[dict[str, Any]]) -> str:
    """The perplexities, a row per method and a column per budget; the best method comes last."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    found = {(row["method"], row["budget"]): row["perplexity"] for row in rows}
    names = {row["method"] for row in rows}
    order = sorted(names, key=lambda name: -found.get((name, budgets[-1]), 0.0))
    lines = [[name, *(_figure(found.get((name, budget))) for budget in budgets)] for name in order]
    return render.markdown_table(["method", *budgets], lines)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value < 1000 else f"{value:.1e}"


def key(options: argparse.Namespace) -> dict[str, Any]:
    """What every row of one file must share."""
    names = ("of", "tokens", "eval_tokens", "dtype")
    files = {name: [Path(f).name for f in getattr(options, name)] for name in ("text", "eval_text")}
    return {"model": Path(options.model).name, **files, **{name: getattr(options, name) for name in names}}


def previous(options: argparse.Namespace) -> list[dict[str, Any]]:
    if not options.out.is_file():
        return []
    found = json.loads(options.out.read_text())
    if found["protocol"] != key(options):
        sys.exit(f"{options.out} was made with another protocol: {found['protocol']}; choose another --out")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def main() -> None:
    options = arguments()
    rows = previous(options)
    name = "rank" if options.rank else "keep"
    for method in options.methods:
        done = [row["budget"] for row in rows if row["method"] == method]
        values = [value for value in options.rank or options.keep if f"{name} {value:g}" not in done]
        for row in measure(options, method, name, values) if values else ():
            rows.append(row)
            print("| " + " | ".join(cells(row)) + " |", flush=True)
            found = {"protocol": key(options), "rows": rows, "environment": environment.describe()}
            found["command"] = [Path(a).name if Path(a).exists() else a for a in sys.argv]
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\ndense perplexity {rows[0]['dense']:.2f}\n")
    print(render.markdown_table(COLUMNS, [cells(row) for row in rows]))
    print(f"\nperplexity alone:\n\n{grid(rows)}")


if __name__ == "__main__":
    main()
