"""Exported models against PyTorch: bytes, perplexity, prefill and decode tokens per second, all in turn.

    python benchmarks/exports.py MODEL SMALLER ... --text FILE --out benchmarks/results/exports.json

MODEL is a .gguf file or a folder, and the reference of the ratios; SMALLER are compressed folders. All are
run in float32, and each is exported by eckart to each engine and storage, once, into --work. Then, storage by
storage, every engine and every model in one process runs one pass after another (a prompt, tokens behind it),
in rounds of alternating order, until --runs rounds are there. PyTorch runs in float32, fused (eckart.fuse),
eager and compiled (torch.compile, a static cache), beside every storage: what int8 is compared with is in the
same rounds. A ratio is that to MODEL in the same engine and storage, with the quartiles of the ratios of
single rounds.

What is finished is in the JSON, and the same command goes on after an interruption: exports and perplexities
one by one, rounds by --chunk.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, StaticCache

import eckart
from eckart import environment, hub, render, text
from eckart.exports.options import ONNX, OPENVINO
from eckart.speed.decoding import cache_word
from eckart.speed.options import FEWEST_RUNS, Rounds
from eckart.speed.spread import Spread, quotient
from eckart.speed.timing import in_turn, load_average

EAGER, COMPILED = "PyTorch eager", "PyTorch compiled"
ENGINES = {ONNX: "onnxruntime", OPENVINO: "OpenVINO"}
STORAGES = ("float32", "int8", "int4")
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
COLUMNS = (
    "storage", "engine", "model", "MB", "perplexity", "prefill tokens/s", "to the first (quartiles)",
    "decode tokens/s", "to the first (quartiles)",
)  # fmt: skip


class Runs(Protocol):
    """What takes tokens and keeps a cache of its own."""

    def reset(self) -> None:
        """Forget the tokens fed so far."""

    def feed(self, ids: Tensor, every: bool = False) -> Tensor:
        """Append `ids` (n,); return the logits of the last one, or of every one."""


@dataclass(slots=True)
class Eager:
    """A model of transformers with the cache that it grows."""

    model: Any
    cache: Any = None

    def reset(self) -> None:
        self.cache = DynamicCache(config=self.model.config)

    def feed(self, ids: Tensor, every: bool = False) -> Tensor:
        word = cache_word(self.model)
        keep = 0 if every else 1
        made = self.model(input_ids=ids[None], use_cache=True, logits_to_keep=keep, **{word: self.cache})
        logits: Tensor = made.logits[0]
        return logits


@dataclass(slots=True)
class Compiled:
    """A model of transformers compiled, with a static cache of `room` tokens."""

    model: Any
    room: int
    cache: Any = field(init=False)
    run: Any = field(init=False)

    def __post_init__(self) -> None:
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.room)
        self.run = self.model
        with torch.no_grad():  # the cache makes its tensors at the first call, which is not to be compiled
            self.feed(torch.tensor([0, 1]))
        self.run = torch.compile(self.model, dynamic=False, fullgraph=True)

    def reset(self) -> None:
        self.cache.reset()

    def feed(self, ids: Tensor, every: bool = False) -> Tensor:
        word = cache_word(self.model)
        keep = 0 if every else 1
        made = self.run(input_ids=ids[None], use_cache=True, logits_to_keep=keep, **{word: self.cache})
        logits: Tensor = made.logits[0]
        return logits


@torch.no_grad()
def one_pass(runs: Runs, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Return tokens per second of the prompt (n,), and of the greedy tokens behind the first one."""
    runs.reset()
    start = time.perf_counter()
    token = runs.feed(prompt)[-1].argmax()[None]
    middle = time.perf_counter()
    for _ in range(new_tokens):
        token = runs.feed(token)[-1].argmax()[None]
    end = time.perf_counter()
    return len(prompt) / (middle - start), new_tokens / (end - middle)


