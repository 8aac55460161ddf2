"""How many terms a difference keeps: fixed, by energy, under a budget of parameters, or above the noise.

Pure functions of spectra and shapes. A rank is a number here that may be 0: the difference is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, RankError
from ..ranks import Energy, Fixed
from ..spectra import noise_threshold, rank_at


@dataclass(frozen=True, slots=True)
class Budget:
    """Keep the terms that are largest per parameter, over all matrices, within `parameters`."""

    parameters: int

    def __post_init__(self) -> None:
        if self.parameters < 1:
            raise RankError(f"a budget of {self.parameters:,} parameters: must be at least 1")


@dataclass(frozen=True, slots=True)
class Noise:
    """Keep the terms above the optimal threshold for noise of unknown strength (eckart.spectra)."""


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
