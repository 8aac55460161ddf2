"""Time, memory and bytes read of `eckart compress --memory` on models of 1B to 7B shapes: a process for each.

    OMP_NUM_THREADS=1 python benchmarks/scale.py --text CALIBRATION [--case 1B:2 --case 7B:2 ...] [--show]

Checkpoints have random weights in the shapes of Llama models, in bfloat16, and so many blocks as a case says;
they are written one block to a file and deleted afterwards. What is measured does not depend on the values.
A case with `:whole` loads the whole model (eckart.compress) instead. Linux alone.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from eckart import environment, memory, render
from eckart.scratch import tokens

OUT = Path("benchmarks/results/scale.json")
CASES = ("1B:2", "1B:4", "1B:8", "1B:2:whole", "1B:4:whole", "3B:2", "7B:2")
VOCABULARY = 32_000
BYTES = 257
"""Tokens of the tokenizer: text is only there to have some."""
COLUMNS = [
    "shape", "blocks", "", "model GB", "--memory GB", "estimate GB", "peak GB", "estimate / peak",
    "read GB", "read / model", "disk GB", "forward s", "decompose s", "write s", "whole s",
    "CPU s", "CPU s a block",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model; `blocks` are those of the whole one, `promise` the bytes to keep to."""

    hidden: int
    inner: int
    heads: int
    groups: int
    blocks: int
    promise: str


SHAPES = {
    "tiny": Shape(256, 704, 4, 2, 4, "2GB"),
    "1B": Shape(2048, 8192, 32, 8, 16, "5GB"),
    "3B": Shape(3072, 8192, 24, 8, 28, "6GB"),
    "7B": Shape(4096, 11_008, 32, 32, 32, "8GB"),
}


def config(shape: Shape, blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=blocks, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        tie_word_embeddings=False, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
        dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def parts(shape: Shape, blocks: int) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Yield the tensors of each file; there is never more than one file in memory."""
    hidden, inner = shape.hidden, shape.inner
    narrow = hidden // shape.heads * shape.groups
    yield "entrance", {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for index in range(blocks):
        own = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        yield f"block-{index}", {f"model.layers.{index}.{name}.weight": size for name, size in own.items()}
    yield "exit", {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def build(folder: Path, shape: Shape, blocks: int) -> int:
    """Write a checkpoint and return its bytes; rows of variance 1 / width keep activations finite."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    total = 0
    for name, sizes in parts(shape, blocks):
        file = f"{name}.safetensors"
        made = {
            key: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.randn(size, generator=generator).div_(size[1] ** 0.5).to(torch.bfloat16)
            for key, size in sizes.items()
        }
        save_file(made, folder / file, {"format": "pt"})
        places |= dict.fromkeys(made, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config(shape, blocks).save_pretrained(folder)
    tokens.train([], BYTES).save_pretrained(folder)
    return total


class Fullest:
    """The most bytes that a folder held, looked at twice a second."""

    def __init__(self, folder: Path) -> None:
        self.bytes = 0
        self._folder, self._over = folder, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Fullest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.5):
            self.bytes = max(self.bytes, sum(map(_size, self._folder.rglob("*"))))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # gone in the meantime
        return 0


class Moments:
    """The CPU seconds of this process when a stage came to a step: others on the machine do not count."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.setdefault(stage, []).append(time.process_time())

    def steps(self) -> dict[str, float]:
        """Return the CPU seconds of a middle step of each stage that has some."""
        gaps = {stage: [b - a for a, b in itertools.pairwise(at)] for stage, at in self.seen.items()}
        return {stage: statistics.median(own) for stage, own in gaps.items() if own}


def measure(folder: Path, out: Path, options: argparse.Namespace, promise: str | None) -> dict[str, Any]:
    """Compress in this process and return what it took; `promise` None: with the whole model in memory."""
    import eckart
    from eckart.streaming import execute, need, shards

    recipe = eckart.Recipe(
        model=str(folder), method=options.method, form=options.form, keep=0.8, of="linears",
        text=(options.text,), tokens=options.tokens, gradient_tokens=options.tokens // 2, seq_len=512,
        eval_tokens=options.eval_tokens,
    )  # fmt: skip
    found: dict[str, Any] = {}
    watch = Moments()
    with Fullest(out.parent) as fullest:
        began, before = time.perf_counter(), os.times()
        if promise is None:
            model, result = eckart.compress(str(folder), recipe=recipe, watch=watch)
            eckart.save(model, tokens.train([], BYTES), out)
        else:
            opened: list[shards.Shards] = []
            _listen(need, found, opened)
            result = execute.compress_to(recipe, out, memory=promise, watch=watch)
            found["read"] = opened[0].read_bytes
        found["seconds"] = time.perf_counter() - began
        found["cpu_seconds"] = sum(os.times()[:2]) - sum(before[:2])
    return found | {
        "stages": result.seconds,
        "steps": watch.steps(),
        "peak": memory.peak_bytes(torch.device("cpu"))["ram"],
        "disk": fullest.bytes,
        "read_system": resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512,
    }  # fmt: skip


def _listen(need: Any, found: dict[str, Any], opened: list[Any]) -> None:
    """Note the estimates that the run makes, and its weight files."""
    check = need.check

    def noted(job: Any, limit: int) -> None:
        found["estimate_parts"] = need.memory(job)
        found["estimate"] = sum(found["estimate_parts"].values())
        found["disk_estimate"] = need.disk(job)
        opened.append(job.stream.shards)
        check(job, limit)

    need.check = noted


def alone(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build the model of `case`, compress it in a process of its own, and delete it."""
    name, blocks, *how = case.split(":")
    shape = SHAPES[name]
    promise = None if how else options.memory or shape.promise
    work = Path(tempfile.mkdtemp(prefix="scale-", dir=options.folder))
    try:
        total = build(work / "model", shape, int(blocks))
        (work / "to").mkdir()
        inner = {"promise": promise, "folder": str(work / "model"), "out": str(work / "to" / "out")}
        command = [
            sys.executable, __file__, "--inner", json.dumps(inner), "--out", str(work / "row.json"),
            "--text", options.text, "--tokens", str(options.tokens), "--method", options.method,
            "--eval-tokens", str(options.eval_tokens), "--form", options.form,
        ]  # fmt: skip
        subprocess.run(command, check=True)
        found = json.loads((work / "row.json").read_text())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "shape": name, "blocks": int(blocks), "whole": bool(how), "promise": promise, "model": total,
        "tokens": options.tokens, "eval_tokens": options.eval_tokens, "method": options.method,
        "form": options.form, **found, "environment": environment.describe(),
        "command": "OMP_NUM_THREADS=" + os.environ.get("OMP_NUM_THREADS", "")
        + f" python benchmarks/scale.py --text {Path(options.text).name} --tokens {options.tokens} "
        f"--eval-tokens {options.eval_tokens} --method {options.method} --form {options.form} --case {case}",
    }  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    def giga(key: str) -> str:
        return f"{row[key] / 1e9:.2f}" if row.get(key) else ""

    stages = row["stages"]
    return [
        row["shape"], str(row["blocks"]), "whole model in memory" if row["whole"] else row["form"],
        giga("model"), (row["promise"] or "").removesuffix("GB"), giga("estimate"), giga("peak"),
        f"{row['estimate'] / row['peak']:.2f}" if row.get("estimate") else "",
        giga("read"), f"{row['read'] / row['model']:.1f}" if row.get("read") else "", giga("disk"),
        *(f"{stages[name]:.0f}" if name in stages else "" for name in ("forward", "decompose", "write")),
        f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}",
        f"{sum(row['steps'].get(name, 0) for name in ('forward', 'decompose', 'write')):.0f}",
    ]  # fmt: skip


