"""Laws of rounding with compensation: against its literal definition, and what it may promise."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import ConfigError, NotFinite, NotPositiveDefinite
from eckart.linalg import Metric, weighted_error
from eckart.quant.grid import Grid
from eckart.quant.rounding import DAMP, Feedback, compensated, expected_loss, nearest, two_sided

FAST = settings(deadline=None, max_examples=25, derandomize=True)
SIDES = st.integers(1, 7)
SEEDS = st.integers(0, 10_000)


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def correlated(size: int, seed: int, tokens: int | None = None) -> Tensor:
    """Return the second moment (size, size) of samples that share a few directions."""
    samples = gaussian(tokens or 3 * size, size, seed) @ (torch.eye(size) + gaussian(size, size, seed + 1))
    return samples.T @ samples / len(samples)


def even(shape: tuple[int, int], step: float, seed: int = 0, codes: int = 256) -> Grid:
    """Return a grid of equal steps; scale differs by the row and zero by the column."""
    scale = step * (1 + gaussian(shape[0], 1, seed).abs()).expand(shape)
    zero = codes / 2 + gaussian(1, shape[1], seed).round().expand(shape)
    return Grid(torch.arange(codes, dtype=torch.float64), scale, zero)


def uneven(shape: tuple[int, int]) -> Grid:
    """Return a grid of few levels, not in ascending order of the codes."""
    levels = torch.tensor([0.0, 0.3, 0.6, 1.0, -0.2, -0.5, -1.0], dtype=torch.float64)
    return Grid(levels, torch.full(shape, 2.0, dtype=torch.float64))


def loss(weight: Tensor, grid: Grid, codes: Tensor, inputs: Tensor, outputs: Tensor | None = None) -> float:
    rows, columns = weight.shape
    error = weight.double() - grid.values(codes).double()
    return weighted_error(error, Metric(columns, inputs), Metric(rows, outputs))


def literal(weight: Tensor, grid: Grid, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return what two-sided rounding is by definition: entry after entry, everything formed anew."""
    columns, rows = (Feedback.of(len(side), side, damp=0.0, order=False).mix for side in (inputs, outputs))
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    error = torch.zeros_like(weight)
    for row, column in product(*map(range, weight.shape)):
        moved = weight + rows.T @ error @ columns
        codes[row, column] = grid.codes(moved)[row, column]
        error[row, column] = (weight - grid.values(codes))[row, column]
    return codes


GRIDS = [lambda shape: even(shape, 0.3), uneven]


@pytest.mark.parametrize("grid_of", GRIDS)
@FAST
@given(rows=SIDES, columns=SIDES, seed=SEEDS)
def test_it_is_its_definition(grid_of, rows: int, columns: int, seed: int) -> None:  # type: ignore[no-untyped-def]
    weight, grid = gaussian(rows, columns, seed), grid_of((rows, columns))
    inputs, outputs = correlated(columns, seed), correlated(rows, seed + 9)
    identity = torch.eye(rows, dtype=torch.float64)
    assert torch.equal(two_sided(weight, grid, inputs, outputs, damp=0, output_damp=0, order=False, rows=1),
                       literal(weight, grid, inputs, outputs))  # fmt: skip
    assert torch.equal(
        compensated(weight, grid, inputs, damp=0, order=False), literal(weight, grid, inputs, identity)
    )


def test_columns_beyond_a_lazy_batch_see_all_before_them() -> None:
    weight, inputs = gaussian(2, 150, 0), correlated(150, 1)
    grid = even((2, 150), 0.3)
    identity = torch.eye(2, dtype=torch.float64)
    assert torch.equal(
        compensated(weight, grid, inputs, damp=0, order=False), literal(weight, grid, inputs, identity)
    )


