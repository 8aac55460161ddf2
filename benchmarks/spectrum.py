"""How low-rank a model is: what its largest singular values hold, by kind of matrix and metric.

    python benchmarks/spectrum.py MODEL --text CALIBRATION

Plain singular values, those of W H^1/2 (H the second moment of the inputs), and those of C^1/2 W H^1/2 (C
that of the gradients at the outputs). A share is of the squared (weighted) Frobenius norm.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import eckart
from eckart import environment, render, report_survey
from eckart.bars import Bars
from eckart.survey import Survey


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/spectrum.json"))
    return parser.parse_args()


def rows(found: Survey) -> list[dict[str, Any]]:
    """Return a row for each matrix and metric, with figures of five digits."""
    made = []
    for one in found.matrices:
        noise = one.whole.noise
        for metric, said in one.whole.to_dict()["metrics"].items():
            figures = {
                "stable": said["stable_rank"], "effective": said["effective_rank"],
                "condition": said["condition"], **said["held"], "top 256": said["held_top_256"],
            }  # fmt: skip
            made.append({
                "name": one.name, "shape": "x".join(map(str, one.whole.shape)), "metric": metric,
                "ranks": "/".join(map(str, said["ranks"].values())), "above noise": noise.above,
                **{key: None if value is None else float(f"{value:.5g}") for key, value in figures.items()},
            })  # fmt: skip
    return made


def main() -> None:
    options = arguments()
    with Bars() as bars:
        found = eckart.spectrum(
            options.model, text=options.text, tokens=options.tokens, gradient_tokens=options.tokens // 2,
            watch=bars.watch,
        )  # fmt: skip
    name, texts = Path(options.model).name, [Path(text).name for text in options.text]
    kinds = [dict(zip(report_survey.KINDS, row, strict=True)) for row in report_survey.kind_rows(found)]
    heads = [dict(zip(report_survey.HEADS, row, strict=True)) for row in report_survey.head_rows(found)]
    result = {
        "command": f"python benchmarks/spectrum.py {name} --text {' '.join(texts)} --tokens {options.tokens}",
        "protocol": {
            "model": name, "text": texts, "tokens": found.tokens, "gradient_tokens": found.gradient_tokens,
            "damp": found.damp,
        },
        "answers": found.answers(),
        "kinds": kinds,
        "heads": heads,
        "matrices": rows(found),
        "seconds": {stage: round(seconds, 1) for stage, seconds in found.seconds.items()},
        "warnings": list(found.warnings),
        "environment": environment.describe(),
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"answers": found.answers(), "kinds": kinds}, indent=1))
    print(render.markdown_table(report_survey.KINDS, report_survey.kind_rows(found)))


if __name__ == "__main__":
    main()
