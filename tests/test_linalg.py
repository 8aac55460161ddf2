"""Laws of the decompositions: every optimum is checked against its definition, never against a recording."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import ConfigError, NotFinite, NotPositiveDefinite, RankError
from eckart.linalg import (
    SVD,
    Metric,
    RowSkeleton,
    WeightedSVD,
    pivot_rows,
    randomized_bound,
    randomized_svd,
    truncated_svd,
    weighted_error,
    weighted_svd,
)

FAST = settings(deadline=None, max_examples=25, derandomize=True)
KINDS = ("identity", "diagonal", "full")
PAIRS = list(product(KINDS, KINDS))
SHAPES = [(9, 5), (5, 9), (6, 6)]
SIDES = st.integers(1, 10)
SEEDS = st.integers(0, 10_000)
SPREAD = 1e3
"""Condition number of every metric made here; it enters the tolerances of the weighted laws."""


def rounding(matrix: Tensor, scale: float = 10.0, dtype: torch.dtype = torch.float64) -> float:
    return scale * torch.finfo(dtype).eps * max(matrix.shape) * float(matrix.double().norm())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(gaussian(rows, columns, generator)).Q
    return basis


def with_spectrum(values: Tensor, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    left, right = (orthonormal(side, len(values), generator) for side in shape)
    return (left * values) @ right.T


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    value = st.one_of(st.just(0.0), st.floats(1e-9, 1e3))
    values = torch.tensor(draw(st.lists(value, min_size=1, max_size=8)), dtype=torch.float64)
    shape = (len(values), len(values) + draw(st.integers(0, 6)))
    matrix = with_spectrum(values, shape, seeded(draw(SEEDS)))
    return matrix.T if draw(st.booleans()) else matrix


def spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


@dataclass(frozen=True, slots=True)
class Problem:
    """A weight and both of its metrics, `gram (n, n)` and `curvature (m, m)` written out in full."""

    weight: Tensor
    gram: Tensor
    curvature: Tensor
    inputs: Metric
    outputs: Metric

    def solve(self) -> WeightedSVD:
        return weighted_svd(self.weight, self.inputs, self.outputs)

    def loss(self, candidate: Tensor) -> float:
        error = self.weight - candidate
        return float((self.curvature @ error @ self.gram @ error.T).trace())

    def rooted(self) -> Tensor:
        return root(self.curvature) @ self.weight @ root(self.gram)


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    rooted: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return rooted


def moment(kind: str, size: int, generator: torch.Generator) -> Tensor | None:
    if kind == "identity":
        return None
    values = torch.logspace(-2, 1, size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
    if kind == "diagonal":
        return values
    basis = orthonormal(size, size, generator)
    return (basis * values) @ basis.T


def written_out(moment: Tensor | None, size: int) -> Tensor:
    if moment is None:
        return torch.eye(size, dtype=torch.float64)
    return moment.diag() if moment.ndim == 1 else moment


def problem(shape: tuple[int, int], kinds: tuple[str, str], seed: int, rank: int | None = None) -> Problem:
    generator = seeded(seed)
    rows, columns = shape
    inner = min(shape) if rank is None else rank
    weight = gaussian(rows, inner, generator) @ gaussian(inner, columns, generator)
    inputs, outputs = moment(kinds[0], columns, generator), moment(kinds[1], rows, generator)
    return Problem(
        weight,
        written_out(inputs, columns),
        written_out(outputs, rows),
        Metric(columns, inputs),
        Metric(rows, outputs),
    )


def cut(found: WeightedSVD, rank: int) -> Tensor:
    return found.left[:, :rank] @ found.right[:rank]


# Eckart & Young


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(exact=matrices())
@FAST
def test_a_truncation_errs_by_the_tail_of_the_spectrum(dtype: torch.dtype, exact: Tensor) -> None:
    matrix = exact.to(dtype)
    spectrum = torch.linalg.svdvals(matrix.double())
    for rank in range(1, min(matrix.shape) + 1):
        error = float((matrix - truncated_svd(matrix, rank).dense()).double().norm())
        assert error == pytest.approx(float(spectrum[rank:].norm()), rel=0, abs=rounding(matrix, 10, dtype))
    untreated = float(spectrum.norm() - spectrum[1:].norm())
    assert untreated > rounding(matrix, 10, dtype) or not spectrum.any()


@given(matrix=matrices())
@FAST
def test_the_sides_are_orthonormal_and_the_values_descend(matrix: Tensor) -> None:
    rank = min(matrix.shape)
    found = truncated_svd(matrix, rank)
    eye = torch.eye(rank, dtype=torch.float64)
    assert (found.left.T @ found.left - eye).norm() <= rounding(eye)
    assert (found.right @ found.right.T - eye).norm() <= rounding(eye)
    assert (found.values.diff() <= 0).all()
    assert (found.values >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("decompose", [truncated_svd, randomized_svd])
def test_parts_come_back_in_the_dtype_of_the_matrix(
    decompose: Callable[[Tensor, int], SVD], dtype: torch.dtype
) -> None:
    found = decompose(gaussian(5, 7, seeded(0)).to(dtype), 3)
    assert {found.left.dtype, found.values.dtype, found.right.dtype} == {dtype}


# weighted SVD, under every combination of metrics


@pytest.mark.parametrize("kinds", PAIRS)
@given(rows=SIDES, columns=SIDES, seed=SEEDS)
@FAST
def test_every_weighted_truncation_costs_its_tail(
    kinds: tuple[str, str], rows: int, columns: int, seed: int
) -> None:
    case = problem((rows, columns), kinds, seed)
    found = case.solve()
    tail = found.tail()
    energy = float(case.rooted().square().sum())
    allowed = rounding(case.weight, SPREAD) / float(case.weight.norm()) * energy
    assert len(tail) == min(rows, columns) + 1
    for rank in range(len(tail)):
        error = weighted_error(case.weight - cut(found, rank), case.inputs, case.outputs)
        assert error == pytest.approx(float(tail[rank]), rel=0, abs=allowed)
        assert error == pytest.approx(case.loss(cut(found, rank)), rel=0, abs=allowed)
    assert tail[0] - tail[1] > allowed
    assert tail[-1] == 0
    assert (tail.diff() <= 0).all()


@pytest.mark.parametrize("kinds", PAIRS)
@given(rows=SIDES, columns=SIDES, seed=SEEDS, deficient=st.booleans())
@FAST
def test_the_weighted_spectrum_is_that_of_the_rooted_matrix(
    kinds: tuple[str, str], rows: int, columns: int, seed: int, deficient: bool
) -> None:
    # The Gram matrix squares the condition number, so every value is right to about
    # sqrt(eps) = 1.5e-8 of the largest, times the root of the size.
    rank = max(1, min(rows, columns) // 2) if deficient else None
    case = problem((rows, columns), kinds, seed, rank)
    expected = torch.linalg.svdvals(case.rooted())
    absolute = 3e-8 * float(expected[0]) * max(rows, columns) ** 0.5
    assert (case.solve().spectrum - expected).abs().max() <= absolute
    if kinds != ("identity", "identity"):
        assert (torch.linalg.svdvals(case.weight) - expected).abs().max() > absolute


@pytest.mark.parametrize("kinds", PAIRS)
@given(rows=SIDES, columns=SIDES, seed=SEEDS)
@FAST
def test_nothing_is_lost_at_full_rank(kinds: tuple[str, str], rows: int, columns: int, seed: int) -> None:
    case = problem((rows, columns), kinds, seed)
    found = case.solve()
    full = min(rows, columns)
    assert (cut(found, full) - case.weight).norm() <= rounding(case.weight, SPREAD)
    assert (cut(found, full - 1) - case.weight).norm() > rounding(case.weight, SPREAD)


@pytest.mark.parametrize("kinds", PAIRS)
@given(rows=SIDES, columns=SIDES, seed=SEEDS, data=st.data())
@FAST
def test_no_other_matrix_of_that_rank_has_a_smaller_weighted_error(
    kinds: tuple[str, str], rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    case = problem((rows, columns), kinds, seed)
    rank = data.draw(st.integers(1, min(rows, columns)))
    step = data.draw(st.sampled_from([1e-6, 1e-3, 1.0]))
    found, generator = case.solve(), seeded(seed + 1)
    left, right = found.left[:, :rank], found.right[:rank]
    rivals = {
        "plain SVD": truncated_svd(case.weight, rank).dense(),
        "random": gaussian(rows, rank, generator) @ gaussian(rank, columns, generator),
        "neighbour": (left + step * gaussian(rows, rank, generator))
        @ (right + step * gaussian(rank, columns, generator)),
    }
    allowed = rounding(case.rooted(), SPREAD) * float(case.rooted().norm())
    for name, rival in rivals.items():
        assert case.loss(cut(found, rank)) <= case.loss(rival) + allowed, name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kinds", [pair for pair in PAIRS if pair != ("identity", "identity")])
def test_plain_svd_misses_the_weighted_optimum(shape: tuple[int, int], kinds: tuple[str, str]) -> None:
    case = problem(shape, kinds, 3)
    assert case.loss(truncated_svd(case.weight, 2).dense()) > 1.02 * case.loss(cut(case.solve(), 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_without_metrics_it_is_the_plain_svd(shape: tuple[int, int]) -> None:
    case = problem(shape, ("identity", "identity"), 5)
    for rank in range(1, min(shape)):
        plain = truncated_svd(case.weight, rank).dense()
        assert (cut(case.solve(), rank) - plain).norm() <= rounding(case.weight, SPREAD)
        assert (cut(case.solve(), rank + 1) - plain).norm() > rounding(case.weight, SPREAD)


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(2, 10), columns=st.integers(2, 10), seed=SEEDS)
@FAST
def test_an_orthogonal_change_of_the_output_basis_commutes(
    kind: str, rows: int, columns: int, seed: int
) -> None:
    case = problem((rows, columns), (kind, "full"), seed)
    turn = orthonormal(rows, rows, seeded(seed + 1))
    outputs = Metric(rows, turn @ case.curvature @ turn.T)
    turned = weighted_svd(turn @ case.weight, case.inputs, outputs)
    found, rank = case.solve(), min(rows, columns) // 2
    squares = found.spectrum.square()
    # A subspace is determined up to rounding / gap.
    gap = float((squares[rank - 1] - squares[rank]) / squares[0])
    assume(gap > 1e-3)
    allowed = rounding(case.weight, SPREAD) / gap
    assert (cut(turned, rank) - turn @ cut(found, rank)).norm() <= allowed
    assert (cut(turned, rank) - cut(found, rank)).norm() > allowed


@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_metric_has_to_turn_with_the_basis(shape: tuple[int, int]) -> None:
    case = problem(shape, ("full", "full"), 11)
    turn = orthonormal(shape[0], shape[0], seeded(12))
    untreated = weighted_svd(turn @ case.weight, case.inputs, case.outputs)
    assert (cut(untreated, 2) - turn @ cut(case.solve(), 2)).norm() > 1e-3 * case.weight.norm()


@given(rows=SIDES, columns=SIDES, tokens=st.integers(11, 40), seed=SEEDS)
@FAST
def test_the_gram_matrix_of_the_inputs_beats_plain_svd_on_those_inputs(
    rows: int, columns: int, tokens: int, seed: int
) -> None:
    generator = seeded(seed)
    weight = gaussian(rows, columns, generator)
    inputs = gaussian(tokens, columns, generator) * torch.logspace(-1, 1, columns, dtype=torch.float64)
    found = weighted_svd(weight, Metric(columns, inputs.T @ inputs / tokens), Metric(rows))
    dense = inputs @ weight.T
    for rank in range(1, min(rows, columns) + 1):
        weighted = (dense - inputs @ cut(found, rank).T).norm()
        plain = (dense - inputs @ truncated_svd(weight, rank).dense().T).norm()
        assert weighted <= plain + rounding(dense, SPREAD)
        assert weighted.square() / tokens == pytest.approx(
            float(found.tail()[rank]), rel=0, abs=rounding(dense, SPREAD) * float(dense.norm())
        )


def test_an_outlier_channel_costs_plain_svd_most_of_the_output() -> None:
    generator = seeded(0)
    weight, inputs = gaussian(8, 12, generator), gaussian(100, 12, generator)
    inputs[:, 3] *= 100
    found = weighted_svd(weight, Metric(12, inputs.T @ inputs / 100), Metric(8))
    dense = inputs @ weight.T
    weighted, plain = (
        float((dense - inputs @ low_rank.T).norm() / dense.norm())
        for low_rank in (cut(found, 4), truncated_svd(weight, 4).dense())
    )
    assert weighted < 0.05 < 0.2 < plain


@pytest.mark.parametrize(("shape", "singular"), [((4, 9), "inputs"), ((9, 4), "outputs")])
def test_a_singular_metric_on_the_larger_side_needs_no_inverse(shape: tuple[int, int], singular: str) -> None:
    generator = seeded(1)
    weight, basis = gaussian(*shape, generator), orthonormal(9, 6, generator)
    gram = basis @ basis.T
    metrics = {"inputs": Metric(shape[1]), "outputs": Metric(shape[0])} | {singular: Metric(9, gram)}
    found = weighted_svd(weight, **metrics)
    larger = gram @ weight.T if singular == "inputs" else gram @ weight
    assert (found.spectrum - torch.linalg.svdvals(larger)).abs().max() <= 1e-8 * found.spectrum[0]
    assert (cut(found, 4) - weight).norm() <= rounding(weight, SPREAD)
    error = weight - cut(found, 2)
    projected = gram @ (error.T if singular == "inputs" else error)
    assert projected.square().sum() == pytest.approx(float(found.tail()[2]), rel=1e-10)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize(
    ("shape", "singular"), [((9, 4), "inputs"), ((4, 9), "outputs"), ((4, 4), "outputs")]
)
def test_a_singular_metric_that_must_be_inverted_is_refused(
    shape: tuple[int, int], singular: str, kind: str
) -> None:
    gram = torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    gram = gram.diagonal() if kind == "diagonal" else gram
    for damp, refused in ((0.0, True), (1e-6, False)):
        metrics = {"inputs": Metric(shape[1]), "outputs": Metric(shape[0])} | {
            singular: Metric(4, gram, damp)
        }
        weight = gaussian(*shape, seeded(2))
        if refused:
            message = (
                r"metric of size 4 has smallest eigenvalue .* of largest 2 and must be inverted: "
                r"raise `damp`, or calibrate on more than 4 tokens"
            )
            with pytest.raises(NotPositiveDefinite, match=message):
                weighted_svd(weight, **metrics)
        else:
            found = weighted_svd(weight, **metrics)
            # The condition number of the damped metric is 2e6, of its root 1.5e3.
            assert (cut(found, 4) - weight).norm() <= rounding(weight, 1e4)


def test_fewer_tokens_than_channels_are_refused_where_the_metric_is_inverted() -> None:
    inputs = gaussian(3, 5, seeded(3))
    with pytest.raises(NotPositiveDefinite, match="calibrate on more than 5 tokens"):
        weighted_svd(gaussian(8, 5, seeded(4)), Metric(5, inputs.T @ inputs), Metric(8))


def test_a_weighted_error_needs_no_inverse() -> None:
    curvature = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    error = gaussian(3, 2, seeded(5))
    expected = float((curvature @ error @ error.T).trace())
    assert weighted_error(error, Metric(2), Metric(3, curvature)) == pytest.approx(expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 4), (3, 5), (1, 4), (4, 3)])
def test_metrics_of_the_wrong_size_are_refused(inputs: int, outputs: int) -> None:
    message = f"a weight of 4 x 3 with metrics for {outputs} outputs and {inputs} inputs"
    for moment in (None, torch.ones(inputs)):
        with pytest.raises(ConfigError, match=message):
            weighted_svd(gaussian(4, 3, seeded(0)), Metric(inputs, moment), Metric(outputs))


# randomised SVD


@given(rank=st.integers(1, 6), rows=st.integers(6, 20), columns=st.integers(6, 20), seed=SEEDS)
@FAST
def test_a_sketch_is_exact_on_a_matrix_of_that_rank(rank: int, rows: int, columns: int, seed: int) -> None:
    values = torch.linspace(2, 1, rank, dtype=torch.float64)
    matrix = with_spectrum(values, (rows, columns), seeded(seed))
    found = randomized_svd(matrix, rank)
    assert (matrix - found.dense()).norm() <= rounding(matrix, 100)
    assert (found.values - values).abs().max() <= rounding(matrix, 100)
    if rank > 1:
        assert (matrix - randomized_svd(matrix, rank - 1).dense()).norm() > rounding(matrix, 100)


def mean_error(matrix: Tensor, rank: int, oversampling: int, power_iterations: int, draws: int = 8) -> float:
    errors = [
        spectral_norm(
            matrix
            - randomized_svd(
                matrix,
                rank,
                oversampling=oversampling,
                power_iterations=power_iterations,
                generator=seeded(draw),
            ).dense()
        )
        for draw in range(draws)
    ]
    return sum(errors) / draws


@given(
    base=st.floats(0.3, 0.98),
    rank=st.integers(1, 8),
    oversampling=st.integers(2, 8),
    power_iterations=st.integers(0, 3),
    seed=SEEDS,
)
@FAST
def test_the_mean_error_of_a_sketch_stays_within_the_bound(
    base: float, rank: int, oversampling: int, power_iterations: int, seed: int
) -> None:
    values = base ** torch.arange(20, dtype=torch.float64)
    matrix = with_spectrum(values, (24, 20), seeded(seed))
    error = mean_error(matrix, rank, oversampling, power_iterations)
    bound = randomized_bound((24, 20), rank, oversampling, power_iterations) * float(values[rank])
    assert float(values[rank]) <= error * (1 + 1e-12)
    assert error <= bound + rounding(matrix)


def test_the_bound_says_something() -> None:
    values = 0.5 ** torch.arange(20, dtype=torch.float64)
    for power_iterations in range(3):
        bound = randomized_bound((24, 20), 8, 8, power_iterations) * float(values[8])
        assert bound < values[0]


def test_power_iterations_help_on_average() -> None:
    values = torch.arange(1, 41, dtype=torch.float64).rsqrt()
    matrix = with_spectrum(values, (60, 40), seeded(1))
    errors = [mean_error(matrix, 5, 2, power_iterations) for power_iterations in range(4)]
    assert errors == sorted(errors, reverse=True)
    excess = [error - float(values[5]) for error in errors]
    assert excess[2] < excess[0] / 2


def test_a_sketch_as_wide_as_the_matrix_is_the_svd() -> None:
    matrix = gaussian(9, 6, seeded(2))
    best = truncated_svd(matrix, 3).dense()
    wide, narrow = (randomized_svd(matrix, 3, oversampling=extra, power_iterations=0) for extra in (3, 0))
    assert (wide.dense() - best).norm() <= rounding(matrix, 100)
    assert (narrow.dense() - best).norm() > rounding(matrix, 100)


def test_a_sketch_is_reproducible() -> None:
    matrix = gaussian(30, 20, seeded(0))
    default = randomized_svd(matrix, 4, power_iterations=0).dense()
    state = torch.get_rng_state()
    assert torch.equal(default, randomized_svd(matrix, 4, power_iterations=0).dense())
    assert torch.equal(state, torch.get_rng_state())
    seeds = [0, 5, 5]
    zero, first, second = (
        randomized_svd(matrix, 4, power_iterations=0, generator=seeded(seed)).dense() for seed in seeds
    )
    assert torch.equal(default, zero)
    assert torch.equal(first, second)
    assert not torch.equal(default, first)


def test_the_bound_falls_with_power_iterations_and_needs_oversampling() -> None:
    bounds = [randomized_bound((100, 80), 10, 5, power_iterations) for power_iterations in range(4)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds == pytest.approx([bounds[0] ** (1 / (2 * power + 1)) for power in range(4)], rel=1e-12)
    assert bounds[-1] > 1
    assert randomized_bound((100, 80), 10, 1, 2) == float("inf")


@pytest.mark.parametrize(("oversampling", "power_iterations"), [(-1, 2), (10, -1)])
def test_negative_options_of_a_sketch_are_refused(oversampling: int, power_iterations: int) -> None:
    message = f"oversampling={oversampling}, power_iterations={power_iterations}: both must be >= 0"
    with pytest.raises(ConfigError, match=message):
        randomized_svd(torch.eye(3), 2, oversampling=oversampling, power_iterations=power_iterations)


# metrics


@pytest.mark.parametrize("kind", KINDS)
@given(size=SIDES, columns=SIDES, seed=SEEDS)
@FAST
def test_a_metric_agrees_with_its_matrix(kind: str, size: int, columns: int, seed: int) -> None:
    generator = seeded(seed)
    found = moment(kind, size, generator)
    metric, full = Metric(size, found), written_out(found, size)
    matrix = gaussian(size, columns, generator)
    rooted = metric.root_times(matrix)
    allowed = rounding(matrix, 10 * SPREAD)
    assert (rooted - root(full) @ matrix).norm() <= allowed
    assert (metric.inverse_root_times(rooted) - matrix).norm() <= allowed
    assert (metric.times(matrix) - full @ matrix).norm() <= allowed
    if kind != "identity":
        assert (rooted - matrix).norm() > allowed
        assert (metric.times(matrix) - matrix).norm() > allowed


@given(size=SIDES, damp=st.floats(1e-3, 10), seed=SEEDS)
@FAST
def test_damping_adds_a_fraction_of_the_mean_of_the_diagonal(size: int, damp: float, seed: int) -> None:
    gram = moment("full", size, seeded(seed))
    assert gram is not None
    added = damp * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    full, diagonal = Metric(size, gram, damp), Metric(size, gram.diagonal(), damp)
    allowed = rounding(gram + added)
    assert (full.times(eye) - gram - added).norm() <= allowed
    assert (full.times(eye) - gram).norm() > allowed
    assert (diagonal.times(eye) - gram.diagonal().diag() - added).norm() <= allowed
    scaled = Metric(size, 7 * gram, damp)
    assert (scaled.times(eye) - 7 * full.times(eye)).norm() <= 7 * allowed


def test_rounding_asymmetry_of_a_metric_is_averaged_away() -> None:
    gram = torch.tensor([[2.0, 0.5], [0.25, 1.0]])
    found = Metric(2, gram).times(torch.eye(2, dtype=torch.float64))
    assert torch.equal(found, found.T)
    assert torch.equal(found, ((gram + gram.T) / 2).double())


def test_an_illegal_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"damp=-0.1: must be >= 0"):
        Metric(2, torch.eye(2), damp=-0.1)
    with pytest.raises(
        ConfigError, match=r"metric of shape \(3, 2\) for a side of 3: give \(3,\) or \(3, 3\)"
    ):
        Metric(3, torch.ones(3, 2))
    with pytest.raises(NotFinite, match="the metric has NaN or infinite entries: look at the calibration"):
        Metric(2, torch.tensor([1.0, float("nan")]))


# degenerate matrices

Reconstruct = Callable[[Tensor, int], Tensor]


def by_weighted(matrix: Tensor, rank: int) -> Tensor:
    rows, columns = matrix.shape
    return cut(weighted_svd(matrix, Metric(columns), Metric(rows)), rank)


DECOMPOSITIONS: dict[str, Reconstruct] = {
    "truncated": lambda matrix, rank: truncated_svd(matrix, rank).dense(),
    "randomized": lambda matrix, rank: randomized_svd(matrix, rank).dense(),
    "weighted": by_weighted,
}


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (4, 6), (6, 4)])
def test_a_zero_matrix_is_reproduced(name: str, shape: tuple[int, int]) -> None:
    found = DECOMPOSITIONS[name](torch.zeros(shape, dtype=torch.float64), 1)
    assert torch.equal(found, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_a_single_row_or_column_has_rank_one(name: str, shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape, seeded(0))
    assert (DECOMPOSITIONS[name](matrix, 1) - matrix).norm() <= rounding(matrix)
    assert matrix.norm() > rounding(matrix)


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@given(rank=st.integers(1, 4), rows=st.integers(5, 12), columns=st.integers(5, 12), seed=SEEDS)
@FAST
def test_a_deficient_matrix_is_exact_from_its_rank_on(
    name: str, rank: int, rows: int, columns: int, seed: int
) -> None:
    matrix = with_spectrum(torch.ones(rank, dtype=torch.float64), (rows, columns), seeded(seed))
    for kept in range(rank, min(rows, columns) + 1):
        assert (DECOMPOSITIONS[name](matrix, kept) - matrix).norm() <= rounding(matrix, 100)
    if rank > 1:
        assert (DECOMPOSITIONS[name](matrix, rank - 1) - matrix).norm() > rounding(matrix, 100)


ENTRIES: dict[str, Callable[[Tensor], object]] = {
    "truncated": lambda matrix: truncated_svd(matrix, 1),
    "randomized": lambda matrix: randomized_svd(matrix, 1),
    "weighted": lambda matrix: weighted_svd(matrix, Metric(2), Metric(3)),
    "pivot": pivot_rows,
}


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_not_a_finite_matrix_is_refused(name: str) -> None:
    entry = ENTRIES[name]
    for broken in (float("nan"), float("inf")):
        matrix = torch.ones(3, 2)
        matrix[1, 1] = broken
        with pytest.raises(NotFinite, match=r"\(3, 2\) has 1 NaN or infinite entries: repair the weights"):
            entry(matrix)
    for empty in ((0, 2), (3, 0)):
        with pytest.raises(
            ConfigError, match=r"has shape .*: give a matrix with at least one row and column"
        ):
            entry(torch.zeros(empty))
    for dimensions in ((3,), (3, 2, 1)):
        with pytest.raises(ConfigError, match=r"has shape .*: give a matrix with"):
            entry(torch.ones(dimensions))


@pytest.mark.parametrize("decompose", [truncated_svd, randomized_svd])
@pytest.mark.parametrize("rank", [-1, 0, 4])
def test_a_rank_that_no_matrix_of_that_shape_has_is_refused(
    decompose: Callable[[Tensor, int], SVD], rank: int
) -> None:
    with pytest.raises(RankError, match=f"rank {rank} for a 3 x 5 matrix: legal are 1 to 3"):
        decompose(torch.ones(3, 5), rank)


# pivoting


def check_skeleton(left: Tensor, bound: float) -> RowSkeleton:
    found = pivot_rows(left, bound)
    rows, rank = left.shape
    work = left.double()
    assert found.pivots.tolist() == sorted(found.pivots.tolist())
    assert found.rest.tolist() == sorted(found.rest.tolist())
    assert sorted(found.pivots.tolist() + found.rest.tolist()) == list(range(rows))
    assert found.multipliers.shape == (rows - rank, rank)
    assert (found.multipliers @ work[found.pivots] - work[found.rest]).norm() <= rounding(work)
    assert bool((found.multipliers.abs() <= bound + rounding(torch.ones(rows, rank))).all())
    return found


@given(
    rank=st.integers(1, 12),
    extra=st.integers(0, 20),
    bound=st.sampled_from([1.0001, 1.01, 1.5, 2.0, 4.0, 100.0]),
    seed=SEEDS,
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@settings(FAST, max_examples=50)
def test_pivot_rows_span_the_others_with_bounded_multipliers(
    rank: int, extra: int, bound: float, seed: int, dtype: torch.dtype
) -> None:
    check_skeleton(gaussian(rank + extra, rank, seeded(seed)).to(dtype), bound)


def lower_growth(rank: int) -> Tensor:
    """Partial pivoting keeps the order of these rows, whose inverse has entries of 1.99^(rank - 2)."""
    top = torch.eye(rank, dtype=torch.float64) - 0.99 * torch.ones(rank, rank, dtype=torch.float64).tril(-1)
    return torch.cat([top, -0.99 * torch.rand(2 * rank, rank, generator=seeded(0), dtype=torch.float64)])


def wilkinson(rank: int) -> Tensor:
    """The elimination of these rows grows by 2^(rank - 1) though their condition number is about rank."""
    top = torch.eye(rank, dtype=torch.float64) - torch.ones(rank, rank, dtype=torch.float64).tril(-1)
    top[:, -1] = 1
    below = 2 * torch.rand(2 * rank, rank, generator=seeded(0), dtype=torch.float64) - 1
    return torch.cat([top, below])


def kahan(rank: int) -> Tensor:
    cosine, sine = 0.285, (1 - 0.285**2) ** 0.5
    upper = torch.eye(rank, dtype=torch.float64) - cosine * torch.ones(rank, rank, dtype=torch.float64).triu(
        1
    )
    scaled = upper * (sine ** torch.arange(rank, dtype=torch.float64))[:, None]
    return torch.cat([scaled.T, gaussian(5, rank, seeded(0))])


def hilbert(rank: int) -> Tensor:
    places = torch.arange(3 * rank, dtype=torch.float64)
    return 1 / (places[:, None] + places[:rank] + 1)


NASTY: dict[str, Tensor] = {
    "lower growth 10": lower_growth(10),
    "lower growth 40": lower_growth(40),
    "lower growth 100": lower_growth(100),
    "wilkinson 8": wilkinson(8),
    "wilkinson 40": wilkinson(40),
    "wilkinson 60": wilkinson(60),
    "wilkinson 60, orthonormal": torch.linalg.qr(wilkinson(60)).Q,
    "kahan 30": kahan(30),
    "kahan 80": kahan(80),
    "hilbert 6": hilbert(6),
    "scaled columns": gaussian(30, 6, seeded(0)) * torch.logspace(-6, 6, 6, dtype=torch.float64),
}


@pytest.mark.parametrize("bound", [1.01, 2.0, 10.0])
@pytest.mark.parametrize("name", NASTY)
def test_pivot_rows_of_a_nasty_matrix(name: str, bound: float) -> None:
    check_skeleton(NASTY[name], bound)


@pytest.mark.parametrize("rank", [10, 20, 30])
def test_the_first_pivots_alone_break_the_bound(rank: int) -> None:
    left = lower_growth(rank)
    untreated = torch.linalg.solve(left[:rank], left[rank:], left=False)
    assert untreated.abs().max() > 2 ** (rank - 4)
    assert check_skeleton(left, 2.0).pivots.tolist() != list(range(rank))


def test_as_many_rows_as_columns_leave_no_multipliers() -> None:
    found = check_skeleton(gaussian(5, 5, seeded(0)), 2.0)
    assert found.pivots.tolist() == [0, 1, 2, 3, 4]


def test_lu_alone_loses_rows_that_are_well_conditioned() -> None:
    left = wilkinson(40)
    pivots, rest = left[:40], left[40:]
    assert torch.linalg.cond(left) < 20
    untreated = torch.linalg.solve(pivots, rest, left=False)
    assert (untreated @ pivots - rest).norm() > rounding(left)


def test_illegal_pivoting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bound=1.0 \(must exceed 1\), shape 4 x 2 \(must not be wide\)"):
        pivot_rows(torch.ones(4, 2), 1.0)
    with pytest.raises(ConfigError, match=r"shape 2 x 4 \(must not be wide\)"):
        pivot_rows(torch.ones(2, 4))
    for dependent in (torch.ones(3, 2), torch.zeros(3, 2)):
        with pytest.raises(NotPositiveDefinite, match="the 3 x 2 left factor has dependent columns: lower"):
            pivot_rows(dependent)


def test_a_metric_with_a_negative_diagonal_is_refused() -> None:
    for moment in (torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.0], [0.0, -2.0]])):
        with pytest.raises(
            NotPositiveDefinite, match="size 2 has the negative entry -2: give a second moment"
        ):
            Metric(2, moment)


def test_a_moment_of_zeros_tells_no_direction_from_another() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for zeros in (torch.zeros(5), torch.zeros(5, 5)):
        found = weighted_svd(weight, Metric(5, zeros, damp=1e-4), Metric(6))
        plain = weighted_svd(weight, Metric(5), Metric(6))
        assert float(found.spectrum.max()) < 1e-12 < float(plain.spectrum.max())
        product = found.left[:, :2] @ found.right[:2]
        assert torch.allclose(product, plain.left[:, :2] @ plain.right[:2], atol=1e-9)
        with pytest.raises(NotPositiveDefinite, match="must be inverted"):
            weighted_svd(weight, Metric(5, zeros), Metric(6))