@FAST
@given(rows=SIDES, columns=SIDES, seed=SEEDS, damp=st.sampled_from([0.01, 1.0]))
def test_diagonal_metrics_ask_for_the_nearest(rows: int, columns: int, seed: int, damp: float) -> None:
    weight, grid = gaussian(rows, columns, seed), even((rows, columns), 0.3)
    inputs, outputs = gaussian(columns, 1, seed)[:, 0].square(), gaussian(rows, 1, seed)[:, 0].square()
    found = nearest(weight, grid)
    assert torch.equal(found, grid.codes(weight))
    for moments in ((inputs, outputs), (inputs.diag(), outputs.diag()), (None, None), (0 * inputs, None)):
        assert torch.equal(compensated(weight, grid, moments[0], damp=damp), found)
        assert torch.equal(two_sided(weight, grid, *moments, damp=damp, rows=2, order=False), found)
        assert torch.equal(two_sided(weight, grid, *moments, damp=damp, rows=2, order=True), found)


@FAST
@given(rows=st.integers(2, 7), columns=SIDES, seed=SEEDS)
def test_without_correlated_outputs_both_sides_are_one(rows: int, columns: int, seed: int) -> None:
    weight, grid, inputs = gaussian(rows, columns, seed), uneven((rows, columns)), correlated(columns, seed)
    found = compensated(weight, grid, inputs)
    for outputs in (None, torch.ones(rows, dtype=torch.float64), torch.eye(rows, dtype=torch.float64)):
        assert torch.equal(two_sided(weight, grid, inputs, outputs, rows=2), found)
    # Rows then do not see each other, so that their order cannot matter.
    places = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(compensated(weight[places], grid, inputs), found[places])


@FAST
@given(columns=st.integers(2, 7), seed=SEEDS)
def test_order_is_a_permutation_of_the_problem(columns: int, seed: int) -> None:
    weight, grid, inputs = gaussian(3, columns, seed), even((3, columns), 0.3), correlated(columns, seed)
    places = inputs.diagonal().argsort(descending=True)
    zero = None if grid.zero is None else grid.zero[:, places]
    placed = compensated(
        weight[:, places],
        Grid(grid.levels, grid.scale[:, places], zero),
        inputs[places][:, places],
        order=False,
    )
    assert torch.equal(compensated(weight, grid, inputs, order=True)[:, places], placed)


@pytest.mark.parametrize("order", [False, True])
def test_each_step_of_knowledge_pays(order: bool) -> None:
    totals = torch.zeros(4, dtype=torch.float64)
    for seed in range(10):
        weight, inputs, outputs = gaussian(24, 40, seed), correlated(40, seed), correlated(24, seed + 50)
        grid = even((24, 40), 0.5, seed)
        codes = [
            nearest(weight, grid),
            compensated(weight, grid, inputs, order=order),
            two_sided(weight, grid, inputs, outputs, order=order, rows=8),
            two_sided(weight, grid, inputs, outputs, order=order, rows=1),
        ]
        totals += torch.tensor([loss(weight, grid, found, inputs, outputs) for found in codes])
    assert totals[1] < 0.6 * totals[0]
    assert totals[2] < 0.9 * totals[1]
    assert totals[3] < totals[2]


@FAST
@given(size=st.integers(1, 9), seed=SEEDS, order=st.booleans())
def test_a_feedback_is_its_metric(size: int, seed: int, order: bool) -> None:
    metric = correlated(size, seed)
    found = Feedback.of(size, metric, damp=0.1, order=order)
    places = torch.arange(size) if found.order is None else found.order
    damped = metric + 0.1 * metric.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found.mix * found.pivots @ found.mix.T, damped[places][:, places])
    assert torch.equal(found.mix, found.mix.triu())
    assert bool((found.mix.diagonal() == 1).all())
    assert bool((found.in_place() <= damped.diagonal() * (1 + 1e-9)).all())