def lines(rows: list[Mapping[str, Any]]) -> list[str]:
    """Return CPU time = a + b x blocks for every shape in parts, and what that gives for all its blocks."""
    said = []
    for name in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == name and not row["whole"]]
        if not own:
            continue
        counts = torch.tensor([row["blocks"] for row in own], dtype=torch.float64)
        times = torch.tensor([row["cpu_seconds"] for row in own], dtype=torch.float64)
        if len(set(counts.tolist())) > 1:
            slope = float(torch.cov(torch.stack([counts, times]))[0, 1] / counts.var())
            fixed, how = float(times.mean() - slope * counts.mean()), "through two runs"
            worst = float(((fixed + slope * counts - times) / times).abs().max())
            how = how if len(own) == 2 else f"fitted to {len(own)} runs, off by {worst:.1%} at most"
        else:
            slope = sum(own[-1]["steps"].get(stage, 0) for stage in ("forward", "decompose", "write"))
            fixed, how = float(times[-1] - slope * counts[-1]), "from the steps of one run"
        whole = SHAPES[name].blocks
        said.append(
            f"{name}: {fixed:.0f} s + {slope:.1f} CPU s x blocks ({how}); extrapolated to {whole} blocks: "
            f"{(fixed + slope * whole) / 60:.0f} min"
        )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", help="what to calibrate on")
    parser.add_argument("--case", action="append", help=f"SHAPE:BLOCKS[:whole]; default: {' '.join(CASES)}")
    parser.add_argument("--memory", help="the promise; default: by shape")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--eval-tokens", type=int, default=1024)
    parser.add_argument("--method", default="eckart")
    parser.add_argument("--form", default="pivoted", help="default: pivoted; mixed is the command's own")
    parser.add_argument("--folder", help="where checkpoints are written")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the table again and measure nothing")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        inner = json.loads(options.inner)
        found = measure(Path(inner["folder"]), Path(inner["out"]), options, inner["promise"])
        options.out.write_text(json.dumps(found))
        return
    if not options.show and options.text is None:
        parser.error("--text is needed")
    rows = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    for case in () if options.show else options.case or CASES:
        rows.append(alone(case, options))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
        print("| " + " | ".join(cells(rows[-1])) + " |", flush=True)
    print(render.markdown_table(COLUMNS, [cells(row) for row in rows]))
    print("\n".join(lines(rows)))


if __name__ == "__main__":
    main()
