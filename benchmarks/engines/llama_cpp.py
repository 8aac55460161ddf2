"""llama.cpp: its own converter, quantiser, perplexity and benchmark, built from one source tree.

The tree is the one inside the source distribution of llama-cpp-python, the only form of it that a
package index has.
"""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
import torch
from harness import Options, Row, Speed
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llama-cpp-python==0.3.36"
TOOLS = ("llama-quantize", "llama-perplexity", "llama-bench")
FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_CURL=OFF",
]  # fmt: skip
# GCC 12 takes only the first 8 bytes of a tile configuration for read and may drop the stores of the rest:
# every quantised model, the dense one too, then dies at its first product on a processor with AMX.
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
PROTOCOL = (
    "llama-perplexity: predicts the second half of each window from all before it; "
    "pytorch_perplexity is PyTorch's in float32 by the same protocol"
)


@dataclass(frozen=True, slots=True)
class Tree:
    """Where the converter and the built tools are."""

    source: Path
    tools: Path


def run(*command: object, **environment: str) -> str:
    """Run a command and return all it printed.

    Raises:
        RuntimeError: it failed; its last line is in the message.
    """
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
    )
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{Path(str(command[0])).name} ended with {done.returncode}: {last}")
    return done.stdout


def tree(options: Options) -> Tree:
    """Return the tree at options.llama_cpp, or that in the cache, fetched and built once (5 minutes)."""
    place = options.llama_cpp or options.cache.parent / "llama.cpp"
    found = _find(place)
    if found is None and options.llama_cpp:
        raise FileNotFoundError(f"{place.name} does not hold convert_hf_to_gguf.py and {', '.join(TOOLS)}")
    if found is None:
        build(fetch(place), place / "build", options.threads)
        found = _find(place)
    assert found is not None
    return found


def _find(place: Path) -> Tree | None:
    converters = sorted(place.glob("**/convert_hf_to_gguf.py"))
    benches = sorted(path for path in place.glob("**/bin/llama-bench"))
    if not (converters and benches and all((benches[0].parent / tool).is_file() for tool in TOOLS)):
        return None
    return Tree(converters[0].parent, benches[0].parent)


def fetch(place: Path) -> Path:
    """Download and unpack the source distribution; return the folder of llama.cpp in it."""
    place.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
        PACKAGE.partition("=")[0], "--dest", place, PACKAGE)  # fmt: skip
    with tarfile.open(next(place.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(place, filter="data")
    return next(place.glob("llama_cpp_python-*/vendor/llama.cpp"))


def build(source: Path, target: Path, threads: int) -> None:
    if shutil.which("cmake") is None:
        raise FileNotFoundError("cmake is needed to build llama.cpp: install it, with a C++ compiler")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    x86 = platform.machine() in ("x86_64", "AMD64") and os.name != "nt"
    no_amx = [f"-DCMAKE_{language}_FLAGS={NO_AMX}" for language in ("C", "CXX")] if x86 else []
    run("cmake", "-S", source, "-B", target, *generator, *FLAGS, *no_amx)
    run("cmake", "--build", target, "--config", "Release", "-j", threads, "--target", *TOOLS)


def convert(folder: Path, found: Tree, options: Options) -> Path:
    """Return the f16 GGUF of `folder` by llama.cpp's own converter, made once."""
    target = harness.kept_file(folder, options, "f16.gguf")
    if not target.is_file():
        partial_file = target.with_name("partial-f16.gguf")
        run(sys.executable, found.source / "convert_hf_to_gguf.py", folder, "--outtype", "f16",
            "--outfile", partial_file, PYTHONPATH=str(found.source / "gguf-py"))  # fmt: skip
        partial_file.replace(target)
    return target


def quantize(source: Path, found: Tree, options: Options) -> tuple[Path, str]:
    """Return the GGUF in options.storage, and what llama-quantize said of fallback types."""
    if options.storage == "f16":
        return source, "none"
    target = source.with_name(f"{options.storage}.gguf")
    said = run(found.tools / "llama-quantize", source, target, options.storage, options.threads)
    warned = re.search(r"\d+ of \d+ tensor\(s\) required fallback quantization", said)
    return target, warned[0] if warned else "none"


def cut_text(folder: Path, text: Path, options: Options) -> Path:
    """Write the text of the first tokens and of some more: --chunks ends it at the right one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = options.cache / "made" / "text.txt"
    found = harness.tokens(folder, text, options.tokens + 64)
    target.write_text(tokenizer.decode(found), encoding="utf-8")
    return target


def perplexity(path: Path, text: Path, found: Tree, options: Options) -> float:
    said = run(found.tools / "llama-perplexity", "-m", path, "-f", text, "-c", options.seq_len,
               "--chunks", options.tokens // options.seq_len, "-t", options.threads)  # fmt: skip
    chunks = re.search(r"over (\d+) chunks", said)
    if chunks is None or int(chunks[1]) != options.tokens // options.seq_len:
        raise RuntimeError(f"llama-perplexity did not measure {options.tokens // options.seq_len} windows")
    estimate = re.search(r"Final estimate: PPL = ([\d.]+)", said)
    if estimate is None:
        raise RuntimeError("llama-perplexity gave no estimate")
    return float(estimate[1])


def speed(path: Path, found: Tree, options: Options) -> Speed:
    prefill = _bench(path, found, options, "-p", options.prompt, "-n", 0)
    decode = _bench(path, found, options, "-p", 0, "-n", options.new_tokens, "-d", options.prompt)
    return Speed(prefill, decode)


def without_prompt(paths: list[Path], found: Tree, options: Options) -> list[float]:
    """Return the median decode speed of each model at an empty context, timed in turn."""
    test = ("-p", 0, "-n", options.new_tokens)
    seen = [[_bench(path, found, options, *test) for path in paths] for _ in range(options.repeats)]
    return [statistics.median(one) for one in zip(*seen, strict=True)]


def _bench(path: Path, found: Tree, options: Options, *test: object) -> float:
    bench = found.tools / "llama-bench"
    said = run(bench, "-m", path, "-t", options.threads, "-r", 1, "-o", "jsonl", *test)
    line = next(line for line in said.splitlines() if line.startswith("{"))
    return float(json.loads(line)["avg_ts"])


@torch.no_grad()
def second_half(folder: Path, windows: Tensor) -> float:
    """PyTorch's perplexity in float32 by the protocol of llama-perplexity."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    half = windows.shape[1] // 2
    losses = [
        functional.cross_entropy(model(input_ids=window[None]).logits[0, half:-1], window[half + 1 :])
        for window in windows
    ]
    return float(torch.stack(losses).double().mean().exp())


def rows(folders: list[Path], text: Path, options: Options) -> Iterator[Row]:
    found = tree(options)
    made = [quantize(convert(folder, found, options), found, options) for folder in folders]
    passes = [partial(speed, path, found, options) for path, _ in made]
    speeds = harness.in_turn(passes, options.repeats)
    empty = without_prompt([path for path, _ in made], found, options)
    cut, windows = cut_text(folders[0], text, options), harness.windows(folders[0], text, options)
    for folder, (path, fallback), own, alone in zip(folders, made, speeds, empty, strict=True):
        yield {
            **harness.row(
                folder,
                own,
                size=path.stat().st_size,
                size_of="GGUF file",
                perplexity=perplexity(path, cut, found, options),
            ),
            "check": {
                "protocol": PROTOCOL,
                "pytorch_perplexity": second_half(folder, windows),
                "decode_tokens_per_s_without_prompt": alone,
                "its ratio": alone / empty[0],
            },
            "fallback": fallback,
            "version": f"llama.cpp of {PACKAGE}",
        }