@torch.no_grad()
def perplexity(runs: Runs, windows: Tensor) -> float:
    """The protocol of eckart.measure: each window alone, all its tokens but the first."""
    losses = []
    for window in windows:
        runs.reset()
        logits = runs.feed(window, every=True)[:-1].float()
        losses.append(functional.cross_entropy(logits, window[1:]).double())
    return float(torch.stack(losses).mean().exp())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="the reference first")
    parser.add_argument(
        "--text", type=Path, required=True, help="to measure perplexity on, and of the prompt"
    )
    parser.add_argument("--tokens", type=int, default=6144, help="of the text, for the perplexity (6144)")
    parser.add_argument("--seq-len", type=int, default=512, help="of its windows (512)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt that is timed (128)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded behind it (32)")
    parser.add_argument("--runs", type=int, default=30, help="rounds (30)")
    parser.add_argument("--chunk", type=int, default=5, help="rounds between two times of saving (5)")
    parser.add_argument("--storage", nargs="+", default=list(STORAGES), choices=STORAGES)
    parser.add_argument("--engine", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--block", type=int, default=32, help="weights with a common scale (32)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path(".cache/exports"), help="where exports are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exports.json"))
    options = parser.parse_args()
    names = [path.stem for path in options.models]
    if len(set(names)) < len(names):
        parser.error("two models have the same name, which is what rows are told apart by")
    if options.chunk < FEWEST_RUNS or options.runs < FEWEST_RUNS:
        parser.error(f"--runs and --chunk: at least {FEWEST_RUNS}, else there are no quartiles")
    return options