@pytest.mark.parametrize("order", [False, True])
def test_the_expected_loss_is_met(order: bool) -> None:
    rows, columns, step = 40, 60, 1e-3
    weight, inputs, outputs = gaussian(rows, columns, 0), correlated(columns, 1), correlated(rows, 2)
    scale = step * (1 + gaussian(rows, 1, 3).abs()).expand(rows, columns)
    grid = Grid(torch.arange(-50_000.0, 50_000.0, dtype=torch.float64), scale)
    noise = scale.square() / 12
    along, down = (Feedback.of(len(side), side, order=order) for side in (inputs, outputs))
    stand_still = Feedback(along.mix, inputs.diagonal())
    across = Feedback(down.mix, outputs.diagonal())
    # Codes beyond 255 do not fit uint8, so that errors are formed on a grid around the weight.
    centre = (weight / scale).round() * scale
    near = Grid(grid.levels[49_900:50_101], scale)
    moved = weight - centre
    cases = [
        (nearest(moved, near), expected_loss(noise, stand_still, across)),
        (compensated(moved, near, inputs, order=order), expected_loss(noise, along, across)),
        (
            two_sided(moved, near, inputs, outputs, output_damp=DAMP, order=order, rows=1),
            expected_loss(noise, along, down),
        ),
    ]
    for codes, expected in cases:
        assert loss(moved, near, codes, inputs, outputs) == pytest.approx(expected, rel=0.2)
    assert expected_loss(noise, along) == pytest.approx(float((noise * along.in_place()).sum()))


@FAST
@given(rows=SIDES, columns=st.integers(2, 7), seed=SEEDS)
def test_directions_that_nothing_uses_cost_nothing(rows: int, columns: int, seed: int) -> None:
    weight, grid = gaussian(rows, columns, seed), even((rows, columns), 0.3)
    inputs = correlated(columns, seed)
    inputs[-1], inputs[:, -1] = 0, 0
    kept = slice(0, columns - 1)
    zero = None if grid.zero is None else grid.zero[:, kept]
    alone = compensated(
        weight[:, kept], Grid(grid.levels, grid.scale[:, kept], zero), inputs[kept, kept], damp=1e-9
    )
    found = compensated(weight, grid, inputs, damp=1e-9)
    assert torch.equal(found[:, kept], alone)
    assert torch.equal(found[:, -1:], nearest(weight, grid)[:, -1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_weights_are_rounded_in_float32(dtype: torch.dtype) -> None:
    weight, inputs = gaussian(6, 8, 0).to(dtype), correlated(8, 1)
    grid = Grid(torch.linspace(-1, 1, 9), torch.full((6, 8), 2.0))
    codes = compensated(weight, grid, inputs.float())
    assert codes.dtype == torch.uint8
    assert grid.values(codes).dtype == torch.float32
    assert torch.equal(codes, compensated(weight.float(), grid, inputs.float()))


def test_where_only_zero_can_be_had_the_code_decodes_to_zero() -> None:
    weight, inputs = gaussian(3, 4, 0).float(), correlated(4, 1).float()
    scale = torch.full((3, 4), 0.5)
    scale[1] = 0
    grid = Grid(torch.linspace(-1, 1, 9), scale)
    for codes in (
        nearest(weight, grid),
        compensated(weight, grid, inputs),
        two_sided(weight, grid, inputs, None),
    ):
        assert bool((grid.values(codes)[1] == 0).all())


def test_what_cannot_be_rounded_is_refused() -> None:
    weight, grid = torch.ones(2, 3), Grid(torch.tensor([0.0, 1.0]), torch.ones(2, 3))
    with pytest.raises(ConfigError, match=r"a weight \(2, 2\) and a grid \(2, 3\)"):
        compensated(weight[:, :2], grid, torch.eye(2))
    with pytest.raises(ConfigError, match=r"rows=0: must be >= 1"):
        two_sided(weight, grid, torch.eye(3), torch.eye(2), rows=0)
    with pytest.raises(ConfigError, match=r"metric of shape \(2, 2\) for a side of 3"):
        compensated(weight, grid, torch.eye(2))
    with pytest.raises(ConfigError, match=r"damp=-1: must be >= 0"):
        compensated(weight, grid, torch.eye(3), damp=-1)
    with pytest.raises(NotPositiveDefinite, match=r"size 3 fails at pivot \d with damp=0: raise `damp`"):
        compensated(weight, grid, torch.ones(3, 3), damp=0)
    with pytest.raises(NotFinite, match="the metric has NaN or infinite entries"):
        compensated(weight, grid, torch.full((3, 3), torch.nan))
    with pytest.raises(NotFinite, match="weight .* has 1 NaN or infinite entries"):
        nearest(torch.tensor([[1.0, torch.inf]]), Grid(torch.tensor([0.0, 1.0]), torch.ones(1, 2)))
