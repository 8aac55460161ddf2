"""Methods, keeps and storages on one model, all measured: bytes against perplexity, and which are the best.

    python benchmarks/sweep.py MODEL --text CALIBRATION --eval-text TEST --work FOLDER [--cache FOLDER]

Rows are kept in --work, and the same command goes on, with more methods, keeps and storages, too.
--cache takes statistics and decompositions from where `eckart curve` or an earlier sweep left them.
"""

import argparse
import json
from pathlib import Path

import eckart
from eckart import environment, render, report_sweep
from eckart.bars import Bars


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--eval-text", required=True, nargs="+")
    parser.add_argument("--work", required=True, type=Path, help="the folder of the rows")
    parser.add_argument("--cache", type=Path, help="default: eckart's own")
    parser.add_argument("--methods", nargs="+", default=["eckart", "svd-llm"])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--storages", nargs="+", default=["float", "int8"])
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--eval-tokens", type=int, default=6_144)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sweep.json"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    with Bars() as bars:
        found = eckart.sweep(
            options.model, options.text, out=options.work, methods=options.methods, keeps=options.keeps,
            storages=options.storages, of="linears", eval_text=options.eval_text, tokens=options.tokens,
            gradient_tokens=options.tokens // 2, eval_tokens=options.eval_tokens, dtype="float32",
            cache=options.cache or True, watch=bars.watch,
        )  # fmt: skip
    names = {key: [Path(source).name for source in getattr(options, key)] for key in ("text", "eval_text")}
    result = {
        **found.to_dict(), "source": Path(options.model).name, "out": None,
        "protocol": dict(found.protocol) | names, "environment": environment.describe(),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = sorted((row for row in found.rows if row.ok), key=lambda row: row.bytes or 0)
    print(render.markdown_table(report_sweep.SWEEP, [report_sweep.sweep_row(row) for row in rows]))


if __name__ == "__main__":
    main()
