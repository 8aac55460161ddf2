"""Perplexity of presets at several budgets: one table, printed as Markdown and written as JSON.

    python benchmarks/quality.py MODEL --text CALIBRATION --eval-text TEST --keep 0.9 0.8 0.6
    python benchmarks/quality.py MODEL --text CALIBRATION --eval-text TEST --rank 16 32 64 128

A method is a preset, alone or with a form of its own: eckart/pivoted, eckart/width, eckart/stock. With
+depth blocks may be left out: eckart/stock+depth. With +heal it is refined afterwards: eckart+heal, and
eckart+heal@1 with another seed. The method dense+text is the dense model tuned on the text itself with as
many tokens: what the domain alone is worth, for comparison with --text-loss.
Finished rows are kept in the JSON file, and the same command continues after an interruption.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from eckart import environment, memory, mend, models, pipeline, recipe, render, windows
from eckart.healing import REFINEMENTS, Healing
from eckart.measure import Perplexity
from eckart.measure import perplexity as measure_perplexity
from eckart.mend import Ward
from eckart.methods import METHODS
from eckart.recipe import Recipe
from eckart.result import Result

FORMS = ("eckart/pivoted", "eckart/width", "eckart/stock")
DEFAULT = [*(name for name in METHODS if name != "eckart"), *FORMS, "eckart"]
COLUMNS = [
    "method",
    "budget",
    "keep of linears",
    "keep of model",
    "perplexity",
    "against dense",
    "predicted",
    "measured",
    "foreign against dense",
    "heal tokens",
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
    parser.add_argument("--foreign-text", nargs="+", default=[], help="texts of other kinds to measure on")
    parser.add_argument("--heal-text", nargs="+", default=[], help="NAME=WEIGHT; default: --text")
    parser.add_argument("--heal-tokens", type=int, default=Healing().tokens)
    parser.add_argument("--refine", nargs="+", default=list(Healing().steps), choices=REFINEMENTS)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--text-loss", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    return parser.parse_args()


def recipe_for(options: argparse.Namespace, method: str, name: str, value: float) -> Recipe:
    budget = {"rank": int(value)} if name == "rank" else {"keep": value, "of": options.of}
    method, *extras = method.split("+")
    method, _, form = method.partition("/")
    heal = next((extra for extra in extras if extra.startswith("heal")), None)
    how: dict[str, Any] = {"stock": True} if form == "stock" else {"form": form} if form else {}
    return recipe.from_mapping(
        {
            **budget, **how, "depth": "depth" in extras, "foreign_text": options.foreign_text,
            "heal": None if heal is None else healing(options, int(heal.partition("@")[2] or 0)),
            "model": options.model, "method": method, "tokens": options.tokens,
            "gradient_tokens": max(2, options.tokens // 2), "eval_tokens": options.eval_tokens,
            "text": options.text, "eval_text": options.eval_text, "dtype": options.dtype,
        }
    )  # fmt: skip


def healing(options: argparse.Namespace, seed: int) -> Healing:
    given = {"rate": options.rate} if options.rate else {}
    return Healing(
        steps=tuple(options.refine), tokens=options.heal_tokens, seed=seed, text_loss=options.text_loss,
        text=tuple(options.heal_text), **given,
    )  # fmt: skip


class Shelf:
    """Decompositions: what is prepared once serves every budget and seed of one way of compressing."""

    def __init__(self) -> None:
        self.name = ""
        self.prepared: pipeline.Prepared | None = None

    def get(self, name: str, own: Recipe) -> pipeline.Prepared:
        if name != self.name or self.prepared is None:
            self.prepared = None  # freed before the next one is made
            self.name, found = name, pipeline.prepare(own, pipeline.load_for(own))
            self.prepared = found
        return self.prepared


def measure(
    options: argparse.Namespace, shelf: Shelf, method: str, name: str, values: list[float]
) -> Iterator[dict[str, Any]]:
    """Calibrate and decompose once, then yield a row per budget."""
    if method == "dense+text":
        yield tuned(options, f"{name} {values[0]:g}")
        return
    recipes = [recipe_for(options, method, name, value) for value in values]
    prepared = shelf.get(method.partition("+heal")[0], recipes[0])
    model = prepared.loaded.model
    dense = {target.name: models.find(model, target.name) for target in prepared.found}
    kept = {key: tensor.clone() for key, tensor in models.state_tensors(model).items()}
    fixed = ("read text", "calibrate", "try blocks", "factor")
    once = sum(prepared.run.seconds.get(stage, 0.0) for stage in fixed)
    for value, own in zip(values, recipes, strict=True):
        prepared.run.seconds.clear()
        work = options.out.parent / f".{options.out.stem}-{method.replace('/', '-')}-{value:g}"
        start = time.perf_counter()
        _, result = pipeline.finish(own, prepared, Ward(work))
        spent = time.perf_counter() - start
        yield row(method, f"{name} {value:g}", result, once, spent)
        shutil.rmtree(work, ignore_errors=True)
        for module_name, module in dense.items():
            models.replace(model, module_name, module)
        with torch.no_grad():
            for key, tensor in models.state_tensors(model).items():
                tensor.data = kept[key].clone()
    prepared.run.seconds |= dict.fromkeys(fixed, 0.0) | {"factor": once}


def tuned(options: argparse.Namespace, budget: str) -> dict[str, Any]:
    """The dense model, tuned on the text's own loss with as many tokens as healing takes."""
    own = recipe_for(options, "eckart", "keep", 1.0)
    loaded = pipeline.load_for(own)
    texts = windows.read(own, loaded.tokenizer, [])
    assert texts.held_out is not None
    rows = [part for part in (texts.held_out, texts.foreign) if part is not None]
    before = [measure_perplexity(loaded.model, part).perplexity for part in rows]
    settings = replace(
        healing(options, 0), steps=("logits",), text_loss=1.0, text=tuple(options.heal_text or options.text)
    )
    student = copy.deepcopy(loaded.model)
    start = time.perf_counter()
    steps = mend.run(student, loaded.model, loaded.tokenizer, settings, watch=lambda stage, at, of: None)
    after = [measure_perplexity(student, part) for part in rows]
    return {
        "method": "dense+text", "budget": budget, "keep_linears": 1.0, "keep_model": 1.0, "dense": before[0],
        "perplexity": after[0].perplexity, "predicted": None,
        "measured": after[0].loss - math.log(before[0]), "seconds": 0.0,
        "peak_mb_so_far": memory.peak_bytes(student.device)["ram"] / 1e6,
        **({"foreign": [before[1], after[1].perplexity]} if len(rows) > 1 else {}),
        "heal_tokens": sum(step.tokens for step in steps), "heal_seconds": time.perf_counter() - start,
        "healing": [asdict(step) for step in steps],
    }  # fmt: skip


