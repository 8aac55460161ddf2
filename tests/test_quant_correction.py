"""Corrections of quantised matrices: optima in their metrics, and never worse than none."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import ConfigError, NotFinite, RankError
from eckart.factors import LowRank
from eckart.linalg import Metric, weighted_error
from eckart.quant import correction, rounding, storage
from eckart.quant.correction import METHODS, Rounders, correct, fit

examples = hypothesis_settings(max_examples=15, deadline=None)
sides = st.integers(1, 9)
seeds = st.integers(0, 10_000)
ALONE = ("identity", "identity")


def coarse(matrix: Tensor, levels: int = 3) -> Tensor:
    """Round to `levels` steps on each side of zero, by the largest entry of a row."""
    scale = matrix.abs().amax(1, keepdim=True) / levels
    return torch.where(scale > 0, (matrix / scale).round() * scale, 0.0)


def fine(matrix: Tensor) -> Tensor:
    """Round to 8 bits."""
    return coarse(matrix, 127)


def same(matrix: Tensor) -> Tensor:
    """Round nothing."""
    return matrix


def moments(rows: int, columns: int, seed: int) -> dict[Any, Tensor]:
    """Return second moments of correlated inputs and gradients of very different scales."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        mixed = torch.randn(4 * size + 4, size, generator=generator, dtype=torch.float64)
        return mixed @ torch.randn(size, size, generator=generator, dtype=torch.float64).exp()

    inputs, gradients = draw(columns), draw(rows)
    return {
        "absolute": inputs.abs().mean(0),
        "gram": inputs.T @ inputs / len(inputs),
        "gradient": gradients.T @ gradients / len(gradients),
    }


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(name: str, weight: Tensor, rank: int, seed: int = 0, **options: Any) -> correction.Correction:
    method = METHODS[name]
    shape = (weight.shape[0], weight.shape[1])
    inputs, outputs = method.metrics(shape, moments(*shape, seed), 1e-3)
    return correct(weight, coarse, rank, inputs, outputs, **{"steps": method.steps} | options)


def best(error: Tensor, rank: int, inputs: Metric, outputs: Metric) -> float:
    """Return the least error of rank `rank` by the definition: singular values of C^1/2 E H^1/2."""
    rooted = inputs.root_times(outputs.root_times(error).T)
    return float(torch.linalg.svdvals(rooted)[rank:].square().sum())


@pytest.mark.parametrize("name", METHODS)
@given(sides, sides, st.data(), seeds)
@examples
def test_every_error_is_what_it_is_said_to_be_and_not_above_that_of_no_correction(
    name: str, rows: int, columns: int, data: Any, seed: int
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = matrix(rows, columns, seed)
    rounders = Rounders(fine, fine) if METHODS[name].factors else None
    found = of(name, weight, rank, seed, rounders=rounders)
    inputs, outputs = METHODS[name].metrics((rows, columns), moments(rows, columns, seed), 1e-3)
    before = weighted_error(weight - coarse(weight), inputs, outputs)
    close = 1e-9 * weighted_error(weight, inputs, outputs)
    assert found.before == pytest.approx(before, abs=close)
    assert found.after == pytest.approx(weighted_error(weight - found.dense(), inputs, outputs), abs=close)
    assert found.after <= before + close
    assert found.factors.left.shape == (rows, rank)
    assert found.factors.right.shape == (rank, columns)
    assert torch.equal(found.quantised, coarse(found.target))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.steps == 1])
@given(sides, sides, seeds)
@examples
def test_one_step_is_the_optimum_of_every_rank(name: str, rows: int, columns: int, seed: int) -> None:
    weight = matrix(rows, columns, seed)
    metrics = METHODS[name].metrics((rows, columns), moments(rows, columns, seed), 1e-3)
    error = weight - coarse(weight)
    whole = weighted_error(error, *metrics)
    left = [of(name, weight, rank, seed).after for rank in range(1, min(rows, columns) + 1)]
    expected = [best(error, rank, *metrics) for rank in range(1, min(rows, columns) + 1)]
    assert left == pytest.approx(expected, abs=1e-8 * whole + 1e-12)
    assert all(later <= earlier + 1e-8 * whole + 1e-12 for earlier, later in pairwise(left))


