"""Perplexity at equal bytes: dense, eckart's rows and llama.cpp's files of one model; kept as JSON.

    python benchmarks/equal_bytes.py MODEL --text CALIBRATION --eval-text TEST --foreign-text OTHER ... \\
        [--llama-cpp DIR] [--rows GLOB ...]
    python benchmarks/equal_bytes.py ... --speed     memory and speed of the rows that lack them: be idle
    python benchmarks/equal_bytes.py --show          the table and the plot of what is there

A row is a file on disk, made once and kept in .cache/equal_bytes. Its perplexity is that of its weights,
computed in float32 by the protocol of eckart.measure; llama.cpp's files too (benchmarks/llamacpp.py says
how). Memory and speed are those of the file as it is run: by AutoModel on the CPU in the dtype or storage
that it has, by llama-bench; one thread, a prompt of 64 tokens, 64 tokens behind it, the median of 3.
Memory is what is resident after loading and one token, for llama.cpp the peak up to there.

Bytes are those of the weight files; a GGUF has its tokenizer inside. Seconds to make a row of eckart are of
processor time, one thread, from the dense model on; those of a GGUF are without its importance matrix.
Every row is a process of its own. Finished rows are kept, and the same command goes on after an
interruption.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import equal_bytes_show
import llamacpp
import prepared
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import eckart
from eckart import environment, healing, hub, measure, memory, mend, pipeline, recipe, windows

RESULTS = Path("benchmarks/results/equal_bytes.json")
CACHE = Path(".cache/equal_bytes")
PROMPT, NEW_TOKENS, REPEATS = 64, 64, 3
DENSE = {f"dense {dtype}": dtype for dtype in hub.DTYPES}
LLAMA = {f"llama.cpp {name}": name for name in (llamacpp.SHIPPED, *llamacpp.VARIANTS)}
ROWS: dict[str, Mapping[str, Any]] = {
    "low rank, linears 0.9": {"keep": 0.9, "of": "linears"},
    "low rank, linears 0.8": {"keep": 0.8, "of": "linears"},
    "int8": {"keep": 1.0, "storage": "int8"},
    "nf4, embeddings int8": {"keep": 1.0, "storage": "nf4-dq", "embeddings": "int8"},
    "nf4 to nearest, embeddings int8": {
        "keep": 1.0, "storage": "nf4-dq", "embeddings": "int8", "method": "svd",
    },
    **{f"nf4 + correction of rank {rank}, embeddings int8": {
        "keep": 1.0, "storage": "nf4-dq", "embeddings": "int8", "correction": "eckart",
        "correction_rank": rank,
    } for rank in (8, 16, 32)},
    "low rank 0.8 + int8": {"keep": 0.8, "of": "linears", "storage": "int8"},
    "low rank 0.9 + nf4": {
        "keep": 0.9, "of": "linears", "storage": "nf4-dq", "embeddings": "int8", "form": "factored",
    },
    "low rank 0.7 + nf4": {
        "keep": 0.7, "of": "linears", "storage": "nf4-dq", "embeddings": "int8", "form": "factored",
    },
    "size 100MB": {"size": "100MB"},
    "size 80MB": {"size": "80MB"},
    "size 65MB": {"size": "65MB"},
    "size 55MB": {"size": "55MB"},
}  # fmt: skip
"""eckart's rows: what the recipe says beyond the model and the texts."""
HEALED = {"size 65MB, healed": ("size 65MB", 40_960), "size 55MB, healed": ("size 55MB", 81_920)}
"""Rows healed through the quantiser, on so many tokens of the text that they were calibrated on."""


@dataclass(frozen=True, slots=True)
class File:
    """What a row is: a folder or a GGUF, its bytes, and how it was made."""

    path: Path
    bytes: int
    seconds: float | None
    how: dict[str, Any]


def cache(options: argparse.Namespace) -> Path:
    """Where files are kept: the rows of one JSON file share the model and the texts."""
    return CACHE / Path(options.out).stem


def kind(name: str) -> str:
    return "dense" if name in DENSE else "llama.cpp" if name in LLAMA else "eckart"


def make(options: argparse.Namespace, name: str) -> File:
    """Make the file of row `name`, in place of an earlier one."""
    own = {"dense": dense, "llama.cpp": peer, "eckart": healed if name in HEALED else compressed}
    return own[kind(name)](options, name, folder(options, name))


def folder(options: argparse.Namespace, name: str) -> Path:
    return cache(options) / re.sub("[^A-Za-z0-9._]+", "-", name)


