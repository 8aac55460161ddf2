"""What it costs that blocks share their matrices: a row per setting, printed as Markdown, kept as JSON.

    python benchmarks/sharing.py MODEL --text wikitext2.valid.txt --eval-text wikitext2.test.txt

The model is calibrated once, and each row starts from it. Finished rows are kept in the JSON file; the same
command makes those that are missing. `--show` prints the table alone.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import prepared
import torch

from eckart import environment, hub, joining, measure, models, render, sharing, text, windows
from eckart.calibrate import Calibrated
from eckart.factorize import statistics_of
from eckart.groups import Sharing
from eckart.recipe import Recipe

COLUMNS = [
    "blocks", "shared", "metric", "differences", "scales", "linears kept", "perplexity", "loss", "estimated",
    "CPU seconds",
]  # fmt: skip
PAIRS = "10-11,14-15,18-19,22-23"
ONE = "14-15"
ROWS: tuple[tuple[str, Sharing], ...] = (
    ("svd", Sharing(PAIRS)),
    ("svd-llm", Sharing(PAIRS)),
    ("eckart", Sharing(PAIRS)),
    ("eckart", Sharing(PAIRS, "attention")),
    ("svd", Sharing(ONE)),
    ("eckart", Sharing(ONE)),
    ("eckart", Sharing(ONE, "attention")),
    ("eckart", Sharing(ONE, differences=64)),
    ("svd-llm", Sharing(ONE)),
    ("svd-llm", Sharing(ONE, "attention")),
)


def arguments() -> argparse.Namespace:
    parser = prepared.parser(__doc__)
    parser.add_argument(
        "--damp", type=float, help="of the metrics, in units of their mean; default: eckart's"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))))
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sharing.json"))
    return parser.parse_args()


def key(method_and_wanted: tuple[str, Sharing], damp: float | None) -> str:
    method, wanted = method_and_wanted
    strength = {} if damp is None else {"damp": damp}
    return json.dumps({"method": method, **asdict(wanted), **strength}, sort_keys=True)


def row(
    recipe: Recipe, method: str, wanted: Sharing, dense: Any, calibrated: Calibrated, held_out: torch.Tensor
) -> dict[str, Any]:
    """Share in a copy of `dense`, and measure it."""
    start, model = time.process_time(), copy.deepcopy(dense)
    groups = sharing.twins(model, wanted)
    stats = copy.copy(calibrated.stats)
    stats = replace(stats, moments=dict(stats.moments), leaders=dict(stats.leaders))
    own = replace(recipe, method=method)
    rows = joining.put(
        own, wanted, model, groups, replace(calibrated, stats=stats), torch.float32, lambda at, of: None
    )
    seconds = time.process_time() - start
    linears = sum(target.size for target in models.targets(dense))
    saved = sum(one.before - one.after for one in rows.values())
    found = measure.perplexity(model, held_out)
    return {
        "method": method, **asdict(wanted), "linears_kept": 1 - saved / linears,
        "parameters": models.parameter_count(model), "perplexity": found.perplexity, "loss": found.loss,
        "estimated": sum(one.loss for one in rows.values()) if method == "eckart" else None,
        "energy": sum(one.energy for one in rows.values()) / len(rows), "seconds": seconds,
    }  # fmt: skip


def show(results: Mapping[str, Any]) -> str:
    dense = results["dense"]
    rows = [("none", "", "", "", "", "1", f"{dense['perplexity']:.2f}", "", "", "")]
    for found in results["rows"].values():
        estimated = "" if found["estimated"] is None else f"+{found['estimated']:.3f}"
        rows.append(
            (
                found["groups"],
                found["what"],
                found["method"] + (f", damped by {found['damp']:g}" if found.get("damp") else ""),
                str(found["differences"] or ""),
                "yes" if found["scales"] else "",
                f"{found['linears_kept']:.3f}",
                f"{found['perplexity']:.2f}",
                f"{found['loss'] - dense['loss']:+.3f}",
                estimated,
                f"{found['seconds']:.0f}",
            )
        )
    return render.markdown_table(COLUMNS, rows)


def main() -> None:
    options = arguments()
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": {}}
    wanted = [ROWS[place] for place in options.rows if key(ROWS[place], options.damp) not in results["rows"]]
    if wanted and not options.show:
        fill(options, results, wanted)
    print(show(results))


def fill(options: argparse.Namespace, results: dict[str, Any], wanted: list[tuple[str, Sharing]]) -> None:
    recipe = Recipe(
        keep=1.0, text=tuple(options.text), tokens=options.tokens, gradient_tokens=options.tokens,
        seq_len=options.seq_len, **({} if options.damp is None else {"damp": options.damp}),
    )  # fmt: skip
    loaded = hub.load(options.model, place=torch.device("cpu"))
    held_out = text.shares(
        options.eval_text,
        loaded.tokenizer,
        options.eval_tokens,
        options.seq_len,
        False,
        "the text to measure on",
    )
    assert held_out is not None
    if "dense" not in results:
        dense = measure.perplexity(loaded.model, held_out)
        results["dense"] = {"perplexity": dense.perplexity, "loss": dense.loss}
    start = time.process_time()
    names = [name for method, one in wanted for group in sharing.twins(loaded.model, one) for name in group]
    rows = windows.read(recipe, loaded.tokenizer, []).calibration
    calibrated = statistics_of(recipe, loaded.model, list(dict.fromkeys(names)), rows)
    results["protocol"] = {
        "model": Path(options.model).name, "text": [Path(name).name for name in options.text],
        "eval_text": [Path(name).name for name in options.eval_text], "tokens": options.tokens,
        "eval_tokens": options.eval_tokens, "seq_len": options.seq_len, "healing": "none",
        "calibration_seconds": time.process_time() - start,
        "command": " ".join(["benchmarks/sharing.py", *map(shown, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"), **environment.describe(),
    }  # fmt: skip
    for method, one in wanted:
        found = row(recipe, method, one, loaded.model, calibrated, held_out)
        results["rows"][key((method, one), options.damp)] = found | {"damp": options.damp}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")
        print(show(results).splitlines()[-1], flush=True)


def shown(argument: str) -> str:
    """Return an argument without the folders of this machine."""
    return Path(argument).name if "/" in argument else argument


if __name__ == "__main__":
    main()
