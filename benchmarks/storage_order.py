"""How much faster a matrix is read that is kept by columns: one linear map, a few tokens, one thread.

    python benchmarks/storage_order.py [--shapes 3173x923 ...] [--tokens 1 2 4] [--runs 30] [--threads 1]

The order of memory changes neither shape nor values of a weight, only which of its numbers are neighbours.
Both orders are measured in turn, on as many copies as no cache holds, and the ratio is of medians. It is what
eckart.fuse goes by (eckart.lean): tall matrices of float32 and float64 are kept by columns, others by rows.
"""

import argparse
import json
import math
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eckart import environment
from eckart.speed.options import Rounds
from eckart.speed.spread import Spread, quotient
from eckart.speed.timing import fixed_threads, in_turn, per_call

SHAPES = (
    "3173x923", "2591x1505", "1336x200", "576x200", "376x200", "400x300", "1100x1000", "923x4096", "200x576",
)  # fmt: skip
"""Both factors of 4096 x 4096 at keep 0.4 and 0.6 and of maps of SmolLM2, and some in between."""
WORKING_SET = 64_000_000
SECONDS = 0.01


def rows_of(shape: tuple[int, int], options: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Time a matrix of `shape`, rows x columns, for each number of tokens."""
    count = math.ceil(WORKING_SET / (shape[0] * shape[1] * dtype.itemsize))
    weights = [torch.randn(shape).to(dtype) for _ in range(count)]
    banks = {
        "rows": [partial(functional.linear, weight=weight) for weight in weights],
        "columns": [partial(functional.linear, weight=weight.T.contiguous().T) for weight in weights],
    }
    found = []
    for tokens in options.tokens:
        inputs = torch.randn(tokens, shape[1]).to(dtype)
        once = min(block(cycle(banks["rows"]), inputs, 1) for _ in range(3))
        calls = max(1, math.ceil(SECONDS / once))
        tasks = {name: partial(block, cycle(bank), inputs, calls) for name, bank in banks.items()}
        seconds = in_turn(tasks, Rounds(runs=options.runs, warmup=2))
        rows, columns = (Spread(tuple(seconds[name])) for name in banks)
        ratio = quotient(columns, rows)
        row = {
            "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "tokens": tokens,
            "milliseconds by rows": rows.median * 1e3, "columns over rows": ratio.to_dict(),
        }  # fmt: skip
        found.append(row)
        cells = (f"{rows.median * 1e3:.3f}", f"{ratio.value:.2f}")
        print(f"| {shape[0]} x {shape[1]} | {row['dtype']} | {tokens} | {' | '.join(cells)} |", flush=True)
    return found


def block(turns: "cycle[partial[Tensor]]", inputs: Tensor, calls: int) -> float:
    return per_call(list(islice(turns, calls)), inputs, time.perf_counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 16, 128])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/storage-order.json"))
    options = parser.parse_args()
    print("| rows x columns | dtype | tokens | by rows, ms | by columns |\n|---|---|---|---|---|")
    found: list[dict[str, Any]] = []
    with fixed_threads(options.threads) as threads:
        for dtype in options.dtypes:
            for text in options.shapes:
                rows, columns = (int(number) for number in text.split("x"))
                found += rows_of((rows, columns), options, getattr(torch, dtype))
    report = {
        "command": environment.command(), "threads": threads, "runs": options.runs, "rows": found,
        "environment": environment.describe(),
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