class Results:
    """The JSON file: what was measured so far, by the protocol of this command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path = options.out
        taken = ("tokens", "seq_len", "prompt", "new_tokens", "block", "threads")
        protocol = {name: getattr(options, name) for name in taken}
        protocol |= {"models": [path.stem for path in options.models], "text": options.text.name}
        if self.path.is_file():
            self.values = json.loads(self.path.read_text())
            if self.values["protocol"] != protocol:
                sys.exit(
                    f"{self.path} was made by another protocol, {self.values['protocol']}: another --out"
                )
            return
        self.values = {"protocol": protocol, "exports": {}, "perplexity": {}, "rounds": {}}

    def save(self) -> None:
        command = environment.command()
        found = environment.describe()
        found["versions"] |= {name: metadata.version(name) for name in PACKAGES}
        values = {**self.values, "command": command, "load_average": load_average(), "environment": found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = self.path.with_suffix(".partial")
        partial_file.write_text(json.dumps(values, indent=1) + "\n")
        partial_file.replace(self.path)


def key(storage: str, engine: str, model: str) -> str:
    return f"{storage}/{engine}/{model}"


def exported(options: argparse.Namespace, results: Results) -> None:
    """Write what is not there yet; keep the report of each, its check among it."""
    for source in options.models:
        for target in options.engine:
            for storage in options.storage:
                out = folder(options, source, target, storage)
                name = key(storage, ENGINES[target], source.stem)
                if not out.is_dir():
                    say(f"export {name}")
                    blocks = None if storage == "float32" else options.block
                    eckart.export(
                        source, out, target, storage=storage, block=blocks, cache=options.work / "traced"
                    )
                report = json.loads((out / "eckart.json").read_text())
                results.values["exports"][name] = {
                    part: report[part] for part in ("bytes", "parameters", "check", "tolerance", "engine")
                }
    results.save()


def folder(options: argparse.Namespace, source: Path, target: str, storage: str) -> Path:
    block = "" if storage == "float32" else f"-{options.block}"
    found: Path = options.work / source.stem / f"{target}-{storage}{block}"
    return found


def say(what: str) -> None:
    print(f"  {what}", file=sys.stderr, flush=True)


def subjects(options: argparse.Namespace, models: dict[str, Any], storage: str) -> dict[str, Runs]:
    """Return what runs in one group of rounds, by key: PyTorch in float32, the engines in `storage`."""
    found: dict[str, Runs] = {}
    room = max(options.seq_len, options.prompt + options.new_tokens + 1)
    for name, model in models.items():
        found[key("float32", EAGER, name)] = Eager(model)
        if not options.no_compile:
            found[key("float32", COMPILED, name)] = Compiled(model, room)
    for source in options.models:
        for target in options.engine:
            out = folder(options, source, target, storage)
            found[key(storage, ENGINES[target], source.stem)] = eckart.open_export(out, options.threads)
    return found


def measure_perplexities(found: dict[str, Runs], windows: Tensor, results: Results) -> None:
    done = results.values["perplexity"]
    for name, runs in found.items():
        # Compiling changes the order of sums alone, and would take a graph of its own for every window.
        if name not in done and not isinstance(runs, Compiled):
            say(f"perplexity {name}")
            done[name] = perplexity(runs, windows)
            results.save()


def measure_rounds(
    found: dict[str, Runs], prompt: Tensor, storage: str, options: argparse.Namespace, results: Results
) -> None:
    done: dict[str, list[list[float]]] = results.values["rounds"].setdefault(storage, {})
    tasks: dict[str, Callable[[], tuple[float, float]]] = {
        name: partial(one_pass, runs, prompt, options.new_tokens) for name, runs in found.items()
    }
    while (count := min((len(done.get(name, ())) for name in tasks), default=0)) < options.runs:
        say(f"{storage}: {count} of {options.runs} rounds")
        left = max(FEWEST_RUNS, min(options.chunk, options.runs - count))
        for name, passes in in_turn(tasks, Rounds(left, warmup=1)).items():
            done[name] = [*done.get(name, ()), *map(list, passes)]
        results.save()


def rows(results: Results, models: list[str]) -> Iterator[list[str]]:
    for storage, rounds in results.values["rounds"].items():
        for name in sorted(rounds, key=lambda one: (one.split("/")[1], models.index(one.split("/")[2]))):
            own, engine, model = name.split("/")
            first = rounds[key(own, engine, models[0])]
            yield [
                storage if own == storage else f"float32, beside {storage}",
                engine,
                model,
                size(results, name),
                number(results.values["perplexity"].get(name), "{:.2f}"),
                *rates(rounds[name], first, 0),
                *rates(rounds[name], first, 1),
            ]


def size(results: Results, name: str) -> str:
    """Return the MB of graph and weights, of PyTorch those of the parameters in float32."""
    exports, model = results.values["exports"], name.split("/")[2]
    if name in exports:
        return f"{exports[name]['bytes'][1] / 1e6:.1f}"
    counts = [found["parameters"] for other, found in exports.items() if other.split("/")[2] == model]
    return f"{4 * counts[0] / 1e6:.1f}"


def number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def rates(own: list[list[float]], first: list[list[float]], place: int) -> list[str]:
    """Return the median, and the ratio to the first model with the quartiles of the rounds."""
    mine, theirs = (Spread(tuple(each[place] for each in passes)) for passes in (own, first))
    if own is first:
        return [f"{mine.median:.1f}", ""]
    ratio = quotient(mine, theirs)
    return [f"{mine.median:.1f}", f"{ratio.value:.3f} ({ratio.lower:.3f} to {ratio.upper:.3f})"]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    # Two graphs a model; beyond a limit torch would run eager and not say so.
    torch._dynamo.config.recompile_limit = 8 * len(options.models)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    results = Results(options)
    exported(options, results)
    gc.collect()
    loaded = {path.stem: hub.load(str(path), compute=torch.float32) for path in options.models}
    tokenizer = next(iter(loaded.values())).tokenizer
    ids = text.tokenize(text.read(options.text, tokenizer), tokenizer)[: options.tokens]
    windows = text.windows(ids, options.seq_len)
    models = {name: eckart.fuse(one.model) for name, one in loaded.items()}
    for storage in options.storage:
        found = subjects(options, models, storage)
        measure_perplexities(found, windows, results)
        measure_rounds(found, ids[: options.prompt], storage, options, results)
        del found
        gc.collect()
    print(render.markdown_table(COLUMNS, list(rows(results, list(models)))))


if __name__ == "__main__":
    main()
