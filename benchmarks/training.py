"""Low rank before, during and after training, at equal steps and equal parameters; kept as JSON.

    python benchmarks/training.py --text TRAIN.txt --eval-text TEST.txt           all runs that are missing
    python benchmarks/training.py --text TRAIN.txt --eval-text TEST.txt --ways full preset --seeds 0
    python benchmarks/training.py --show                                          the table of what is there

A small language model is trained on a text for a minute or two on one core, in ways that end with the same
share of its linear maps. All take the same steps on the same tokens in the same order. Finished runs are
kept, and the same command goes on after an interruption. Seconds are of the processor, so that another
process beside counts little. `--ways galore` needs the package galore-torch. `--shape 10M` is a larger model,
which needs hours to learn more than which tokens are frequent.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import training_show
from transformers import LlamaConfig, TrainerCallback

import eckart
from eckart import environment, hub, models, text
from eckart.adapt import trainer, tune
from eckart.adapt.tuned import Tuned
from eckart.adapt.tuning import Tuning
from eckart.factors import Form
from eckart.scratch import preset, tokens
from eckart.scratch.decay import FrobeniusDecay
from eckart.scratch.persuasion import Persuasion
from eckart.scratch.preset import Structure
from eckart.scratch.switch import Switch

RESULTS = Path("benchmarks/results/training.json")
HEADS = 4


@dataclass(frozen=True)
class Shape:
    """A model, and how long it is trained."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    steps: int
    batch: int
    seq_len: int
    eval_windows: int
    rate: float
    differences: int
    """Rank of what blocks have on top of shared matrices."""


