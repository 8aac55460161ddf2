"""Accuracy on multiple-choice tasks that can be had offline: a dense model against compressed ones.

    python benchmarks/tasks.py MODEL --text CALIBRATION --bigbench DIR [--sst2 sst2.dev.tsv]
        [--eval-text FILE] [--keep 0.8 0.6] [--methods eckart svd-llm] [--tasks NAME ...] [--limit 300]

DIR is the folder bigbench/benchmark_tasks of the sdist of PyPI's bigbench 1.0.0 (Apache-2.0; its tasks are
for evaluation: never train on them). Each row is written as soon as it is measured, and what is there is not
measured again: the same command goes on where it was, with more methods, keeps and tasks. `--screen` runs
the dense model alone, to see which tasks it can do at all.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import eckart
from eckart import environment, measure, render
from eckart.text import plain, tokenize, windows
from eckart.zeroshot import harness, report_tasks
from eckart.zeroshot.scores import Outcomes, TaskResult

BIGBENCH = (
    "cause_and_effect/two_sentences", "goal_step_wikihow/goal_inference", "general_knowledge",
    "intent_recognition", "social_iqa", "understanding_fables",
)  # fmt: skip
"""Above guessing for SmolLM2-135M-Instruct, found by --screen before any compressed model was run."""
SST2 = "sst2"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", help="to calibrate on")
    parser.add_argument("--eval-text", type=Path, help="perplexity beside the accuracies")
    parser.add_argument("--eval-tokens", type=int, default=6_144)
    parser.add_argument("--bigbench", type=Path)
    parser.add_argument("--sst2", type=Path, help="lines of sentence, tab, 0 or 1")
    parser.add_argument("--tasks", nargs="+", default=list(BIGBENCH))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.8, 0.6], help="of the linear layers")
    parser.add_argument("--methods", nargs="+", default=["eckart", "svd-llm"])
    parser.add_argument("--tokens", type=int, default=8_192, help="to calibrate on, half with gradients")
    parser.add_argument("--limit", type=int, default=300, help="samples of each task, from its start")
    parser.add_argument("--screen", action="store_true", help="the dense model alone; nothing is written")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tasks.json"))
    return parser.parse_args()


def bigbench_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Return the questions of a task with exactly one right choice, asked without naming the choices."""
    task = json.loads(path.read_text(encoding="utf-8"))
    prefix = task.get("example_input_prefix", "\nQ: ").strip()
    answer = task.get("example_output_prefix", "\nA: ").strip()
    for example in task["examples"]:
        scores = example.get("target_scores") or {}
        choices = list(scores)
        if len(choices) < 2 or sorted(scores.values())[-2:] == [1, 1] or max(scores.values()) != 1:
            continue
        question = f"{task.get('task_prefix', '')}{prefix} {example['input']}\n{answer}".strip()
        yield {
            "question": question,
            "choices": choices,
            "target": choices.index(max(choices, key=lambda one: scores[one])),
        }


def sst2_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        sentence, _, label = line.rpartition("\t")
        question = f"Review: {sentence.strip()}\nIs this review negative or positive?\nAnswer:"
        yield {"question": question, "choices": ["negative", "positive"], "target": int(label)}


