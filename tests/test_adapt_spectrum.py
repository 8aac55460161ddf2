"""Ranks of a difference: energy, budget, the threshold for noise."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart import ConfigError, NotFinite, RankError
from eckart.adapt import spectrum
from eckart.adapt.spectrum import Budget, Noise
from eckart.linalg import Metric, weighted_svd
from eckart.ranks import Energy, Fixed
from eckart.spectra import noise_threshold, rank_at, singular_values, tail

sides = st.integers(1, 9)
spectra = st.lists(st.floats(0, 100), min_size=1, max_size=6).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def random(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(sides, sides)
def test_the_spectrum_is_that_of_the_svd(m: int, n: int) -> None:
    matrix = random(m, n)
    assert torch.allclose(singular_values(matrix), torch.linalg.svdvals(matrix), atol=1e-6)


@given(sides, sides)
def test_the_weighted_spectrum_is_that_of_the_weighted_svd(m: int, n: int) -> None:
    matrix, rows = random(m, n), random(3 * n, n, seed=1)
    metric = Metric(n, rows.T @ rows / len(rows), 1e-3)
    found = weighted_svd(matrix, metric, Metric(m)).spectrum
    assert torch.allclose(singular_values(matrix, metric), found, atol=1e-6)


@given(spectra)
def test_the_tail_is_the_squared_error_of_every_rank(values: torch.Tensor) -> None:
    found = tail(values)
    for rank in range(len(values) + 1):
        assert float(found[rank]) == pytest.approx(float(values[rank:].square().sum()), abs=1e-9)


@given(spectra, st.floats(0.01, 1))
def test_energy_takes_the_fewest_terms_that_hold_it(values: torch.Tensor, fraction: float) -> None:
    found = rank_at(values, fraction)
    squares = values.square()
    whole = float(squares.sum())
    held = [float(squares[:rank].sum()) for rank in range(len(values) + 1)]
    assert held[found] >= fraction * whole - 1e-9 * whole
    assert found == 0 or held[found - 1] <= fraction * whole + 1e-9 * whole


def test_nothing_has_rank_0() -> None:
    assert rank_at(torch.zeros(3), 1.0) == 0
    assert spectrum.rank(Noise(), torch.zeros(3), (3, 3)) == 0
    assert spectrum.share(Budget(5), {}, {}) == {}


@settings(deadline=None)
@given(st.lists(spectra, min_size=1, max_size=3), st.integers(1, 60))
def test_a_budget_is_kept_and_no_term_is_better_elsewhere(values: list[torch.Tensor], limit: int) -> None:
    """Of all ranks on the same cost or less none has a squared error below, where terms cost the same."""
    named = {str(index): one for index, one in enumerate(values)}
    shapes = dict.fromkeys(named, (2, 3))
    if limit < 5:
        with pytest.raises(
            RankError, match=f"a budget of {limit} parameters holds no term .* the least is 5"
        ):
            spectrum.share(Budget(limit), named, shapes)
        return
    found = spectrum.share(Budget(limit), named, shapes)
    assert sum(5 * rank for rank in found.values()) <= limit

    def error(ranks: Any) -> float:
        return sum(float(tail(one)[rank]) for one, rank in zip(values, ranks, strict=True))

    legal = itertools.product(*(range(len(one) + 1) for one in values))
    best = min(error(ranks) for ranks in legal if 5 * sum(ranks) <= limit)
    assert error(found.values()) == pytest.approx(best, abs=1e-6)


def test_equal_terms_of_different_matrices_share_a_budget() -> None:
    first, second = torch.tensor([65.0, 65, 65, 65, 1]), torch.tensor([65.0, 65, 41.2, 1.2])
    found = spectrum.share(Budget(25), {"a": first, "b": second}, {"a": (2, 3), "b": (2, 3)})
    assert found["a"] + found["b"] == 5
    assert found["a"] < 5


def test_a_term_is_weighed_against_its_cost() -> None:
    values = {"small": torch.tensor([1.0]), "large": torch.tensor([1.2])}
    shapes = {"small": (2, 2), "large": (10, 10)}
    assert spectrum.share(Budget(20), values, shapes) == {"small": 1, "large": 0}
    assert spectrum.share(Budget(24), values, shapes) == {"small": 1, "large": 1}


@pytest.mark.parametrize("beta", [0.05, 0.25, 0.5, 0.75, 1.0])
def test_the_threshold_is_the_published_one(beta: float) -> None:
    """Gavish & Donoho 2014: 2.858 of a square matrix, and the cubic of equation 5, right to 0.02."""
    found = noise_threshold(torch.ones(3), (round(beta * 10_000), 10_000))
    cubic = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    assert found == pytest.approx(cubic, abs=0.02)
    assert beta < 1 or found == pytest.approx(2.858, abs=6e-4)
    assert noise_threshold(2 * torch.ones(3), (10_000, round(beta * 10_000))) == 2 * found


def test_noise_has_no_terms_and_a_signal_above_it_has_its_own() -> None:
    noise = random(60, 90) * 0.01
    signal = random(60, 2, 1) @ random(2, 90, 2)
    assert spectrum.rank(Noise(), singular_values(noise), (60, 90)) == 0
    assert spectrum.rank(Noise(), singular_values(signal + noise), (60, 90)) == 2


def test_the_rank_of_each_rule() -> None:
    values = torch.tensor([3.0, 2.0, 1.0])
    assert spectrum.rank(Fixed(2), values, (3, 9)) == 2
    assert spectrum.rank(Fixed(5), values, (3, 9)) == 3
    assert spectrum.rank(Energy(0.9), values, (3, 9)) == 2
    assert spectrum.rank(Energy(1.0), values, (3, 9)) == 3


def test_one_rule_is_taken_and_said_in_words() -> None:
    rules = {
        "rank at most 4": spectrum.rule(rank=4),
        "energy 0.9": spectrum.rule(energy=0.9),
        "at most 1,000 parameters": spectrum.rule(params=1000),
        "terms above the noise": spectrum.rule(noise=True),
    }
    assert list(rules.values()) == [Fixed(4), Energy(0.9), Budget(1000), Noise()]
    assert list(rules) == [spectrum.describe(one) for one in rules.values()]


@pytest.mark.parametrize(
    ("given_", "kind", "message"),
    [
        ({}, ConfigError, "got no rule for ranks: give exactly one of rank, energy, a budget or, to extract"),
        ({"rank": 2, "noise": True}, ConfigError, "got rank and noise: give exactly one"),
        ({"rank": 0}, RankError, "rank 0: must be at least 1"),
        ({"energy": 1.5}, ConfigError, r"energy 1.5: must lie in \(0, 1\]"),
        ({"energy": math.nan}, ConfigError, "energy nan: must lie in"),
        ({"params": 0}, RankError, "a budget of 0 parameters: must be at least 1"),
    ],
)
def test_other_rules_are_refused(given_: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        spectrum.rule(**given_)


def test_what_is_no_number_has_no_spectrum() -> None:
    with pytest.raises(NotFinite, match="NaN or infinite"):
        singular_values(torch.full((2, 2), math.nan))
