"""How spectra decline while a model trains: noted at some steps, as JSON, as a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..factors import FactoredLinear, PivotedLinear
from ..linalg import to_float64
from ..ranks import Keep, uniform

Matrix = nn.Linear | FactoredLinear | PivotedLinear
_ENERGIES = (0.9, 0.99)


def target_rank(shape: tuple[int, int], keep: float | None) -> int | None:
    """Return the rank of two factors with the share `keep` of the parameters, None where there is none."""
    return None if keep is None else uniform(Keep(keep), "factored", shape)


@torch.no_grad()
def spectrum(module: Matrix) -> Tensor:
    """Return the singular values (k,) of the map of `module`, descending, float64 on the CPU.

    Through Gram matrices: small ones carry an absolute error of 1e-8 of the largest.
    """
    if isinstance(module, FactoredLinear):
        left, right = to_float64(module.up.weight), to_float64(module.down.weight)
        mix = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
        found: Tensor = torch.linalg.svdvals(mix)
        return found.cpu()
    work = to_float64(module.map().dense() if isinstance(module, PivotedLinear) else module.weight)
    gram = work @ work.T if work.shape[0] <= work.shape[1] else work.T @ work
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.clamp(min=0).sqrt().flip(0).cpu()


def summary(values: Tensor, target: int | None) -> dict[str, float]:
    """Return norm, stable rank, ranks that hold shares of the energy, and the share beyond rank `target`."""
    energy = values.square()
    total = float(energy.sum())
    if total == 0:
        return {"norm": 0.0, "stable_rank": 0.0, "rank_90": 0, "rank_99": 0, "beyond": 0.0}
    held = energy.cumsum(0) / total
    found = {"norm": total**0.5, "stable_rank": total / float(energy[0])}
    for share in _ENERGIES:
        place = int(torch.searchsorted(held, torch.tensor(share, dtype=held.dtype)))
        found[f"rank_{share * 100:.0f}"] = min(place + 1, len(values))
    if target is not None:
        found["beyond"] = float(energy[target:].sum()) / total
    return found


class Decline:
    """The spectra of a model's matrices over a run.

    Args:
        keep: what gives the target rank that energy is counted beyond, as in eckart.scratch.persuasion;
            None: no target.

    `steps` has a pair of the step and {name: summary} for each time it was noted; `first` and `last` hold
    whole spectra.
    """

    def __init__(self, keep: float | None = None) -> None:
        self.keep = keep
        self.steps: list[tuple[int, dict[str, dict[str, float]]]] = []
        self.first: dict[str, list[float]] = {}
        self.last: dict[str, list[float]] = {}

    def note(self, step: int, matrices: Mapping[str, Matrix]) -> None:
        """Take down the spectra at `step`; what was noted at this step before is replaced."""
        found = {name: spectrum(module) for name, module in matrices.items()}
        made = {
            name: summary(values, target_rank((module.out_features, module.in_features), self.keep))
            for (name, values), module in zip(found.items(), matrices.values(), strict=True)
        }
        self.last = {name: values.tolist() for name, values in found.items()}
        self.first = self.first or self.last
        self.steps = [entry for entry in self.steps if entry[0] != step] + [(step, made)]

    def mean(self, key: str) -> list[tuple[int, float]]:
        """Return (step, mean over the matrices) of one entry of the summaries."""
        return [
            (step, sum(one[key] for one in found.values()) / len(found))
            for step, found in self.steps
            if all(key in one for one in found.values())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        steps = [{"step": step, "matrices": found} for step, found in self.steps]
        return {"keep": self.keep, "steps": steps, "first": self.first, "last": self.last}

    def take(self, values: Mapping[str, Any]) -> None:
        """Take up what `to_dict` returned."""
        self.keep, self.first, self.last = values["keep"], dict(values["first"]), dict(values["last"])
        self.steps = [(entry["step"], entry["matrices"]) for entry in values["steps"]]


def plot(decline: Decline, path: Path) -> bool:
    """Draw the decline as a PNG; return False where matplotlib is missing.

    Left, over the steps: the mean stable rank, and the share of energy beyond the target rank, if any.
    Right: the mean share of energy beyond each share of the rank, at the start and in the end.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    stable = decline.mean("stable_rank")
    left.plot(*zip(*stable, strict=True), "o-", color="tab:blue")
    left.set(xlabel="step", ylabel="mean stable rank", ylim=(0, None))
    beyond = decline.mean("beyond")
    if beyond:
        other = left.twinx()
        other.plot(*zip(*beyond, strict=True), "s--", color="tab:red")
        other.set(ylabel="energy beyond the target rank", ylim=(0, None))
    for label, spectra in (("start", decline.first), ("end", decline.last)):
        shares = torch.linspace(0, 1, 101)
        right.plot(shares, _beyond(spectra, shares), label=label)
    right.set(xlabel="share of the rank", ylabel="energy beyond", yscale="log", ylim=(1e-6, 1.1))
    right.legend()
    figure.savefig(path, dpi=120)
    return True


def _beyond(spectra: Mapping[str, list[float]], shares: Tensor) -> Tensor:
    rows = []
    for values in spectra.values():
        energy = torch.tensor(values, dtype=torch.float64).square()
        tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
        rows.append(tail[(shares * len(values)).long()] / tail[0].clamp(min=torch.finfo(tail.dtype).tiny))
    return torch.stack(rows).mean(0)