def define(folder: Path, name: str, rows: Sequence[dict[str, Any]], limit: int) -> tuple[str, int]:
    """Write a task of lm_eval with its data into `folder`; return what it is called and its samples."""
    called = name.replace("/", "_")
    data = folder / f"{called}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:limit]), encoding="utf-8")
    means = [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in ("acc", "acc_norm")]
    values = {
        "task": called, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{target}}", "metric_list": means,
        "metadata": {"version": 1},
    }  # fmt: skip
    (folder / f"{called}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return called, len(rows[:limit])


def defined(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    found = {}
    for name in options.tasks if options.bigbench else ():
        rows = list(bigbench_rows(options.bigbench / name / "task.json"))
        found[name] = rows
    if options.sst2:
        found[SST2] = list(sst2_rows(options.sst2))
    return dict(define(folder, name, rows, options.limit) for name, rows in found.items())


def perplexity(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    tokens = tokenize(plain(options.eval_text), tokenizer)[: options.eval_tokens]
    return asdict(measure.perplexity(model, windows(tokens, 512)))


def variants(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any] | None]]:
    yield "dense", None
    for keep in options.keep if not options.screen else ():
        for method in options.methods:
            yield f"{method} {keep:g}", {"method": method, "keep": keep}


def made(settings: dict[str, Any] | None, options: argparse.Namespace) -> tuple[Any, Any]:
    """Return a variant of the model, with its tokenizer."""
    if settings is None:
        loaded = eckart.hub.load(options.model)
        return loaded.model, loaded.tokenizer
    model, _ = eckart.compress(
        options.model, of="linears", text=options.text, tokens=options.tokens,
        gradient_tokens=options.tokens // 2, dtype="float32", **settings,
    )  # fmt: skip
    return model.eval(), eckart.hub.load_tokenizer(options.model)


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure what is missing: each variant on the tasks that it lacks, or has with other samples."""
    sizes = defined(folder, options)
    known = harness.manager(list(sizes), folder)
    resumed = options.out.is_file() and not options.screen
    saved: dict[str, Any] = json.loads(options.out.read_text()) if resumed else {"rows": {}}
    for row, settings in variants(options):
        held = saved["rows"].setdefault(row, {"tasks": {}})
        had = {name: len(one["documents"]) for name, one in held["tasks"].items()}
        missing = [name for name, size in sizes.items() if had.get(name) != size]
        if not missing:
            continue
        model, tokenizer = made(settings, options)
        for name in missing:
            print(f"{row}: {name}", file=sys.stderr, flush=True)
            started = time.perf_counter()
            (found,) = harness.run(model, tokenizer, [name], known)
            seconds = round(time.perf_counter() - started, 1)
            held["tasks"][name] = asdict(found) | {"seconds": seconds}
            keep(saved, options)
        if options.eval_text is not None and "perplexity" not in held:
            held["perplexity"] = perplexity(model, tokenizer, options)
            keep(saved, options)
    return saved


def keep(saved: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what is there, unless it is only looked at."""
    if not options.screen:
        write(saved, options)


def write(saved: dict[str, Any], options: argparse.Namespace) -> None:
    saved["protocol"] = {
        "model": Path(options.model).name,
        "text": [Path(name).name for name in options.text], "tokens": options.tokens,
        "limit": options.limit, "shots": 0, "prompts": "question, answer: choices are scored, not named",
        "chosen": "tasks that the dense model does above guessing, before any compressed one was run",
    }  # fmt: skip
    saved["command"] = shlex.join([Path(sys.argv[0]).name, *(Path(one).name for one in sys.argv[1:])])
    saved["environment"] = environment.describe()
    options.out.write_text(json.dumps(saved) + "\n")


def outcomes(values: dict[str, Any]) -> Outcomes:
    figures = {name: tuple(own) for name, own in values["values"].items()}
    own = {name: value for name, value in values.items() if name != "seconds"}
    return Outcomes(**own | {"documents": tuple(values["documents"]), "values": figures})


def show(saved: dict[str, Any]) -> None:
    dense = {name: outcomes(one) for name, one in saved["rows"]["dense"]["tasks"].items()}
    for row, held in saved["rows"].items():
        found = [
            TaskResult(outcomes(one), None if row == "dense" else dense[name])
            for name, one in held["tasks"].items()
        ]
        perplexity = held.get("perplexity")
        beside = f", perplexity {perplexity['perplexity']:.2f}" if perplexity else ""
        print(f"\n{row}{beside}\n")
        print(render.markdown_table(report_tasks.columns(found), report_tasks.rows(found)))


def main() -> None:
    options = arguments()
    if not options.screen and not options.text:
        raise SystemExit("--text: name a text to calibrate on, or pass --screen")
    with tempfile.TemporaryDirectory() as folder:
        show(run(options, Path(folder)))


if __name__ == "__main__":
    main()