def test_each_is_the_best_of_its_own_metric_and_of_no_other() -> None:
    weight = matrix(12, 10, 1)
    shape, seen = (12, 10), moments(12, 10, 1)
    one_step = [name for name, method in METHODS.items() if method.steps == 1 and name != "eora"]
    found = {name: of(name, weight, 3, 1) for name in one_step}
    for name in one_step:
        metrics = METHODS[name].metrics(shape, seen, 1e-3)
        losses = {other: weighted_error(weight - one.dense(), *metrics) for other, one in found.items()}
        assert min(losses, key=losses.__getitem__) == name
        assert sorted(losses.values())[1] > 1.01 * losses[name]


@given(sides, sides, st.data(), seeds)
@examples
def test_lqer_is_qera_where_inputs_are_uncorrelated(rows: int, columns: int, data: Any, seed: int) -> None:
    """For H = diag((E|x|)^2), as of inputs of constant magnitude and random signs."""
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight, absolute = matrix(rows, columns, seed), moments(rows, columns, seed)["absolute"]
    gram = torch.diag(absolute.square())
    lqer = METHODS["lqer"].metrics((rows, columns), {"absolute": absolute}, 0.0)
    qera = METHODS["qera"].metrics((rows, columns), {"gram": gram}, 0.0)
    first, second = (correct(weight, coarse, rank, *metrics) for metrics in (lqer, qera))
    assert first.after == pytest.approx(second.after, rel=1e-6, abs=1e-9 * first.before)
    by_hand = torch.linalg.svd((weight - coarse(weight)) * absolute, full_matrices=False)
    product = (by_hand.U[:, :rank] * by_hand.S[:rank]) @ by_hand.Vh[:rank] / absolute
    loss = weighted_error(weight - coarse(weight) - product, *lqer)
    assert first.after == pytest.approx(loss, rel=1e-6, abs=1e-9 * first.before)


@given(sides, sides, st.data(), seeds)
@examples
def test_alternation_is_not_above_one_step(rows: int, columns: int, data: Any, seed: int) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = matrix(rows, columns, seed)
    steps = [of("loftq", weight, rank, seed, steps=count).after for count in (1, 2, 5)]
    assert steps[0] == pytest.approx(best(weight - coarse(weight), rank, Metric(columns), Metric(rows)))
    assert steps == sorted(steps, reverse=True)


def test_alternation_gains() -> None:
    weight = matrix(24, 24, 3)
    for name in ("loftq", "caldera"):
        assert of(name, weight, 6, 3).after < 0.95 * of(name, weight, 6, 3, steps=1).after


@given(sides, sides, st.data(), seeds)
@examples
def test_caldera_with_exact_factors_is_not_above_qera(rows: int, columns: int, data: Any, seed: int) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = matrix(rows, columns, seed)
    qera = of("qera", weight, rank, seed)
    close = 1e-6 * qera.before
    one = of("caldera", weight, rank, seed, steps=1, rounders=Rounders(same, same))
    assert one.after == pytest.approx(qera.after, abs=close)
    for rounders in (None, Rounders(same, same)):
        assert of("caldera", weight, rank, seed, rounders=rounders).after <= qera.after + close


@pytest.mark.parametrize("name", ["qera", "eckart", "caldera"])
def test_rounded_factors_are_fitted_to_one_another(name: str) -> None:
    def rounder(factor: Tensor) -> Tensor:
        return coarse(factor, 7)

    weight = matrix(20, 16, 5)
    exact = of(name, weight, 4, 5, steps=1)
    found = of(name, weight, 4, 5, steps=1, rounders=Rounders(rounder, rounder))
    inputs, outputs = METHODS[name].metrics((20, 16), moments(20, 16, 5), 1e-3)
    naive = LowRank(*(rounder(factor) for factor in (exact.factors.left, exact.factors.right)))
    alone = weighted_error(weight - exact.quantised - naive.dense(), inputs, outputs)
    assert 0 < found.after - exact.after < 0.9 * (alone - exact.after)
    for factor, unrounded in (
        (found.factors.left, found.unrounded.left),
        (found.factors.right, found.unrounded.right),
    ):
        assert unrounded.dtype == torch.float32
        assert torch.equal(factor, rounder(unrounded).double())


