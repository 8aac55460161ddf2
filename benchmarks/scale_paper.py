"""What a streamed compression costs by arithmetic, from sizes and rates; see docs/scale.md.

    python benchmarks/scale_paper.py
    python benchmarks/scale_paper.py --against benchmarks/results/scale.json      beside what was measured

Nothing is measured here but what is said to be. Method eckart, form pivoted, default numbers of tokens.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scale

from eckart import render
from eckart.recipe import Recipe
from eckart.stats import SKETCH, WIDEST_FULL
from eckart.streaming.team import by_cost

DEFAULTS = Recipe(keep=0.8)
TOKENS, GRADIENT_TOKENS, EVAL_TOKENS = DEFAULTS.tokens, DEFAULTS.gradient_tokens, DEFAULTS.eval_tokens
LENGTH = DEFAULTS.seq_len
STORED = 2  # bytes of bfloat16
READS = 3  # forward, back, write
DEVICES = (1, 8, 64)


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a Llama 3: hidden, of the MLP, of all keys, blocks, vocabulary."""

    hidden: int
    inner: int
    keys: int
    blocks: int
    heads: int
    vocabulary: int = 128_256

    def matrices(self) -> list[tuple[int, int]]:
        """Return (out, in) of q, k, v, o, gate, up and down."""
        d, f, k = self.hidden, self.inner, self.keys
        return [(d, d), (k, d), (k, d), (d, d), (f, d), (f, d), (d, f)]

    def inputs(self) -> list[int]:
        """Return the widths of what is read: by q, k and v, by o, by gate and up, by down."""
        return [self.hidden, self.hidden, self.hidden, self.inner]


MODELS = {
    "8B": Model(4096, 14_336, 1024, 32, 32),
    "70B": Model(8192, 28_672, 1024, 80, 64),
    "405B": Model(16_384, 53_248, 1024, 126, 128),
}


@dataclass(frozen=True, slots=True)
class Device:
    """FLOP per second of products in the dtype to compute in, float32 and float64; of eigendecompositions."""

    compute: float
    single: float
    double: float
    eigen: float
    itemsize: int
    disk: float
    network: float


RATES = {
    "one CPU core, measured": Device(33e9, 33e9, 15.5e9, 18e9, 4, 1e9, 1.25e9),
    "H100 SXM, assumed": Device(0.4 * 989e12, 0.4 * 67e12, 0.4 * 67e12, 0.01 * 67e12, 2, 3e9, 50e9),
}


def square(side: int) -> int:
    return side * side if side <= WIDEST_FULL else side


def block_parameters(model: Model) -> int:
    return sum(m * n for m, n in model.matrices())


def passing(model: Model) -> float:
    """FLOPs of the passes through one block: there, there again and back, and twice to measure."""
    weights = 2.0 * block_parameters(model)
    return weights * (2 * TOKENS + GRADIENT_TOKENS + 2 * EVAL_TOKENS)


def summing(model: Model, tokens: int = TOKENS, gradient_tokens: int = GRADIENT_TOKENS) -> float:
    """FLOPs of the second moments of one block, in float32; of wide inputs, of a sketch."""
    inputs = sum(square(n) + (2 * n * SKETCH if n > WIDEST_FULL else 0) for n in model.inputs())
    return 2.0 * (tokens * inputs + gradient_tokens * sum(square(m) for m, _ in model.matrices()))


def products(shape: tuple[int, int]) -> float:
    """FLOPs of a decomposition but for its eigendecomposition: s^3/3 + s^3 + 6 s^2 l + 2 s l^2 or 2 s l k."""
    small, large = sorted(shape)
    metric = 2.0 * small * large * (large if large <= WIDEST_FULL else 2 * SKETCH)
    return small**3 * 4 / 3 + 6.0 * small * small * large + metric


def eigen(shape: tuple[int, int]) -> float:
    """FLOPs of the eigendecomposition of the smaller side: 9 s^3 (tridiagonal, divide and conquer, back)."""
    return 9.0 * min(shape) ** 3


def moment_bytes(model: Model) -> int:
    """Bytes of the moments of one block, which are all-reduced."""
    sketch = sum(n * SKETCH for n in model.inputs() if n > WIDEST_FULL)
    return 4 * (sum(map(square, model.inputs())) + sum(square(m) for m, _ in model.matrices()) + sketch)


def share(costs: Iterable[float], devices: int) -> float:
    """The cost of the device that has most."""
    own = list(costs)
    owners = by_cost(own, devices)
    return max(sum(c for c, owner in zip(own, owners, strict=True) if owner == i) for i in range(devices))


def decomposing(model: Model, device: Device) -> list[float]:
    """Seconds that each matrix of one block takes to decompose."""
    return [products(shape) / device.double + eigen(shape) / device.eigen for shape in model.matrices()]


