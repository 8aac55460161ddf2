"""The main job on a real model, end to end: what `make demo` runs.

Fetches SmolLM2-135M-Instruct, compresses it to 80 % of its parameters, compares both models on
held-out text and lets both finish a sentence. The text is Python's own documentation, which every
Python has.
"""

import os
import pydoc_data.topics
import shlex
import subprocess
import sys
import time
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # the bars of what lies below

import torch
from smollm2 import fetch
from transformers import AutoTokenizer

import eckart

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo-out" / "SmolLM2-135M-keep-0.8"
PROMPT = "Python is a programming language that"


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Write text to calibrate on and, from other pages, text to measure on."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    calibration, held_out = folder / "calibration.txt", folder / "held-out.txt"
    calibration.write_text("\n".join(page for index, page in enumerate(pages) if index % 5), encoding="utf-8")
    held_out.write_text("\n".join(pages[::5]), encoding="utf-8")
    return calibration, held_out


def run(*arguments: object) -> None:
    """Run the command line as a user does, and show it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ eckart {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "eckart.cli", *words], check=True)


def generate(source: Path) -> str:
    """Return the greedy continuation of PROMPT by the model at `source`."""
    gguf = source.suffix == ".gguf"
    extra = {"gguf_file": source.name} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(source.parent if gguf else source, **extra)
    model = eckart.load(source, dtype="float32")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def main() -> None:
    start = time.monotonic()
    print("fetching SmolLM2-135M-Instruct (98 MB, once) ...", flush=True)
    model = fetch()
    calibration, held_out = write_texts(ROOT / ".cache")
    # A quarter of the text that compress takes by default, so that two cores need less than ten minutes.
    run("compress", model, "--keep", 0.8, "--text", calibration, "--tokens", 8_192, "--gradient-tokens",
        2_048, "--eval-text", held_out, "--eval-tokens", 2_048, "--out", OUT, "--overwrite")  # fmt: skip
    run("eval", OUT, "--text", held_out, "--tokens", 2_048, "--against", model)
    print("\ndense:     ", generate(model))
    print("compressed:", generate(OUT))
    print(f"\nthe compressed model is in {OUT}")
    print(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
