"""How many terms a difference keeps: fixed, by energy, under a budget of parameters, or above the noise.

Pure functions of spectra and shapes. A rank is a number here that may be 0: the difference is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, RankError
from ..linalg import Metric, check_matrix, to_float64
from ..ranks import Energy, Fixed

_MEDIAN_POINTS = 20_000


@dataclass(frozen=True, slots=True)
class Budget:
    """Keep the terms that are largest per parameter, over all matrices, within `parameters`."""

    parameters: int

    def __post_init__(self) -> None:
        if self.parameters < 1:
            raise RankError(f"a budget of {self.parameters:,} parameters: must be at least 1")


@dataclass(frozen=True, slots=True)
class Noise:
    """Keep the terms above the optimal threshold for noise of unknown strength (`noise_threshold`)."""


Rule = Fixed | Energy | Budget | Noise


def rule(
    rank: int | None = None, energy: float | None = None, params: int | None = None, noise: bool = False
) -> Rule:
    """Return the one rule that is given.

    Raises:
        ConfigError: none or several are given, or the value is not legal.
        RankError: a rank or a budget below 1.
    """
    given: dict[str, Rule] = {}
    if rank is not None:
        given["rank"] = Fixed(rank)
    if energy is not None:
        given["energy"] = Energy(energy)
    if params is not None:
        given["params"] = Budget(params)
    if noise:
        given["noise"] = Noise()
    if len(given) != 1:
        raise ConfigError(
            f"got {' and '.join(given) or 'no rule for ranks'}: give exactly one of rank, energy, a budget "
            "or, to extract, noise"
        )
    return next(iter(given.values()))


def describe(chosen: Rule) -> str:
    """Return `chosen` in words."""
    if isinstance(chosen, Fixed):
        return f"rank at most {chosen.rank}"
    if isinstance(chosen, Energy):
        return f"energy {chosen.fraction:g}"
    if isinstance(chosen, Budget):
        return f"at most {chosen.parameters:,} parameters"
    return "terms above the noise"


def spectrum(matrix: Tensor, inputs: Metric | None = None) -> Tensor:
    """Return the singular values (k,) of `matrix` (m, n) H^(1/2), descending; H is `inputs`, or the identity.

    From the eigenvalues of the smaller Gram matrix, in float64: values below 1e-8 of the largest are
    rounding.

    Raises:
        NotFinite: an entry is NaN or infinite.
    """
    work = to_float64(check_matrix(matrix))
    if inputs is not None and inputs.moment is not None:
        work = inputs.root_times(work.T).T
    gram = work @ work.T if work.shape[0] <= work.shape[1] else work.T @ work
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp(min=0).sqrt()


def tail(values: Tensor) -> Tensor:
    """Return the squared error of every rank 0 .. k, (k + 1,), descending to 0."""
    squares = values.to(torch.float64).square().flip(0)
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def rank_at(values: Tensor, fraction: float) -> int:
    """Return the fewest terms that hold `fraction` of the squared spectrum `values` (k,); 0 of nothing."""
    errors = tail(values)
    return int((errors > (1 - fraction) * errors[0]).sum())


def noise_threshold(values: Tensor, shape: tuple[int, int]) -> float:
    """Return below which a singular value of a matrix of `shape` (m, n) is noise of unknown strength.

    lambda(beta) / sqrt(mu(beta)) times the median singular value, with beta the ratio of the sides,
    lambda the optimal hard threshold for known noise and mu the median of the Marchenko-Pastur law
    (Gavish & Donoho 2014, equations 11 and 17 and section III.E). For a signal of low rank in white
    noise, in the large, no threshold has a lower mean squared error.
    """
    beta = min(shape) / max(shape)
    root = math.sqrt(beta * beta + 14 * beta + 1)
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
    return known / math.sqrt(_marchenko_pastur_median(beta)) * float(values.median())


def _marchenko_pastur_median(beta: float) -> float:
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # x = low + (high - low) sin^2(t): smooth where the density has a root or, at beta 1, a pole.
    angle = (torch.arange(_MEDIAN_POINTS, dtype=torch.float64) + 0.5) * (math.pi / 2 / _MEDIAN_POINTS)
    points = low + (high - low) * angle.sin().square()
    mass = (angle.sin() * angle.cos()).square() / points
    share = (mass.cumsum(0) - mass / 2) / mass.sum()
    return float(points[int(torch.searchsorted(share, 0.5))])


def rank(chosen: Fixed | Energy | Noise, values: Tensor, shape: tuple[int, int]) -> int:
    """Return the rank that `chosen` gives a matrix of `shape` with the singular values `values` (k,)."""
    if isinstance(chosen, Fixed):
        return min(chosen.rank, len(values))
    if isinstance(chosen, Energy):
        return rank_at(values, chosen.fraction)
    return int((values > noise_threshold(values, shape)).sum())


def share(
    chosen: Budget, spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Return the ranks whose factors fit into the budget, for the least summed squared error.

    A term costs m + n parameters and gains its squared singular value: terms are taken by falling gain per
    parameter, in each matrix from the largest on, as long as they fit. Optimal where all terms cost the
    same, else within the gain of one term of the optimum. Weighted spectra make it the squared error of the
    outputs.

    Raises:
        RankError: the budget does not hold one term of any matrix.
    """
    costs = {name: sum(shapes[name]) for name in spectra}
    left, least = chosen.parameters, min(costs.values(), default=0)
    if left < least:
        raise RankError(
            f"a budget of {left:,} parameters holds no term of any matrix: the least is {least:,}"
        )
    terms = [
        (gain / costs[name], name)
        for name, values in spectra.items()
        for gain in values.to(torch.float64).square().tolist()
        if gain > 0
    ]
    ranks = dict.fromkeys(spectra, 0)
    for _, name in sorted(terms, key=lambda term: -term[0]):
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks
