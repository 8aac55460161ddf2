"""Full fine-tuning, LoRA, AdaLoRA and QLoRA on three tasks: quality, size, memory, time; kept as JSON.

    python benchmarks/adapters.py MODEL --data DIR              all runs that are not in the file yet
    python benchmarks/adapters.py MODEL --data DIR --task sst2 --seeds 0 --method lora qlora
    python benchmarks/adapters.py --show                        the tables and the plot of what is there

DIR holds sst2.{train,dev,test}.tsv (sentence, tab, 0 or 1), e2e.{valid,test}.txt (slots||sentence) and
gsm8k.{train,test}.jsonl (question, answer). Each run is a process of its own, so that its peak of memory is
its own. Finished runs are kept, and the same command goes on after an interruption, within a run from its
last evaluation. Several processes may fill one file, each with another --task, --seeds or --method.
`--precision float32` is for processors without products of bfloat16, which are many times slower there; a row
says which.

The state is chosen by the loss on held-out examples; what is reported is measured on the test file, which
nothing was chosen by. A loss is in nats per learned token.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import adapters_show
import torch

from eckart import environment, hub
from eckart.adapt import batches, difference, examples, tune
from eckart.adapt.judge import Judged, judge
from eckart.adapt.tuning import Tuning
from eckart.spectra import singular_values

RESULTS = Path("benchmarks/results/adapters.json")
METHODS = ("full", "lora", "adalora", "qlora")
TEST_BATCH = 8


@dataclass(frozen=True)
class Run:
    """One run: of what, how, and with which seed. A rate of None is the method's default."""

    task: str
    method: str
    rank: int
    seed: int
    rate: float | None = None


@dataclass(frozen=True)
class Task:
    """The protocol of one task; `learned`: examples to learn from, where the file has no split of its own.

    The steps are so many that full fine-tuning's held-out loss rises again before the end.
    """

    ranks: tuple[int, ...]
    seq_len: int
    steps: int
    evaluations: int
    held_out: int
    tested: int
    learned: int | None = None


TASKS = {
    "sst2": Task((2, 4, 8, 16, 32), 128, 120, 6, 128, 600),
    "e2e": Task((2, 8, 32), 128, 360, 12, 64, 300, 480),
    "gsm8k": Task((2, 4, 8, 32), 320, 100, 10, 24, 80, 160),
}
TASKS["rates"] = TASKS["sst2"]


def runs(task: str, seeds: list[int]) -> list[Run]:
    """All runs of a task; `rates` are those of sst2 again with another rate."""
    if task == "rates":
        return [
            Run(task, "full", 0, 0, 1e-4),
            Run(task, "lora", 8, 0, 1e-3),
        ]
    return [
        run
        for seed in (seeds if task == "sst2" else seeds[:1])
        for run in (
            Run(task, "full", 0, seed),
            *(Run(task, "lora", rank, seed) for rank in TASKS[task].ranks),
            Run(task, "adalora", 8, seed),
            Run(task, "qlora", 8, seed),
        )
    ]


def settings(run: Run, files: Path, precision: str = "bfloat16") -> tuple[Tuning, Path]:
    """Return the settings of a run and the file that it is tested on."""
    task = TASKS[run.task]
    common: dict[str, Any] = {
        "method": run.method, "rank": run.rank or 8, "seed": run.seed, "rate": run.rate, "batch": 8,
        "micro": 8, "precision": precision, "patience": 2, "tight": False, "seq_len": task.seq_len,
        "steps": task.steps, "evaluations": task.evaluations, "eval_limit": task.held_out,
    }  # fmt: skip
    if task is TASKS["sst2"]:
        parts = {part: files / f"sst2.{part}.tsv" for part in ("train", "dev", "test")}
        common |= {"task": "classification", "labels": ("negative", "positive")}
    else:
        parts = {part: files / f"{run.task}.{part}.jsonl" for part in ("train", "held", "test")}
    train, held, test = parts.values()
    return Tuning(**common, data=(str(train),), eval_data=(str(held),)), test


