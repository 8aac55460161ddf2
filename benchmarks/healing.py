"""What healing gives on compressed folders: a row per folder and seed, printed as Markdown, kept as JSON.

    python benchmarks/healing.py DIR ... --teacher MODEL --text TEXT --eval-text TEST --tokens 122880

The folders come from eckart compress, in float32. Finished rows are kept in the JSON file, and the same
command goes on after an interruption, within a row from its last evaluation. Several may fill one file.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import eckart
from eckart import environment, render
from eckart.healing import REFINEMENTS, Healing
from eckart.result import Healed

COLUMNS = [
    "folder", "refinements", "seed", "tokens", "dense", "before", "healed", "against dense", "foreign before",
    "foreign healed", "KL before", "KL after", "seconds", "peak MB so far",
]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--eval-text", required=True, nargs="+")
    parser.add_argument("--foreign-text", nargs="+", default=[], help="texts of other kinds to measure on")
    parser.add_argument("--refine", nargs="+", default=["logits"], choices=REFINEMENTS)
    parser.add_argument("--tokens", type=int, default=Healing().tokens)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--eval-tokens", type=int, default=6_144)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/healing.json"))
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path, seed: int, work: Path) -> dict[str, Any]:
    settings = Healing(steps=tuple(options.refine), tokens=options.tokens, seed=seed)
    _, healed = eckart.heal(
        folder, options.teacher, options.text, settings=settings, eval_text=options.eval_text,
        foreign_text=options.foreign_text or None, eval_tokens=options.eval_tokens, work=work,
        dtype="float32",
    )  # fmt: skip
    return {"folder": folder.name, "tokens": options.tokens, "seed": seed, **figures(healed)}


def figures(healed: Healed) -> dict[str, Any]:
    assert healed.quality is not None
    found: dict[str, Any] = {
        "refinements": [step.step for step in healed.steps],
        "rate": healed.settings.starting_rate(healed.steps[-1].before),
        "learned": sum(step.tokens for step in healed.steps),
        "dense": healed.quality.dense.perplexity,
        "before": healed.quality.one_shot.perplexity,
        "healed": healed.quality.compressed.perplexity,
        "seconds": sum(step.seconds for step in healed.steps),
        "peak_mb_so_far": healed.peak_memory["ram"] / 1e6,
        "steps": [asdict(step) for step in healed.steps],
    }
    if healed.foreign is not None:
        for name, value in (
            ("dense", healed.foreign.dense),
            ("before", healed.foreign.one_shot),
            ("healed", healed.foreign.compressed),
        ):
            found[f"foreign_{name}"] = value.perplexity
    return found


def cells(row: dict[str, Any]) -> list[str]:
    foreign = [
        f"x {row[f'foreign_{when}'] / row['foreign_dense']:.3f}" if "foreign_dense" in row else ""
        for when in ("before", "healed")
    ]
    return [
        row["folder"], ", ".join(row["refinements"]), str(row["seed"]), f"{row['learned']:,}",
        f"{row['dense']:.2f}", f"{row['before']:.2f}", f"{row['healed']:.2f}",
        f"x {row['healed'] / row['dense']:.3f}", *foreign,
        f"{row['steps'][0]['before']:.4f}", f"{row['steps'][-1]['after']:.4f}",
        f"{row['seconds']:.0f}", f"{row['peak_mb_so_far']:,.0f}",
    ]  # fmt: skip


def protocol(options: argparse.Namespace) -> dict[str, Any]:
    """What every row of one file must share."""
    names = ("text", "eval_text", "foreign_text")
    files = {name: [Path(source).name for source in getattr(options, name)] for name in names}
    return {"teacher": Path(options.teacher).name, **files, "eval_tokens": options.eval_tokens}


def known(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows that the file holds by now."""
    if not options.out.is_file():
        return []
    found = json.loads(options.out.read_text())
    if found["protocol"] != protocol(options):
        sys.exit(f"{options.out} has another protocol: {found['protocol']}; choose another --out")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def save(options: argparse.Namespace, row: dict[str, Any]) -> None:
    command = environment.command()
    found = {
        "protocol": protocol(options),
        "rows": [*known(options), {**row, "command": command}],
        "environment": environment.describe(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    options = arguments()
    for folder in options.folders:
        for seed in options.seeds:
            wanted = (folder.name, options.tokens, seed, list(options.refine))
            keys = ("folder", "tokens", "seed", "refinements")
            if wanted in [tuple(row[key] for key in keys) for row in known(options)]:
                continue
            name = "-".join([options.out.stem, folder.name, *options.refine])
            work = options.out.parent / f".{name}-{options.tokens}-{seed}"
            row = measure(options, folder, seed, work)
            save(options, row)
            print("| " + " | ".join(cells(row)) + " |", flush=True)
            shutil.rmtree(work, ignore_errors=True)
    print(render.markdown_table(COLUMNS, [cells(row) for row in known(options)]))


if __name__ == "__main__":
    main()
