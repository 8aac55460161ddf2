"""Singular values and what they say: known spectra, invariance, metrics, the edge of noise."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart import ConfigError, NotFinite, spectra
from eckart.linalg import Metric, weighted_error, weighted_svd
from eckart.spectra import measure, noise, resolution, singular_values

sides = st.integers(1, 12)
seeds = st.integers(0, 5)
falling = st.lists(st.floats(1e-3, 100), min_size=1, max_size=12).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def random(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int) -> Tensor:
    found: Tensor = torch.linalg.qr(random(size, size, seed)).Q
    return found


def metric(size: int, seed: int, diagonal: bool = False) -> Metric:
    rows = random(2 * size, size, seed) * torch.linspace(0.1, 3, size, dtype=torch.float64)
    moment = rows.T @ rows / len(rows)
    return Metric(size, moment.diagonal().clone() if diagonal else moment, 1e-4)


def close(found: Tensor, expected: Tensor, shape: tuple[int, int]) -> bool:
    return torch.allclose(found, expected, rtol=1e-6, atol=2 * resolution(shape) * float(expected[0]))


@given(falling, st.integers(0, 4), seeds, st.booleans())
def test_a_known_spectrum_comes_back(values: Tensor, more: int, seed: int, flipped: bool) -> None:
    """Diagonal, with rows of zeros, turned by any orthogonal matrices on both sides: the values stay."""
    size = len(values)
    matrix = torch.zeros(size, size + more, dtype=torch.float64)
    matrix[:, :size] = values.diag()
    matrix = matrix.T if flipped else matrix
    shape = (matrix.shape[0], matrix.shape[1])
    turned = rotation(shape[0], seed) @ matrix @ rotation(shape[1], seed + 10)
    for one in (matrix, turned):
        assert close(singular_values(one), values, shape)
    other = singular_values(matrix * torch.linspace(1, 2, shape[1], dtype=torch.float64))
    assert size == 1 or not close(other, values, shape)  # what is no rotation changes them


@given(sides, sides, seeds)
def test_identity_metrics_change_nothing(m: int, n: int, seed: int) -> None:
    matrix = random(m, n, seed)
    plain = singular_values(matrix)
    ones = Metric(n, torch.ones(n, dtype=torch.float64)), Metric(m, torch.eye(m, dtype=torch.float64))
    for own in ((Metric(n), Metric(m)), ones):
        assert close(singular_values(matrix, *own), plain, (m, n))
    assert close(plain, torch.linalg.svdvals(matrix), (m, n))


@given(sides, sides, seeds, st.booleans())
def test_the_metrics_are_roots_on_both_sides(m: int, n: int, seed: int, diagonal: bool) -> None:
    """Those of C^1/2 W H^1/2, whose squares sum to tr(C W H W^T); and of the decomposition that is cut."""
    matrix, inputs, outputs = random(m, n, seed), metric(n, seed + 1, diagonal), metric(m, seed + 2)
    found = singular_values(matrix, inputs, outputs)
    rooted = outputs.root_times(inputs.root_times(matrix.T).T)
    assert close(found, torch.linalg.svdvals(rooted), (m, n))
    assert float(found.square().sum()) == pytest.approx(weighted_error(matrix, inputs, outputs), rel=1e-9)
    assert close(found, weighted_svd(matrix, inputs, outputs).spectrum, (m, n))
    assert not close(found, singular_values(matrix), (m, n))


@given(sides, sides, seeds)
def test_turning_matrix_and_metrics_along_changes_nothing(m: int, n: int, seed: int) -> None:
    matrix, inputs, outputs = random(m, n, seed), metric(n, seed + 1), metric(m, seed + 2)
    left, right = rotation(m, seed + 3), rotation(n, seed + 4)
    turned = Metric(n, right @ inputs.dense() @ right.T), Metric(m, left @ outputs.dense() @ left.T)
    expected = singular_values(matrix, inputs, outputs)
    assert close(singular_values(left @ matrix @ right.T, *turned), expected, (m, n))


def test_a_metric_of_another_size_and_what_is_no_number_are_refused() -> None:
    with pytest.raises(ConfigError, match="a matrix of 3 x 4 with metrics for 3 outputs and 5 inputs"):
        singular_values(random(3, 4), Metric(5))
    with pytest.raises(NotFinite, match="NaN or infinite"):
        singular_values(torch.full((2, 3), math.inf))
    with pytest.raises(ConfigError, match="at least one row"):
        singular_values(torch.zeros(0, 3))


@given(falling)
def test_measures_of_a_diagonal_matrix(values: Tensor) -> None:
    size = len(values)
    found = measure(values, (size, size))
    squares = values.square()
    assert found.energy == pytest.approx(float(squares.sum()))
    assert found.largest == float(values[0])
    assert found.stable_rank == pytest.approx(float((values / values[0]).square().sum()))
    assert 1 - 1e-9 <= found.stable_rank <= size + 1e-9
    assert 1 - 1e-9 <= found.effective_rank <= size + 1e-9
    assert found.condition == pytest.approx(float(values[0] / values[-1]))
    assert list(found.ranks) == sorted(found.ranks)
    for rank, share in zip(found.ranks, spectra.ENERGIES, strict=True):
        assert float(squares[:rank].sum()) >= (share - 1e-9) * found.energy
        assert float(squares[: rank - 1].sum()) <= (share + 1e-9) * found.energy
    for held, share in zip(found.held, spectra.SHARES, strict=True):
        assert held == pytest.approx(float(squares[: math.ceil(share * size)].sum()) / found.energy)
    assert found.held_top is None


@given(st.integers(1, 40), st.floats(0.1, 10))
def test_equal_values_have_full_rank_by_every_measure(size: int, value: float) -> None:
    found = measure(torch.full((size,), value, dtype=torch.float64), (size, size))
    assert found.stable_rank == pytest.approx(size)
    assert found.effective_rank == pytest.approx(size)
    assert found.condition == pytest.approx(1)
    assert 0.9 * size - 1e-6 <= found.ranks[0] <= 0.9 * size + 1  # where a rank meets it, rounding decides


def test_published_values_and_the_top_256() -> None:
    """Roy & Vetterli: exp of the entropy of the shares; 3/4 and 1/4 have 4 / 3^(3/4)."""
    assert spectra.effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75)
    values = torch.cat([torch.full((256,), 2.0), torch.ones(256)]).double()
    assert measure(values, (512, 512)).held_top == pytest.approx(0.8)
    assert measure(values[:256], (256, 300)).held_top == 1
    assert measure(values[:255], (255, 300)).held_top is None


def test_nothing_has_no_rank_and_what_is_singular_no_condition() -> None:
    found = measure(singular_values(torch.zeros(3, 4)), (3, 4))
    assert (found.ranks, found.stable_rank, found.effective_rank) == ((0, 0, 0, 0), 0, 0)
    assert found.condition == math.inf
    assert noise(torch.zeros(3), (3, 4)).above == 0
    values = singular_values(random(40, 3) @ random(3, 50, 1))
    assert spectra.condition(values, (40, 50)) == math.inf
    assert spectra.condition(singular_values(random(40, 50)), (40, 50)) < 100
    assert noise(values, (40, 50)).above == 3


@pytest.mark.parametrize("shape", [(200, 200), (150, 400), (400, 60)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("planted", [0, 1, 7])
def test_the_edge_tells_noise_from_what_was_planted(shape: tuple[int, int], seed: int, planted: int) -> None:
    """White noise has a value or two above its edge at most, and a planted rank r leaves r, at any scale."""
    white = 0.03 * random(*shape, seed)
    signal = random(shape[0], max(planted, 1), seed + 50) @ random(max(planted, 1), shape[1], seed + 60)
    found = noise(singular_values(white + signal if planted else white), shape)
    assert planted <= found.above <= planted + 2
    assert found.sigma == pytest.approx(0.03, rel=0.06)
    assert found.edge == pytest.approx(found.sigma * (shape[0] ** 0.5 + shape[1] ** 0.5))


def test_the_edge_scales_with_the_matrix() -> None:
    values = singular_values(random(50, 80))
    one, other = noise(values, (50, 80)), noise(5 * values, (80, 50))
    assert other.sigma == pytest.approx(5 * one.sigma)
    assert other.edge == pytest.approx(5 * one.edge)
    assert other.above == one.above


@settings(max_examples=20)
@given(falling)
def test_the_share_that_some_hold_grows_to_all(values: Tensor) -> None:
    shares: list[Any] = [spectra.held(values, count) for count in range(len(values) + 2)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == shares[-2] == 1
