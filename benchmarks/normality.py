"""NF4's premise, that trained weights are near normal within a block, measured for every matrix.

    python benchmarks/normality.py MODEL

For each kind of matrix: the excess kurtosis (0 for a normal one) and the Kolmogorov-Smirnov distance from
normal blocks, least, median and largest over the layers; and NF4's error to nearest over the variance, in
times what a normal matrix has. Weights that have been through 4 bits before are measured as they are.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eckart import environment, hub, models, render
from eckart.quant import storage
from eckart.quant.formats import normality


def measured(name: str, weight: Tensor) -> dict[str, Any]:
    nf4, found = storage.get("nf4"), normality(weight)
    error = (weight - nf4.grid(weight).rounded(weight)).square().mean() / weight.square().mean()
    return {
        "name": name, "kurtosis": found.kurtosis, "distance": found.distance,
        "error": float(error) / nf4.noise,
    }  # fmt: skip


def spread(values: list[float]) -> str:
    return f"{min(values):.3f}, {statistics.median(values):.3f}, {max(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/normality.json"))
    options = parser.parse_args()
    model: nn.Module = hub.load(options.model).model
    names = [target.name for target in models.targets(model)]
    names += [name for name in [models.table_name(model)] if name is not None]
    rows = [measured(name, model.get_submodule(name).get_parameter("weight").detach()) for name in names]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["name"].rsplit(".", 1)[-1], []).append(row)
    result = {"model": Path(options.model).name, "rows": rows, "environment": environment.describe()}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        (
            kind,
            str(len(own)),
            *(spread([row[key] for row in own]) for key in ("kurtosis", "distance", "error")),
        )
        for kind, own in kinds.items()
    ]
    columns = ("matrix", "layers", "excess kurtosis", "distance", "error of nf4, to normal")
    print(render.markdown_table(columns, lines))


if __name__ == "__main__":
    main()