def dense(options: argparse.Namespace, name: str, out: Path) -> File:
    loaded = hub.load(options.model, compute=hub.dtype(DENSE[name]))
    eckart.save(loaded.model, loaded.tokenizer, out, overwrite=True)
    return File(out, hub.weight_bytes(out), None, {"dtype": DENSE[name]})


def peer(options: argparse.Namespace, name: str, out: Path) -> File:
    tools, words = llamacpp.find(options.llama_cpp), Path(options.text[0])
    made = llamacpp.make(
        LLAMA[name], tools, Path(options.model), words, options.tokens, options.seq_len, out.parent
    )
    how = {"types": made.types, "fallbacks": made.fallbacks, "version": llamacpp.version(tools)}
    header = llamacpp.header_bytes(tools, Path(options.model), out.parent)
    return File(made.path, made.path.stat().st_size, made.seconds, {**how, "header_bytes": header})


def compressed(options: argparse.Namespace, name: str, out: Path) -> File:
    """All rows share what does not depend on the recipe: statistics and decompositions, made once."""
    common = prepared.base(options.model, options.text, options.eval_text, options.tokens, options.seq_len)
    ready, before = prepared.made(common, out.with_name("prepared.pt"))
    own = recipe.from_mapping({**common, **ROWS[name]})
    state, start = out.with_name(f"{out.name}.state"), time.process_time()
    model, result = pipeline.finish(own, ready, mend.Ward(state, out.with_name("teacher")))
    seconds = before + time.process_time() - start
    eckart.save(model, ready.loaded.tokenizer, out, result, overwrite=True)
    shutil.rmtree(state, ignore_errors=True)
    how = {"recipe": ROWS[name], "stages": result.seconds, **chosen(out)}
    return File(out, hub.weight_bytes(out), seconds, how)


def chosen(folder: Path) -> dict[str, Any]:
    """What the report in `folder` says of the choice: the estimated loss, and the matrices of each form."""
    report = json.loads((folder / "eckart.json").read_text())
    kinds = Counter((module["form"], module["name"].rsplit(".", 1)[-1]) for module in report["modules"])
    forms: dict[str, dict[str, int]] = {}
    for (form, name), count in sorted(kinds.items()):
        forms.setdefault(form, {})[name] = count
    return {"predicted": report["predicted_increase"], "forms": forms}


def healed(options: argparse.Namespace, name: str, out: Path) -> File:
    """Heal the folder of the row that was not, which must be there."""
    base, tokens = HEALED[name]
    source, start = folder(options, base), time.process_time()
    settings = healing.from_mapping({"tokens": tokens}, name)
    model, done = eckart.heal(
        source, options.model, options.text, settings=settings, work=out.with_name(f"{out.name}.state"),
        watch=prepared.print_progress,
    )  # fmt: skip
    before = known(options.out)["rows"][base]["seconds"]
    seconds = before + time.process_time() - start
    eckart.save(model, hub.load_tokenizer(options.model), out, done, source=source, overwrite=True)
    shutil.rmtree(out.with_name(f"{out.name}.state"), ignore_errors=True)
    return File(out, hub.weight_bytes(out), seconds, {"healed": base, "tokens": tokens})


def quality(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The perplexities of the weights at `path` in float32."""
    loaded = hub.load(str(path), compute=torch.float32)
    wanted = recipe.from_mapping(
        {
            "keep": 1.0, "eval_text": options.eval_text, "foreign_text": options.foreign_text,
            "eval_tokens": options.eval_tokens, "seq_len": options.seq_len,
        }
    )  # fmt: skip
    texts = windows.read(wanted, loaded.tokenizer, [])
    assert texts.held_out is not None
    own = measure.perplexity(loaded.model, texts.held_out)
    found = {"perplexity": own.perplexity, "loss_standard_error": own.standard_error}
    if texts.foreign is not None:
        found["foreign"] = measure.perplexity(loaded.model, texts.foreign).perplexity
    return found


def measured(options: argparse.Namespace, name: str) -> dict[str, Any]:
    file = make(options, name)
    row: dict[str, Any] = {
        "file": file.path.name, "bytes": file.bytes, "seconds": file.seconds, "how": file.how,
    }  # fmt: skip
    if kind(name) != "llama.cpp":
        return row | quality(options, file.path)
    tools = llamacpp.find(options.llama_cpp)
    with llamacpp.as_float(tools, file.path, cache(options)) as path:
        return row | quality(options, path)


def timed(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Memory and speed of the file of row `name`, which is made again where it is gone."""
    path = cache(options) / known(options.out)["rows"][name]["file"]
    path = path if path.exists() else make(options, name).path
    if kind(name) == "llama.cpp":
        tools = llamacpp.find(options.llama_cpp)
        speeds = llamacpp.speed(tools, path, PROMPT, NEW_TOKENS, REPEATS)
        return {"resident": llamacpp.resident(tools, path), "resident_before": 0, **speeds}
    before, model, after = load(path)
    return {"resident": after, "resident_before": before, **speed(model)}


@torch.no_grad()
def load(path: Path) -> tuple[int, Any, int]:
    """Load as a user does; return the model between the resident bytes before, code loaded, and after."""
    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(path))]  # imports the code
    before = memory.Watermark(torch.device("cpu")).resting
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    model(input_ids=torch.tensor([[1]]))
    return before, model, memory.Watermark(torch.device("cpu")).resting