def hours(model: Model, device: Device, devices: int) -> dict[str, float]:
    """Hours of each term, which come one after the other."""
    costs = decomposing(model, device)
    weights = STORED * (model.blocks * block_parameters(model) + 2 * model.vocabulary * model.hidden)
    found = {
        "passes": model.blocks * passing(model) / device.compute / devices,
        "moments": model.blocks * summing(model) / device.single / devices,
        "decompositions": model.blocks * share(costs, devices),
        "disk": (READS * weights + 2 * factor_bytes(model) / devices) / device.disk,
        "network": network_bytes(model, devices) / device.network,
    }
    return {name: seconds / 3600 for name, seconds in found.items()}


def network_bytes(model: Model, devices: int) -> float:
    """Bytes that one device sends: a ring sends 2 (N - 1) / N of what is summed."""
    return model.blocks * moment_bytes(model) * 2 * (devices - 1) / devices


def factor_bytes(model: Model) -> float:
    """Bytes of all decompositions, in float32, which wait on disk until the ranks are chosen."""
    return 4.0 * model.blocks * sum(min(shape) * sum(shape) for shape in model.matrices())


def hidden_bytes(model: Model, itemsize: int) -> float:
    """Bytes of what enters each block, and of the gradients of two."""
    states = TOKENS * (model.blocks + 1) + GRADIENT_TOKENS * 2
    return float(states) * model.hidden * itemsize


def memory(model: Model, device: Device) -> float:
    """Bytes of one device, by the formulas of eckart.streaming.need."""
    weights = device.itemsize * block_parameters(model)
    window = device.itemsize * (4 * model.heads * LENGTH**2 + 3 * LENGTH * sum(map(sum, model.matrices())))
    most = 0.0
    for shape in model.matrices():
        small, product = min(shape) ** 2, shape[0] * shape[1]
        large = square(max(shape))
        steps = (2 * large + 2 * small, 2 * product + 7 * small, 3 * product + 4 * small)
        most = max(most, large + max(steps))
    inside = max(
        STORED * block_parameters(model), moment_bytes(model) + window, 8 * most + moment_bytes(model)
    )
    return 1.1 * (weights + inside)


def compared(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of CPU seconds a block by these formulas and as benchmarks/scale.py measured them."""
    device, cells = RATES["one CPU core, measured"], []
    for row in rows:
        if row["whole"] or row["form"] != "pivoted":
            continue
        shape = scale.SHAPES[row["shape"]]
        keys = shape.hidden // shape.heads * shape.groups
        model = Model(shape.hidden, shape.inner, keys, row["blocks"], shape.heads, scale.VOCABULARY)
        moments = summing(model, row["tokens"], row["tokens"] // 2) / device.single
        again = 2.0 * block_parameters(model) * (row["tokens"] + row["tokens"] // 2) / device.compute
        decompositions = sum(decomposing(model, device))
        paper = moments + again + decompositions
        steps = row["steps"]
        cells.append([
            row["shape"], str(row["blocks"]), f"{again:.0f}", f"{moments:.0f}", f"{decompositions:.0f}",
            f"{paper:.0f}", f"{steps['decompose']:.0f}", f"{steps['forward']:.0f}", f"{steps['write']:.0f}",
        ])  # fmt: skip
    columns = [
        "shape", "blocks", "again and back", "moments", "decompositions", "sum", "measured",
        "forward, measured", "forming and writing, measured",
    ]  # fmt: skip
    return render.markdown_table(columns, cells)


def hours_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", type=Path, help="results of benchmarks/scale.py")
    against = parser.parse_args().against
    if against:
        print(compared(json.loads(against.read_text())["rows"]))
        return
    rows, disks = [], []
    for place, device in RATES.items():
        for name, model in MODELS.items():
            for devices in DEVICES:
                found = hours(model, device, devices)
                rows.append([
                    place, name, str(devices), *(hours_text(value) for value in found.values()),
                    hours_text(sum(found.values())), max(found, key=lambda key: found[key]),
                    f"{memory(model, device) / 1e9:,.0f}", f"{network_bytes(model, devices) / 1e9:,.0f}",
                ])  # fmt: skip
    for name, model in MODELS.items():
        weights = STORED * (model.blocks * block_parameters(model) + 2 * model.vocabulary * model.hidden)
        sizes = (READS * weights, hidden_bytes(model, 2), hidden_bytes(model, 4), factor_bytes(model))
        disks.append([name, *(f"{size / 1e9:,.0f}" for size in (weights, *sizes))])
    columns = [
        "device",
        "model",
        "devices",
        "passes h",
        "moments h",
        "decompositions h",
        "disk h",
        "network h",
    ]
    columns += ["whole h", "binds", "memory GB", "sent GB"]
    print(render.markdown_table(columns, rows))
    kept = ["model", "weights GB", "read by each GB", "activations GB, bf16", "float32", "decompositions GB"]
    print(render.markdown_table(kept, disks))


if __name__ == "__main__":
    main()
