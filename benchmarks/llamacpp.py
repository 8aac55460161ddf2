"""llama.cpp's files of a model: made, measured by eckart's own protocol, and timed by llama-bench.

    python benchmarks/llamacpp.py --llama-cpp DIR --text TEST --variant Q4_K_M

Every file is quantised from an F32 GGUF, to which the source is decoded once. Its perplexity is that of its
weights: llama-quantize decodes it to F32 again, transformers computes in float32 on windows of
eckart.measure. What llama.cpp adds at run time, activations rounded to 8 bits in blocks of 32, is not in
it. The command above shows how much that is: it measures one file by llama-perplexity, and the same
weights in PyTorch by the protocol of llama-perplexity, which predicts the second half of each window.

An importance matrix is of the first tokens of the calibration text, as many as eckart calibrates on.
DIR holds llama-quantize, llama-imatrix, llama-perplexity and llama-bench in one folder at any depth; how
they are built stands in benchmarks/engines/llama_cpp.py, to whose targets llama-imatrix is added.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import smollm2
import torch
from torch import Tensor
from torch.nn import functional

from eckart import hub, text

TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")
SHIPPED = "as shipped"


@dataclass(frozen=True, slots=True)
class Variant:
    """A file: the type that llama-quantize is asked for, with an importance matrix or without."""

    type: str
    importance: bool = False
    options: tuple[str, ...] = ()


# The smallest types come in blocks of 256 columns. Where a matrix has another width, llama-quantize falls
# back to a larger type, so that a file may be far above what its name says. What is smaller needs a smaller
# table of embeddings, and in the end Q2_0, in blocks of 64, meant for models trained in it.
TABLE = ("--output-tensor-type", "iq4_nl", "--token-embedding-type", "iq4_nl")
Q2_0 = ("--tensor-type", "ffn_gate=q2_0", "--tensor-type", "ffn_up=q2_0")
VARIANTS = {
    "F16": Variant("F16"),
    "Q8_0": Variant("Q8_0"),
    "Q4_K_M": Variant("Q4_K_M"),
    "Q3_K_M": Variant("Q3_K_M"),
    "Q2_K": Variant("Q2_K"),
    "Q4_K_M imatrix": Variant("Q4_K_M", True),
    "Q3_K_M imatrix": Variant("Q3_K_M", True),
    "Q2_K imatrix": Variant("Q2_K", True),
    "IQ3_XXS imatrix": Variant("IQ3_XXS", True),
    "IQ4_NL pure imatrix": Variant("IQ4_NL", True, ("--pure",)),
    "Q4_K_M imatrix, table IQ4_NL": Variant("Q4_K_M", True, TABLE),
    "Q3_K_M imatrix, table IQ4_NL": Variant("Q3_K_M", True, TABLE),
    "IQ3_XXS imatrix, table IQ4_NL": Variant("IQ3_XXS", True, TABLE),
    "IQ2_M imatrix, table IQ4_NL": Variant("IQ2_M", True, TABLE),
    "IQ1_S imatrix, table IQ4_NL": Variant("IQ1_S", True, TABLE),
    "IQ2_M imatrix, table IQ4_NL, gate and up Q2_0": Variant("IQ2_M", True, (*TABLE, *Q2_0)),
}


@dataclass(frozen=True, slots=True)
class Made:
    """A file of llama-quantize: the matrices of each type, and the seconds it took, if it was made."""

    path: Path
    types: dict[str, int]
    fallbacks: int
    seconds: float | None


def run(*command: object) -> str:
    """Run a command and return all it printed.

    Raises:
        RuntimeError: it failed; its last line is in the message.
    """
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    )  # fmt: skip
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{Path(str(command[0])).name} ended with {done.returncode}: {last}")
    return done.stdout


def find(folder: Path) -> Path:
    """Return the folder of the tools in `folder`.

    Raises:
        FileNotFoundError: they are not there.
    """
    for quantize in sorted(folder.glob("**/llama-quantize")):
        if all((quantize.parent / tool).is_file() for tool in TOOLS):
            return quantize.parent
    raise FileNotFoundError(f"{folder} does not hold {', '.join(TOOLS)} in one folder: build them")


def version(tools: Path) -> str:
    """Return what llama-bench says of its build."""
    found = re.search(r"version: (.*)", run(tools / "llama-bench", "--version"))
    return "llama.cpp of an unknown version" if found is None else f"llama.cpp {found[1]}"


def quantize(tools: Path, source: Path, target: Path, variant: Variant, *options: object) -> Made:
    partial = target.with_suffix(".partial")
    start = time.perf_counter()
    said = run(tools / "llama-quantize", "--allow-requantize", *variant.options, *options,
               source, partial, variant.type, 1)  # fmt: skip
    seconds = time.perf_counter() - start
    partial.replace(target)
    fallbacks = re.search(r"(\d+) of \d+ tensor\(s\) required fallback", said)
    types = Counter(found.lower() for found in re.findall(r"converting to (\w+)", said))
    return Made(target, dict(types), int(fallbacks[1]) if fallbacks else 0, seconds)


def decoded(tools: Path, source: Path, work: Path) -> Path:
    """Return the F32 GGUF of `source`, made once in `work`."""
    target = work / "F32.gguf"
    if not target.is_file():
        work.mkdir(parents=True, exist_ok=True)
        quantize(tools, source, target, Variant("F32"))
    return target


def importance(tools: Path, source: Path, words: Path, tokens: int, seq_len: int, work: Path) -> Path:
    """Return the importance matrix of the first `tokens` of `words`, made once in `work`."""
    target = work / "imatrix.gguf"
    if not target.is_file():
        partial = work / "partial-imatrix.gguf"
        run(tools / "llama-imatrix", "-m", decoded(tools, source, work), "-f", words, "-o", partial,
            "-c", seq_len, "-b", seq_len, "--chunks", tokens // seq_len, "-t", 1, "--no-ppl")  # fmt: skip
        partial.replace(target)
    return target


def make(name: str, tools: Path, source: Path, words: Path, tokens: int, seq_len: int, work: Path) -> Made:
    """Make the file VARIANTS[name] of `source`, or take the source itself under the name SHIPPED."""
    if name == SHIPPED:
        return Made(source, {}, 0, None)
    variant = VARIANTS[name]
    options: tuple[object, ...] = ()
    if variant.importance:
        options = ("--imatrix", importance(tools, source, words, tokens, seq_len, work))
    target = work / f"{re.sub('[^A-Za-z0-9_]+', '-', name)}.gguf"
    return quantize(tools, decoded(tools, source, work), target, variant, *options)


@contextmanager
def as_float(tools: Path, path: Path, work: Path) -> Iterator[Path]:
    """Give the F32 GGUF of the weights in `path`, decoded by llama.cpp, which knows all its types."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        yield quantize(tools, path, Path(folder) / "decoded.gguf", Variant("F32")).path