def speed(model: Any) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, PROMPT), generator=generator)
    once(model, prompt, 2)
    passes = [once(model, prompt, NEW_TOKENS) for _ in range(REPEATS)]
    return {"prefill": [one[0] for one in passes], "decode": [one[1] for one in passes]}


@torch.no_grad()
def once(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Return tokens per second of the prompt (1, n) and of the greedy tokens behind it."""
    cache = DynamicCache(config=model.config)

    def following(ids: Tensor) -> Tensor:
        made = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token: Tensor = made.logits[:, -1].argmax(-1, keepdim=True)
        return token

    start = time.perf_counter()
    token = following(prompt)
    middle = time.perf_counter()
    for _ in range(new_tokens):
        token = following(token)
    end = time.perf_counter()
    return prompt.numel() / (middle - start), new_tokens / (end - middle)


def protocol(options: argparse.Namespace) -> dict[str, Any]:
    """What every row of one file must share."""
    texts = {
        key: [Path(f).name for f in getattr(options, key)] for key in ("text", "eval_text", "foreign_text")
    }
    numbers = {key: getattr(options, key) for key in ("tokens", "eval_tokens", "seq_len")}
    return {"model": Path(options.model).name, **texts, **numbers}


def known(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"rows": {}}
    return found


def keep(options: argparse.Namespace, name: str, values: dict[str, Any]) -> None:
    """Put `values` into row `name` of the JSON file."""
    found = known(options.out)
    made = {"date": environment.describe()["date"], "command": options.command}
    rows = found["rows"]
    rows[name] = {"kind": kind(name), **rows.get(name, {}), **values, **made}
    found = {"protocol": protocol(options), "rows": rows, "environment": environment.describe()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(options.out)


def wanted(options: argparse.Namespace) -> list[str]:
    """The rows that are asked for and not there, those without memory and speed where these are asked for."""
    rows = known(options.out)["rows"]
    names = [*DENSE, *(LLAMA if options.llama_cpp else ()), *ROWS, *HEALED]
    names = [name for name in names if any(fnmatch(name, glob) for glob in options.rows)]
    if options.speed:
        return [name for name in names if name in rows and "decode" not in rows[name]]
    return [name for name in names if name not in rows]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", nargs="+")
    parser.add_argument("--eval-text", nargs="+")
    parser.add_argument("--foreign-text", nargs="+", default=[], help="texts of other kinds to measure on")
    parser.add_argument("--llama-cpp", type=Path, help="a folder with llama.cpp's tools; MODEL is a GGUF")
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs on the names of rows")
    parser.add_argument("--tokens", type=int, default=32_768, help="to calibrate on")
    parser.add_argument("--eval-tokens", type=int, default=24_576)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.show and not (options.model and options.text and options.eval_text):
        parser.error("give MODEL, --text and --eval-text, or --show")
    words = sys.argv[: sys.argv.index("--one")] if options.one else sys.argv
    paths = [Path(word).is_absolute() or Path(word).exists() for word in words]
    options.command = [
        Path(word).name if is_path else word for word, is_path in zip(words, paths, strict=True)
    ]
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    if options.one:
        cache(options).mkdir(parents=True, exist_ok=True)
        keep(options, options.one, (timed if options.speed else measured)(options, options.one))
        return
    if not options.show:
        found = known(options.out).get("protocol", protocol(options))
        if found != protocol(options):
            sys.exit(f"{options.out} was made with another protocol: {found}; choose another --out")
        for name in wanted(options):
            print(name, flush=True)
            subprocess.run([sys.executable, *sys.argv, "--one", name], check=True)
    equal_bytes_show.show(known(options.out)["rows"], options.out)


if __name__ == "__main__":
    main()