def row(method: str, budget: str, result: Result, once: float, spent: float) -> dict[str, Any]:
    assert isinstance(result.dense, Perplexity)
    assert isinstance(result.compressed, Perplexity)
    parts = ("choose", "replace", "anchor")
    found: dict[str, Any] = {
        "method": method,
        "budget": budget,
        "keep_linears": result.keep_linears,
        "keep_model": result.keep_model,
        "dense": result.dense.perplexity,
        "perplexity": result.compressed.perplexity,
        "predicted": result.predicted_increase,
        "measured": result.compressed.loss - result.dense.loss,
        "seconds": once + sum(result.seconds.get(part, 0.0) for part in parts),
        "peak_mb_so_far": result.peak_memory["ram"] / 1e6,
    }
    if result.foreign is not None:
        found["foreign"] = [result.foreign.dense.perplexity, result.foreign.compressed.perplexity]
    if result.healing:
        assert isinstance(result.one_shot, Perplexity)
        found |= {
            "one_shot": result.one_shot.perplexity,
            "foreign_one_shot": None if result.foreign is None else result.foreign.one_shot.perplexity,
            "heal_tokens": sum(step.tokens for step in result.healing),
            "heal_seconds": sum(step.seconds for step in result.healing),
            "wall_seconds": spent,
            "healing": [asdict(step) for step in result.healing],
        }
    return found


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    predicted = "" if row["predicted"] is None else f"{row['predicted']:+.3f}"
    foreign = f"{row['foreign'][1] / row['foreign'][0]:.3f}" if "foreign" in row else ""
    return (
        row["method"], row["budget"], f"{row['keep_linears']:.3f}", f"{row['keep_model']:.3f}",
        f"{row['perplexity']:,.2f}", f"{row['perplexity'] / row['dense']:.3f}", predicted,
        f"{row['measured']:+.3f}", foreign,
        f"{row['heal_tokens']:,}" if "heal_tokens" in row else "",
        f"{row['seconds'] + row.get('heal_seconds', 0):.0f}", f"{row['peak_mb_so_far']:,.0f}",
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
    if options.foreign_text:
        files["foreign_text"] = [Path(f).name for f in options.foreign_text]
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
    rows, shelf = previous(options), Shelf()
    name = "rank" if options.rank else "keep"
    for method in options.methods:
        done = [row["budget"] for row in rows if row["method"] == method]
        values = [value for value in options.rank or options.keep if f"{name} {value:g}" not in done]
        for found_row in measure(options, shelf, method, name, values) if values else ():
            rows.append(found_row)
            print("| " + " | ".join(cells(found_row)) + " |", flush=True)
            found = {"protocol": key(options), "rows": rows, "environment": environment.describe()}
            found["command"] = environment.command()
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\ndense perplexity {rows[0]['dense']:.2f}\n")
    print(render.markdown_table(COLUMNS, [cells(row) for row in rows]))
    print(f"\nperplexity alone:\n\n{grid(rows)}")


if __name__ == "__main__":
    main()