@pytest.mark.parametrize("base", ["nf4", "nf4-dq", "int4", "int2"])
def test_what_was_rounded_gives_the_stored_tensors_again(base: str) -> None:
    """Codes are not returned, so that they are made again of `target` and `unrounded`: the same values."""

    def rounded(name: str) -> Callable[[Tensor], Tensor]:
        return lambda given: storage.get(name).grid(given).rounded(given)

    def stored(name: str, given: Tensor) -> Tensor:
        how, shape = storage.get(name), (given.shape[0], given.shape[1])
        grid = how.grid(given)
        return how.decode(how.pack(grid.codes(given), grid), shape)

    weight, rounders = matrix(24, 70, 7).float(), Rounders(rounded("int8"), rounded("int8"))
    metrics = METHODS["eckart"].metrics((24, 70), moments(24, 70, 7), 1e-3)
    found = correct(weight, rounded(base), 3, *metrics, steps=3, rounders=rounders)
    assert found.after < 0.9 * found.before
    assert torch.equal(found.quantised, stored(base, found.target))
    assert torch.equal(found.factors.left, stored("int8", found.unrounded.left).double())
    assert torch.equal(found.factors.right, stored("int8", found.unrounded.right).double())


def test_a_correction_that_only_hurts_is_none() -> None:
    weight = matrix(6, 5, 0)
    bad = Rounders(lambda factor: 1e3 * factor.sign(), lambda factor: 1e3 * factor.sign())
    found = of("qera", weight, 2, rounders=bad)
    assert found.after == found.before
    assert not found.factors.dense().any()
    assert found.unrounded.left.dtype == torch.float32
    assert torch.equal(found.dense(), coarse(weight))


def test_a_matrix_that_is_on_the_grid_needs_no_correction() -> None:
    for name in METHODS:
        found = of(name, coarse(matrix(6, 5, 0)), 2)
        assert found.after == pytest.approx(0, abs=1e-20)


@given(sides, sides, seeds, st.floats(0.1, 10))
@examples
def test_tails_are_the_errors_of_every_rank(rows: int, columns: int, seed: int, unit: float) -> None:
    error = matrix(rows, columns, seed)
    metrics = METHODS["eckart"].metrics((rows, columns), moments(rows, columns, seed), 1e-3)
    found = correction.tails(error, *metrics, unit)
    whole = unit * weighted_error(error, *metrics)
    assert float(found[0]) == pytest.approx(whole)
    assert float(found[-1]) == 0
    for rank in range(1, min(rows, columns) + 1):
        product = fit(error, rank, *metrics).factors.dense()
        left = unit * weighted_error(error - product, *metrics)
        assert float(found[rank]) == pytest.approx(left, abs=1e-8 * whole)