def prepare(data: Path, files: Path) -> None:
    """Write E2E and GSM8K as prompts with completions; held out are whole groups of equal slots."""
    for name in ("sst2.train.tsv", "sst2.dev.tsv", "sst2.test.tsv"):
        shutil.copy(data / name, files / name)
    for part, name in (("train", "e2e.valid.txt"), ("test", "e2e.test.txt")):
        rows: dict[str, list[str]] = {}
        for line in (data / name).read_text(encoding="utf-8").splitlines():
            slots, _, sentence = line.partition("||")
            rows.setdefault(slots.strip(), []).append(sentence.strip())
        # One sentence of each group, spread over the file: groups stand in the order of their slots.
        pairs = [(f"{slots}\nSentence:", f" {sentences[0]}") for slots, sentences in rows.items()]
        write_split(files, "e2e", part, spread(pairs))
    for part in ("train", "test"):
        found = map(json.loads, (data / f"gsm8k.{part}.jsonl").read_text(encoding="utf-8").splitlines())
        pairs = [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in found]
        write_split(files, "gsm8k", part, pairs)


def spread(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    return [pairs[index] for index in order]


def write_split(files: Path, task: str, part: str, pairs: list[tuple[str, str]]) -> None:
    parts = {"test": pairs}
    learned = TASKS[task].learned
    if part == "train" and learned is not None:
        size = min(learned, len(pairs) * 4 // 5)
        parts = {"train": pairs[:size], "held": pairs[size:]}
    for name, rows in parts.items():
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
        (files / f"{task}.{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(
    model: str, run: Run, data: Path, work: Path, before: dict[str, Any] | None, precision: str
) -> dict[str, Any]:
    """Do one run; return its row. `before` is what the base does on the test file, where it is known."""
    files = work / "data"
    files.mkdir(parents=True, exist_ok=True)
    prepare(data, files)
    tuning, test = settings(run, files, precision)
    loaded = hub.load(model, compute=torch.float32)
    tested = examples.read(
        replace(tuning, eval_data=(str(test),), eval_limit=TASKS[run.task].tested, seed=0), loaded.tokenizer
    )
    base = before or asdict(judged(loaded, loaded.model, tested, tuning))
    keep = {name: value.clone() for name, value in loaded.model.state_dict().items()} if spectra(run) else {}
    began = time.process_time()
    attached, found = tune.tune(
        loaded, tuning, work=work / "run", watch=say, before=lambda known: forget_peak()
    )
    cpu, peak = time.process_time() - began, status("VmHWM")
    row = {
        **asdict(run),
        "rate": tuning.starting_rate,
        "precision": precision,
        "base": base,
        "test": asdict(judged(loaded, attached.model, tested, tuning)),
        "held_out": asdict(found.end),
        "held_out_base": asdict(found.prospect.start),
        "trainable": found.prospect.trainable,
        "parameters": found.prospect.base,
        "bytes": size(attached, found.prospect.trainable, run, model, tuning),
        "peak_bytes": peak,
        "seconds_per_step": found.per_step,
        "cpu_seconds": cpu,
        "steps": found.done,
        "planned": found.prospect.steps,
        "best": found.best,
        "ended": found.ended,
        "curve": found.curve,
        "accuracy": found.accuracy,
        "ranks": dict(found.ranks),
        "quantisation_error_left": found.error,
        "examples": found.prospect.examples,
    }
    if keep:
        row["spectra"] = changes(loaded.model, keep)
        row["cut"] = cut(loaded, loaded.model, keep, tested, tuning)
    return row


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def judged(loaded: hub.Loaded, model: Any, tested: examples.Examples, tuning: Tuning) -> Judged:
    halved = tuning.precision == "bfloat16"
    return judge(
        model, tested.held_out, batches.pad_token(loaded.tokenizer), batch=TEST_BATCH,
        word_ids=tested.word_ids, around=lambda: torch.autocast("cpu", torch.bfloat16, enabled=halved),
        watch=lambda done, total: say("test", done, total),
    )  # fmt: skip


def size(attached: Any, trainable: int, run: Run, model: str, tuning: Tuning) -> int:
    """Return the bytes of what is stored: of the adapter's weight file, or of the model in float32."""
    if run.method == "full":
        return 4 * trainable
    with tempfile.TemporaryDirectory() as folder:
        tune.write_adapter(Path(folder), attached, model, tuning)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def spectra(run: Run) -> bool:
    return run.method == "full" and run.seed == 0 and run.task != "rates"


def changes(model: Any, before: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Return what full fine-tuning did to each matrix, with the spectrum of the difference."""
    found = []
    for name, after in model.state_dict().items():
        if after.ndim != 2 or name == "lm_head.weight":
            continue
        values = singular_values((after - before[name]).double())
        energy = values.square().cumsum(0) / values.square().sum()
        at = {"2": 2, "8": 8, "32": 32, **{f"{share}%": len(values) * share // 100 for share in (5, 10)}}
        shares = {f"energy_top_{what}": float(energy[rank - 1]) for what, rank in at.items()}
        found.append({**asdict(difference.changed(name, before[name], after)), **shares})
    return found


@torch.no_grad()
def cut(
    loaded: hub.Loaded, model: Any, before: dict[str, torch.Tensor], tested: examples.Examples, tuning: Tuning
) -> dict[str, Any]:
    """Return how the difference does when it is cut to low rank: all else as tuned, or as it was before."""
    after = {name: value.clone() for name, value in model.state_dict().items()}
    linear = [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    linear.remove("lm_head.weight")
    svds = {name: torch.linalg.svd(after[name] - before[name], full_matrices=False) for name in linear}
    found = {}
    for rank in (2, 8, 32, 128):
        cuts = {
            name: before[name] + (left[:, :rank] * values[:rank]) @ right[:rank]
            for name, (left, values, right) in svds.items()
        }
        for kind, others in (("linears alone", before), ("all", after)):
            model.load_state_dict({**others, **cuts})
            found[f"{rank}, {kind}"] = asdict(judged(loaded, model, tested, tuning))
    model.load_state_dict(after)
    return found


def say(stage: str, done: int, total: int) -> None:
    if done == total or (stage == "train" and done % 20 == 0):
        print(f"  {stage}: {done} of {total}", file=sys.stderr, flush=True)


def known(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.is_file() else []
    return rows


def done(out: Path, run: Run) -> bool:
    tuning, _ = settings(run, Path())
    wanted = (run.task, run.method, run.rank, run.seed, tuning.starting_rate, tuning.steps)
    keys = ("task", "method", "rank", "seed", "rate", "planned")
    return wanted in [tuple(row[key] for key in keys) for row in known(out)]


def save(out: Path, model: str, row: dict[str, Any]) -> None:
    command = environment.command()
    row = {**row, "command": command, "date": environment.describe()["date"]}
    found = {"model": Path(model).name, "rows": [*known(out), row], "environment": environment.describe()}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", nargs="+", default=["rates", "sst2", "e2e", "gsm8k"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--method", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.show:
        adapters_show.show(known(options.out), options.out)
        return
    if options.model is None or options.data is None:
        sys.exit("give MODEL and --data DIR, or --show")
    if options.one:
        run = Run(**json.loads(options.one))
        name = f".adapters-{run.task}-{run.method}-{run.rank}-{run.seed}-{run.rate or 'default'}"
        work = options.out.parent / name
        before = next((row["base"] for row in known(options.out) if row["task"] == run.task), None)
        row = measure(options.model, run, options.data, work, before, options.precision)
        save(options.out, options.model, row)
        shutil.rmtree(work, ignore_errors=True)
        return
    wanted = [run for task in options.task for run in runs(task, options.seeds)]
    for run in wanted:
        if run.method in options.method and not done(options.out, run):
            print(run, flush=True)
            again = [sys.executable, __file__, options.model, "--data", str(options.data)]
            again += ["--precision", options.precision, "--out", str(options.out)]
            again += ["--one", json.dumps(asdict(run))]
            subprocess.run(again, check=True)
    adapters_show.show(known(options.out), options.out)


if __name__ == "__main__":
    main()
