"""Memory of training steps, estimated and measured: a process for each, printed as Markdown, kept as JSON.

    OMP_NUM_THREADS=1 python benchmarks/footprint.py [--model GGUF] [--as-is]

Compared are the most that the process held beyond what it held before training, plus the exact bytes of the
weights, with the total that eckart.adapt.footprint gives. Interpreter and libraries, about 0.5 GB, are in
neither. The trainer is the one of `eckart tune`, on random tokens, for three steps. Linux alone.

The rows marked "as is" leave the C library's allocator as it comes; in the others every large block leaves
the process when it is freed (eckart.memory.map_large_blocks).
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import smollm2
import torch

from eckart import environment, hub, memory, render
from eckart.adapt import attach, batches, footprint, targets, trainer
from eckart.adapt.adalora import Allocation
from eckart.adapt.examples import IGNORED
from eckart.adapt.judge import Judged
from eckart.adapt.tuning import Tuning
from eckart.training import around, precision, recomputed

OUT = Path("benchmarks/results/footprint.json")
METHODS = ("full", "lora", "qlora")
SIZES = ((2, 256), (4, 128))
STEPS = {"adalora": 10}  # fewer cannot allocate ranks
COLUMNS = [
    "method", "rows x tokens", "passes", "recomputed", "precision", "allocator", "estimate MB", "measured MB",
    "ratio", "beyond weights: estimate", "measured", "ratio", "s to estimate", "s a step",
]  # fmt: skip


def cases() -> list[dict[str, Any]]:
    made = []

    def add(method: str, size: tuple[int, int], **options: Any) -> None:
        usual = {"passes": 1, "checkpointing": False, "precision": "float32", "as_is": False, "learned": None}
        made.append({"method": method, "rows": size[0], "tokens": size[1], **usual, **options})

    for checkpointing in (False, True):
        for method in METHODS:
            add(method, SIZES[0], checkpointing=checkpointing)
    for method in METHODS:
        add(method, SIZES[0], precision="bfloat16")
    for method in METHODS:
        add(method, SIZES[0], as_is=True)
    for checkpointing in (False, True):
        for method in METHODS:
            add(method, SIZES[1], checkpointing=checkpointing)
    for method in ("full", "lora"):
        add(method, SIZES[0], passes=2)
    add("lora", SIZES[0], learned=16)
    add("adalora", SIZES[0])
    return made


def settings(case: dict[str, Any]) -> Tuning:
    return Tuning(
        method=case["method"], init="default", micro=case["rows"], batch=case["rows"] * case["passes"],
        seq_len=case["tokens"], checkpointing=case["checkpointing"], precision=case["precision"],
        steps=STEPS.get(case["method"], 3), evaluations=1,
    )  # fmt: skip


def rows(case: dict[str, Any], count: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(2, 40_000, (count, case["tokens"]), generator=generator).tolist()
    learned = case["learned"] or case["tokens"] - 1
    unlearned = case["tokens"] - learned
    return [{"input_ids": row, "labels": [IGNORED] * unlearned + row[unlearned:]} for row in made]


class Untouched(trainer.TuneTrainer):
    """Saves nothing and judges nothing: what is measured is steps."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        pass

    def _load_best_model(self) -> None:
        pass


def measure(model: str, case: dict[str, Any]) -> dict[str, Any]:
    if not case["as_is"] and not memory.map_large_blocks():
        sys.exit("the allocator of this C library cannot be set: only --as-is")
    loaded = hub.load(model, compute=torch.float32).model
    tuning = settings(case)
    names = [] if tuning.method == "full" else targets.names(loaded)
    ranks = dict.fromkeys(names, tuning.rank_at_start)
    began = time.perf_counter()
    learned = None if case["learned"] is None else case["rows"] * case["learned"]
    found = footprint.estimate(loaded, tuning, ranks, case["rows"], case["tokens"], learned=learned)
    estimating = time.perf_counter() - began
    given = {key: values["total"] for key, values in found.items()}
    own = found[tuning.method]
    mark, step = trained(loaded, tuning, ranks, case)
    beyond = mark.peak() - mark.resting
    return {
        **case,
        "estimate": own,
        "totals": given,
        "resting": mark.resting,
        "beyond": beyond,
        "measured": own["weights"] + beyond,
        "ratio": own["total"] / (own["weights"] + beyond),
        "beyond_ratio": (own["total"] - own["weights"]) / beyond,
        "seconds_to_estimate": estimating,
        "seconds_per_step": step,
    }


def trained(
    loaded: Any, tuning: Tuning, ranks: dict[str, int], case: dict[str, Any]
) -> tuple[memory.Watermark, float]:
    place, compute = loaded.device, precision(tuning, loaded.device)
    attached = attach.attach(
        loaded, tuning, ranks, (), steps=tuning.steps or 0, passes=case["passes"], compute=compute,
        around=around(tuning, place), watch=lambda stage, done, total: None,
    )  # fmt: skip
    model = attached.model
    model.config.use_cache = False
    data = rows(case, tuning.batch * (tuning.steps or 0))
    plan = trainer.plan(tuning, len(data), 1)
    moving = Allocation(model) if tuning.method == "adalora" else None
    with tempfile.TemporaryDirectory() as work:
        made = Untouched(
            judged=lambda: Judged(0.0, 1), allocation=moving, model=model,
            order=batches.Order([case["tokens"]] * len(data), tuning.batch, tuning.seed, False),
            args=trainer.arguments(tuning, plan, Path(work), place, compute), train_dataset=data,
            eval_dataset=data[:1], data_collator=batches.Collator(0), callbacks=[moving] if moving else [],
        )  # fmt: skip
        made.args.save_strategy = made.args.eval_strategy = "no"
        made.args.load_best_model_at_end = False
        mark = memory.Watermark(place)
        again = recomputed(model) if tuning.checkpointing else contextlib.nullcontext()
        with again:
            began = time.perf_counter()
            made.train()
        return mark, (time.perf_counter() - began) / plan.steps


def cells(row: dict[str, Any]) -> list[str]:
    own = row["estimate"]
    beyond = own["total"] - own["weights"]
    tokens = f"{row['rows']} x {row['tokens']}" + (f", {row['learned']} learned" if row["learned"] else "")
    return [
        row["method"], tokens, str(row["passes"]), "yes" if row["checkpointing"] else "no",
        row["precision"], "as is" if row["as_is"] else "set",
        f"{own['total'] / 1e6:,.0f}", f"{row['measured'] / 1e6:,.0f}", f"{row['ratio']:.3f}",
        f"{beyond / 1e6:,.0f}", f"{row['beyond'] / 1e6:,.0f}", f"{row['beyond_ratio']:.3f}",
        f"{row['seconds_to_estimate']:.1f}", f"{row['seconds_per_step']:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="default: the model of the benchmarks")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or str(smollm2.fetch())
    if options.case:
        Path(options.out).write_text(json.dumps(measure(model, json.loads(options.case))))
        return
    found: list[dict[str, Any]] = []
    if options.out.is_file():
        found = json.loads(options.out.read_text())["rows"]
    for case in cases():
        if any(all(row[key] == value for key, value in case.items()) for row in found):
            continue
        found.append(alone(model, case))
        print("| " + " | ".join(cells(found[-1])) + " |", flush=True)
        kept = {"model": Path(model).name, "rows": found, "environment": environment.describe()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=2) + "\n")
    print(render.markdown_table(COLUMNS, [cells(row) for row in found]))


def alone(model: str, case: dict[str, Any]) -> dict[str, Any]:
    """Measure `case` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--model", model, "--case", json.dumps(case), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


if __name__ == "__main__":
    main()