def curves(seed: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    shapes = {"a": (6, 4), "b": (3, 5), "c": (8, 8)}
    losses = {
        name: correction.tails(
            matrix(*shape, seed),
            *METHODS["eckart"].metrics(shape, moments(*shape, seed), 1e-3),
        )
        for name, shape in shapes.items()
    }
    return losses, {name: sum(shape) for name, shape in shapes.items()}


@given(seeds, st.integers(0, 300))
@examples
def test_ranks_are_the_best_of_their_bytes(seed: int, budget: int) -> None:
    losses, sizes = curves(seed)
    found = correction.allocate_ranks(losses, lambda name, rank: sizes[name] * rank, budget)
    spent = sum(sizes[name] * rank for name, rank in found.items())
    assert spent <= budget
    left = sum(float(losses[name][rank]) for name, rank in found.items())
    least = min(
        sum(float(loss[rank]) for loss, rank in zip(losses.values(), (a, b, c), strict=True))
        for a in range(5)
        for b in range(4)
        for c in range(9)
        if a * sizes["a"] + b * sizes["b"] + c * sizes["c"] <= spent
    )
    # Tails of spectra are convex, so that no other choice of so many bytes is better by more than one step.
    step = max(
        float(loss[rank] - loss[rank + 1]) for loss in losses.values() for rank in range(len(loss) - 1)
    )
    assert least <= left <= least + step


def test_ranks_at_both_ends_and_their_multiples() -> None:
    losses, sizes = curves(1)

    def cost(name: str, rank: int) -> int:
        return sizes[name] * rank + 3

    assert set(correction.allocate_ranks(losses, cost, 0).values()) == {0}
    assert correction.allocate_ranks(losses, cost, 10_000) == {"a": 4, "b": 3, "c": 8}
    found = correction.allocate_ranks(losses, cost, 10_000, multiple=2)
    assert found == {"a": 4, "b": 2, "c": 8}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rank": 5}, RankError, "rank 5 for a 6 x 4 matrix: legal are 1 to 4"),
        ({"rank": 0}, RankError, "rank 0 for a 6 x 4 matrix: legal are 1 to 4"),
        ({"steps": 0}, ConfigError, "steps=0: must be at least 1"),
        (
            {"quantise": lambda given: given.T},
            ConfigError,
            r"quantised weight has shape \(4, 6\), not that of what it stands for, \(6, 4\)",
        ),
        (
            {"quantise": lambda given: given / 0},
            NotFinite,
            r"quantised weight \(6, 4\) has 24 NaN or infinite entries",
        ),
        (
            {"rounders": Rounders(lambda given: given[:1], same)},
            ConfigError,
            r"rounded left factor has shape \(1, 2\), not that of what it stands for, \(6, 2\)",
        ),
        (
            {"rounders": Rounders(same, lambda given: given / 0)},
            NotFinite,
            r"rounded right factor \(2, 4\) has 8 NaN or infinite entries",
        ),
        ({"inputs": Metric(5)}, ConfigError, "a weight of 6 x 4 with metrics for 6 outputs and 5 inputs"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], match: str) -> None:
    given: dict[str, Any] = {"quantise": coarse, "rank": 2, "inputs": Metric(4), "outputs": Metric(6)}
    with pytest.raises(error, match=match):
        correct(matrix(6, 4, 0), **given | change)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: correction.get("lora"),
            "correction 'lora': legal are lorc, lqer, qera, eora, loftq, caldera, eckart",
        ),
        (
            lambda: METHODS["eckart"].metrics((4, 4), {"gram": torch.eye(4)}, 0.0),
            "the correction needs the statistic 'gradient': collect it",
        ),
        (
            lambda: METHODS["lqer"].metrics((4, 4), {"absolute": torch.ones(3)}, 0.0),
            r"metric of shape \(3,\) for a side of 4",
        ),
        (
            lambda: correction.allocate_ranks({}, lambda name, rank: 1, -1),
            "budget=-1, multiple=1: legal are at least 0 and at least 1",
        ),
        (
            lambda: correction.allocate_ranks({}, lambda name, rank: 1, 1, multiple=0),
            "budget=1, multiple=0: legal are at least 0 and at least 1",
        ),
    ],
)
def test_errors_of_methods_and_of_allocation(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        call()


def test_methods_by_name() -> None:
    assert correction.get("qera") is METHODS["qera"]
    assert METHODS["qera"].metrics((3, 3), {"gram": torch.eye(3)}, 0.0)[1].moment is None
    assert [METHODS[name].statistics() for name in ("lorc", "lqer", "eckart")] == [
        (),
        ("absolute",),
        ("gram", "gradient"),
    ]


@given(st.integers(2, 12), st.data())
@examples
def test_a_relieved_metric_counts_its_dearest_directions_less(size: int, data: Any) -> None:
    rank = data.draw(st.integers(1, size))
    generator = torch.Generator().manual_seed(size)
    samples = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    metric = samples.T @ samples
    values, vectors = torch.linalg.eigh(metric)
    relieved = correction.relieved(metric, rank)
    seen = torch.diagonal(vectors.T @ relieved @ vectors)
    assert torch.allclose(seen[: size - rank], values[: size - rank])
    assert bool((seen[-rank:] < 0.1 * values[-rank:]).all())
    assert torch.linalg.eigvalsh(relieved).min() > 0


def test_rounded_in_relieved_metrics_a_matrix_is_corrected_better() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator)

    def moment(size: int) -> Tensor:
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        found: Tensor = (basis * torch.logspace(0, -3, size, dtype=torch.float64)) @ basis.T
        return found

    inputs, outputs, grid = moment(96), moment(64), storage.get("int4").grid(weight)
    metrics, left = (Metric(96, inputs), Metric(64, outputs)), []
    for taken in (0, 6):
        seen = [correction.relieved(one, taken) if taken else one for one in (inputs, outputs)]
        codes = rounding.two_sided(weight, grid, *seen, damp=0.0, output_damp=0.0)
        error = weight.double() - grid.values(codes).double()
        left.append(float(correction.tails(error, *metrics)[12]))
    assert left[1] < 0.95 * left[0]


def test_as_many_directions_as_there_are_can_be_relieved() -> None:
    with pytest.raises(RankError, match="rank 4 for a 3 x 3 matrix: legal are 1 to 3"):
        correction.relieved(torch.eye(3), 4)