def header_bytes(tools: Path, source: Path, work: Path) -> int:
    """Return the bytes of a GGUF of `source` before its tensors: the tokenizer, above all.

    It is read in the F32 file: the package gguf does not know all types of llama.cpp.
    """
    from gguf import GGUFReader

    return int(GGUFReader(decoded(tools, source, work)).data_offset)


def speed(tools: Path, path: Path, prompt: int, new_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Return tokens per second on one thread, of each repeat: the prompt, and the tokens behind it."""
    tests = {"prefill": ("-p", prompt, "-n", 0), "decode": ("-p", 0, "-n", new_tokens, "-d", prompt)}
    found = {}
    for what, test in tests.items():
        said = run(tools / "llama-bench", "-m", path, "-t", 1, "-r", repeats, "-o", "jsonl", *test)
        line = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
        found[what] = [float(value) for value in line["samples_ts"]]
    return found


def resident(tools: Path, path: Path) -> int:
    """Return the peak bytes of a process that reads the file, without mapping it, and decodes a token."""
    command = [tools / "llama-bench", "-m", path, "-p", "0", "-n", "1", "-r", "1", "-t", "1", "-lm", "none"]
    started = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise RuntimeError(f"llama-bench ended with {started.returncode} on {path.name}")
    return usage.ru_maxrss * 1024


def own_perplexity(tools: Path, path: Path, words: Path, seq_len: int, windows: int) -> float:
    """Return what llama-perplexity measures on the first `windows` of `words`."""
    said = run(tools / "llama-perplexity", "-m", path, "-f", words, "-c", seq_len, "-b", seq_len,
               "--chunks", windows, "-t", 1)  # fmt: skip
    chunks = re.search(r"over (\d+) chunks", said)
    estimate = re.search(r"Final estimate: PPL = ([\d.]+)", said)
    if chunks is None or estimate is None or int(chunks[1]) != windows:
        raise RuntimeError(f"llama-perplexity gave no estimate over {windows} windows")
    return float(estimate[1])


@torch.no_grad()
def second_half(model: torch.nn.Module, windows: Tensor) -> float:
    """Return the perplexity of `model` on `windows` (k, seq_len) by the protocol of llama-perplexity."""
    half = windows.shape[1] // 2
    losses = [
        functional.cross_entropy(model(input_ids=window[None]).logits[0, half:-1], window[half + 1 :])
        for window in windows
    ]
    return float(torch.stack(losses).double().mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="to measure on")
    plain = [SHIPPED, *(name for name, variant in VARIANTS.items() if not variant.importance)]
    parser.add_argument("--variant", default="Q4_K_M", choices=plain)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    tools, source = find(options.llama_cpp), smollm2.fetch()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        work = Path(folder)
        made = make(options.variant, tools, source, options.text, 0, options.seq_len, work)
        with as_float(tools, made.path, work) as path:
            loaded = hub.load(str(path), compute=torch.float32)
        rows = text.tokenize(text.read(options.text, loaded.tokenizer), loaded.tokenizer)
        windows = text.windows(rows[: options.tokens], options.seq_len)
        cut = work / "text.txt"
        cut.write_text(loaded.tokenizer.decode(rows[: options.tokens + 64]), encoding="utf-8")
        theirs = own_perplexity(tools, made.path, cut, options.seq_len, len(windows))
        print(f"{options.variant}, {version(tools)}: llama-perplexity {theirs:.3f}", flush=True)
        print(f"its weights in float32, same windows and positions: {second_half(loaded.model, windows):.3f}")


if __name__ == "__main__":
    main()