SHAPES = {
    "0.9M": Shape(1024, 128, 352, 4, 600, 4, 64, 96, 3e-3, 20),
    "10M": Shape(4096, 256, 704, 11, 400, 2, 128, 32, 1e-3, 37),
}
DECAY = 0.1
KEEPS = (0.5, 0.25)
PENALTY: dict[str, Any] = {"kind": "tail", "strength": 0.01, "schedule": "linear", "every": 10}
AFTER: tuple[tuple[str, Form], ...] = (("svd", "factored"),)
GALORE = "rank=32,update_proj_gap=50,scale=0.25"
PROTOCOL = {
    "shapes": {name: asdict(shape) for name, shape in SHAPES.items()}, "heads": HEADS,
    "weight_decay": DECAY, "penalty": PENALTY, "galore": GALORE,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run: of which model, which way, to which share of the linear maps, with which seed and rate."""

    shape: str
    way: str
    keep: float
    seed: int
    rate: float

    @property
    def of(self) -> Shape:
        return SHAPES[self.shape]


SHARING = {
    "shared": {0.5: "every:2", 0.25: "every:4"},
    "differences": {0.5: "every:4"},
}
"""Groups of blocks that share all matrices, by what remains."""


WAYS: dict[str, tuple[float, ...]] = {
    "full": (1.0,),
    "preset": KEEPS,
    "warm": KEEPS,
    "persuaded": KEEPS,
    "shared": KEEPS,
    "differences": (0.5,),
    "narrow": KEEPS,
    "penalised": (1.0,),
    "factor decay": (0.25,),
    "galore": (1.0,),
    "untied": (1.0,),
}
"""What each is: training_show.WORDS."""


def config(shape: Shape, tied: bool = True) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=shape.seq_len, initializer_range=shape.width**-0.5,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def structure(keep: float) -> Structure:
    return Structure(keep=keep, of="linears")


def parameters(shape: Shape, keep: float) -> int:
    with torch.device("meta"):
        model = preset.build(config(shape))
    whole = models.parameter_count(model)
    linears = sum(target.size for target in models.targets(model))
    return whole - linears + int(keep * linears)


def narrow(shape: Shape, keep: float) -> Shape:
    """Return a dense shape, as deep, with as many parameters in all as `keep` of the linear maps leaves."""
    width = round(shape.width * keep**0.5 / (4 * HEADS)) * 4 * HEADS
    fixed = shape.vocabulary * width + shape.layers * (4 * width**2 + 2 * width) + width
    rest = parameters(shape, keep) - fixed
    return replace(shape, width=width, hidden=rest // (shape.layers * 3 * width))


def model_for(run: Run) -> Any:
    shape = narrow(run.of, run.keep) if run.way == "narrow" else run.of
    model = preset.build(config(shape, tied=run.way != "untied"), seed=run.seed)
    if run.way in SHARING:
        rank = shape.differences if run.way == "differences" else 0
        groups = SHARING[run.way][run.keep]
        return eckart.share(model, groups, differences=rank, start="first", seed=run.seed)[0].train()
    return preset.factorize(model, structure(run.keep)) if run.way in ("preset", "factor decay") else model


class Meter(TrainerCallback):  # type: ignore[misc]
    """Seconds of the processor in each step, and the bytes of the optimizer's state in the end."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.began, self.bytes = 0.0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.steps.append(time.process_time() - self.began)
        if state.global_step == state.max_steps:
            found = [value for one in optimizer.state.values() for value in one.values()]
            found += [getattr(value, "ortho_matrix", None) for value in found]
            self.bytes = sum(value.nbytes for value in found if isinstance(value, torch.Tensor))


def settings(run: Run, train: Path, test: Path) -> Tuning:
    made = Tuning(
        method="full", data=(str(train),), eval_data=(str(test),), steps=run.of.steps, batch=run.of.batch,
        micro=run.of.batch,
        seq_len=run.of.seq_len, rate=run.rate, warmup=0.1, weight_decay=DECAY, evaluations=4, patience=99,
        eval_limit=run.of.eval_windows, tight=False, precision="float32", seed=run.seed,
    )  # fmt: skip
    if run.way in ("persuaded", "penalised"):
        keep = run.keep if run.way == "persuaded" else KEEPS[-1]
        until = run.of.steps // 2 if run.way == "persuaded" else None
        made = replace(made, penalty=Persuasion(**PENALTY, keep=keep, until=until))
    if run.way == "galore":
        made = replace(made, optimizer="galore_adamw", optimizer_args=GALORE, weight_decay=0.0)
    return made


def callbacks(run: Run) -> list[Any]:
    found: list[Any] = [] if run.way == "factor decay" else [FrobeniusDecay()]
    if run.way in ("warm", "persuaded"):
        found.append(Switch(structure(run.keep), run.of.steps // 2))
    return found


def trained(run: Run, train: Path, test: Path, tokenizer: Any) -> tuple[hub.Loaded, Tuned, Meter, float]:
    loaded = hub.Loaded(model_for(run), tokenizer, run.way, torch.float32, None)
    meter, began = Meter(), time.process_time()
    with tempfile.TemporaryDirectory() as work:
        _, found = tune.tune(
            loaded, settings(run, train, test), work=Path(work), callbacks=[*callbacks(run), meter]
        )
    return loaded, found, meter, time.process_time() - began


def measure(run: Run, train: Path, test: Path, tokenizer: Any) -> dict[str, Any]:
    """Do one run; return its row."""
    loaded, found, meter, seconds = trained(run, train, test, tokenizer)
    steps = sorted(meter.steps)
    row: dict[str, Any] = {
        **asdict(run),
        "loss": found.end.loss,
        "best": found.best,
        "curve": found.curve,
        "parameters": models.parameter_count(loaded.model),
        "seconds_per_step": steps[len(steps) // 2],
        "seconds": sum(meter.steps),
        "all_seconds": seconds,
        "optimizer_bytes": meter.bytes,
    }
    if found.decline is not None:
        row["decline"] = spectra(found.decline)
    if run.way in ("full", "penalised"):
        row["after"] = after(loaded, run, train, test)
    if run.way == "untied":
        row["tied"] = tied(loaded, run, train, test)
    return row


def tied(loaded: hub.Loaded, run: Run, train: Path, test: Path) -> list[dict[str, Any]]:
    """Return what one matrix for embeddings and head, fitted to both, leaves without any more training."""
    rows = []
    for method in ("svd", "eckart"):
        model, found = eckart.tie(
            copy.deepcopy(loaded.model), method=method, text=None if method == "svd" else str(train),
            tokenizer=loaded.tokenizer, seq_len=run.of.seq_len, tokens=8_192, gradient_tokens=4_096,
        )  # fmt: skip
        loss = judged(model, loaded.tokenizer, run, train, test)
        rows.append({"method": method, "loss": loss, "parameters": found.parameters[1]})
    return rows


def spectra(decline: Any) -> list[dict[str, float]]:
    """Return the means over the matrices at each step that they were noted at."""
    means = []
    for entry in decline["steps"]:
        ones = list(entry["matrices"].values())
        means.append(
            {"step": entry["step"], **{key: sum(one[key] for one in ones) / len(ones) for key in ones[0]}}
        )
    return means


def after(loaded: hub.Loaded, run: Run, train: Path, test: Path) -> list[dict[str, Any]]:
    """Return what compression after training leaves, without any more training."""
    weights = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    rows = []
    for method, form in AFTER:
        for keep in KEEPS:
            model = preset.build(config(run.of))
            model.load_state_dict(weights)
            model, _ = eckart.compress(
                model, keep=keep, of="linears", method=method, form=form, tokenizer=loaded.tokenizer,
                text=None if method == "svd" else str(train), seq_len=run.of.seq_len, tokens=8_192,
                gradient_tokens=4_096,
            )  # fmt: skip
            loss = judged(model, loaded.tokenizer, run, train, test)
            rows.append({"keep": keep, "method": method, "form": form, "loss": loss,
                         "parameters": models.parameter_count(model)})  # fmt: skip
    return rows


def judged(model: Any, tokenizer: Any, run: Run, train: Path, test: Path) -> float:
    from eckart.adapt import batches, examples, judge

    found = examples.read(settings(run, train, test), tokenizer)
    pad = batches.pad_token(tokenizer)
    return judge.judge(model, found.held_out, pad, batch=run.of.batch).loss


def known(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.is_file() else []
    return rows


def done(out: Path, run: Run) -> bool:
    return any(all(row[key] == value for key, value in asdict(run).items()) for row in known(out))


def save(out: Path, row: dict[str, Any]) -> None:
    command = environment.command()
    row = {**row, "command": command, "date": environment.describe()["date"]}
    found = {"protocol": PROTOCOL, "rows": [*known(out), row], "environment": environment.describe()}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default=next(iter(SHAPES)))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", help="default: that of the shape")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.show:
        training_show.show(known(options.out), {name: shape.rate for name, shape in SHAPES.items()})
        return
    if options.text is None or options.eval_text is None:
        sys.exit("give --text FILE and --eval-text FILE, or --show")
    if "galore" in options.ways:
        trainer.check_optimizer("galore_adamw")
    tokenizer = tokens.train([text.plain(options.text)], SHAPES[options.shape].vocabulary)
    wanted = [
        Run(options.shape, way, keep, seed, rate)
        for seed in options.seeds
        for rate in options.rates or [SHAPES[options.shape].rate]
        for way in options.ways
        for keep in WAYS[way]
    ]
    for run in wanted:
        if not done(options.out, run):
            print(run, file=sys.stderr, flush=True)
            row = measure(run, options.text, options.eval_text, tokenizer)
            print(f"  loss {row['loss']:.4f}, {row['seconds']:.0f} s", file=sys.stderr, flush=True)
            save(options.out, row)
    training_show.show(known(options.out), {name: shape.rate for name, shape in SHAPES.items()})


if __name__ == "__main__":
    main()
