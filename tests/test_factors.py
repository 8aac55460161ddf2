"""The forms of a low-rank map: one function, different parameters, exact costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import ConfigError, NotPositiveDefinite, RankError
from eckart.factors import (
    FORMS,
    MODULES,
    FactoredLinear,
    Form,
    LowRank,
    PivotedLinear,
    break_even,
    build,
    index_bytes,
    parameters,
    pivot,
)
from eckart.linalg import Metric, weighted_svd

FAST = settings(deadline=None, max_examples=25, derandomize=True)
SIDES = st.integers(1, 12)
SEEDS = st.integers(0, 10_000)


def rounding(matrix: Tensor, scale: float = 50.0, dtype: torch.dtype = torch.float64) -> float:
    return scale * torch.finfo(dtype).eps * max(matrix.shape) * float(matrix.double().norm())


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def low_ranks(draw: st.DrawFn) -> LowRank:
    rows, columns, seed = draw(SIDES), draw(SIDES), draw(SEEDS)
    rank = draw(st.integers(1, min(rows, columns)))
    return LowRank(gaussian(rows, rank, seed=seed), gaussian(rank, columns, seed=seed + 1))


def some_low_rank() -> LowRank:
    return LowRank(gaussian(9, 3), gaussian(3, 7, seed=1))


def ill_conditioned() -> LowRank:
    """Factors of order 1e4 whose product is of order 1: outputs that matter read inputs that are quiet."""
    curvature = torch.logspace(-4, 4, 12, dtype=torch.float64)
    energy = torch.cat([1 / curvature, torch.ones(4, dtype=torch.float64)])
    mixing = gaussian(12, 16) * (1 / curvature[:, None] / energy).sqrt().clamp(max=1)
    found = weighted_svd(mixing, Metric(16, energy), Metric(12, curvature))
    return LowRank(found.left, found.right)


# one map, every form


@given(low_rank=low_ranks())
@FAST
def test_pivoted_is_the_same_map(low_rank: LowRank) -> None:
    dense = low_rank.dense()
    found = pivot(low_rank)
    assert (found.dense() - dense).norm() <= rounding(dense)
    assert torch.equal(found.rows, found.dense()[found.skeleton.pivots])
    assert (found.skeleton.multipliers.abs() <= 2 + 1e-12).all()
    if len(found.rows) > 1:
        without = LowRank(low_rank.left[:, 1:], low_rank.right[1:]).dense()
        assert (without - dense).norm() > rounding(dense)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [False, True])
@given(low_rank=low_ranks(), seed=SEEDS)
@FAST
def test_a_module_computes_its_map(form: Form, biased: bool, low_rank: LowRank, seed: int) -> None:
    dense = low_rank.dense()
    bias = gaussian(len(dense), seed=seed) if biased else None
    inputs = gaussian(2, 3, dense.shape[1], seed=seed + 1)
    module = build(low_rank, form, bias)
    expected = inputs @ dense.T + (0 if bias is None else bias)
    with torch.no_grad():
        found = module(inputs)
    scale = rounding(dense) * (1 + float(inputs.norm()) + float(expected.norm()))
    assert found.shape == expected.shape
    assert (found - expected).norm() <= scale
    assert expected.norm() > scale
    assert (module.map().dense() - dense).norm() <= rounding(dense)
    own = module.dense_bias()
    assert (own is None) == (bias is None)
    if bias is not None and own is not None:
        assert (own - bias).norm() <= scale
        assert (found - inputs @ dense.T).norm() > scale
    with torch.no_grad():
        again = inputs @ module.map().dense().T + (0 if own is None else own)
    assert (found - again).norm() <= scale


def test_a_pivoted_module_needs_its_order_and_its_split_bias() -> None:
    low_rank, bias, inputs = some_low_rank(), gaussian(9, seed=2), gaussian(4, 7, seed=3)
    expected = inputs @ low_rank.dense().T + bias
    unordered, unsplit = (build(low_rank, "pivoted", bias) for _ in range(2))
    assert isinstance(unordered, PivotedLinear)
    assert isinstance(unsplit, PivotedLinear)
    assert unsplit.rest is not None
    with torch.no_grad():
        unordered.order.copy_(torch.arange(9))
        unsplit.rest.bias.copy_(bias[pivot(low_rank).skeleton.rest])
        for broken in (unordered, unsplit):
            assert (broken(inputs) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (4, 4), (4, 9), (9, 4)])
def test_full_rank_is_the_dense_matrix(form: Form, shape: tuple[int, int]) -> None:
    dense, rank = gaussian(*shape), min(shape)
    eye = torch.eye(rank, dtype=torch.float64)
    low_rank = LowRank(eye, dense) if rank == shape[0] else LowRank(dense, eye)
    module = build(low_rank, form, gaussian(shape[0], seed=1))
    assert (module.map().dense() - dense).norm() <= rounding(dense)
    if form == "pivoted":
        assert parameters(form, shape, rank) == dense.numel()


def test_products_are_formed_before_the_final_dtype_is() -> None:
    low_rank, bias = some_low_rank(), gaussian(9, seed=2)
    narrow = LowRank(low_rank.left.float(), low_rank.right.float())
    for form in FORMS:
        module = build(narrow, form, bias.float())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
        assert (module.map().dense() - low_rank.dense()).norm() <= rounding(
            low_rank.dense(), dtype=torch.float32
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_converted_module_computes_to_the_rounding_of_its_dtype(form: Form, dtype: torch.dtype) -> None:
    low_rank, bias, inputs = some_low_rank(), gaussian(9, seed=2), gaussian(4, 7, seed=3)
    module = build(low_rank, form, bias).to(dtype)
    expected = inputs @ low_rank.dense().T + bias
    with torch.no_grad():
        found = module(inputs.to(dtype))
    assert found.dtype == dtype
    assert (found - expected).norm() <= rounding(expected, 1, dtype)
    assert (inputs @ low_rank.dense().T - expected).norm() > rounding(expected, 1, dtype)
    assert module.dense_bias() is not None


# costs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [False, True])
@given(low_rank=low_ranks())
@FAST
def test_costs_are_those_of_the_module(form: Form, biased: bool, low_rank: LowRank) -> None:
    shape, rank = tuple(low_rank.dense().shape), len(low_rank.right)
    module = build(low_rank, form, torch.zeros(shape[0]) if biased else None)
    counted = sum(parameter.numel() for parameter in module.parameters())
    assert counted == parameters(form, (shape[0], shape[1]), rank) + biased * shape[0]
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    assert buffers == index_bytes(form, (shape[0], shape[1]))


@given(rows=SIDES, columns=SIDES)
@FAST
def test_pivoting_saves_the_square_of_the_rank(rows: int, columns: int) -> None:
    for rank in range(1, min(rows, columns) + 1):
        saved = parameters("factored", (rows, columns), rank) - parameters("pivoted", (rows, columns), rank)
        assert saved == rank**2


@pytest.mark.parametrize("form", FORMS)
@given(rows=SIDES, columns=SIDES)
@FAST
def test_break_even_is_the_last_rank_that_saves(form: Form, rows: int, columns: int) -> None:
    shape = (rows, columns)
    best = break_even(form, shape)
    for rank in range(1, min(shape) + 1):
        assert (parameters(form, shape, rank) < rows * columns) == (rank <= best)
    if form == "pivoted":
        assert best == min(shape) - 1


# balance


@given(low_rank=low_ranks())
@FAST
def test_balancing_changes_the_factors_and_not_the_product(low_rank: LowRank) -> None:
    dense = low_rank.dense()
    found = low_rank.balanced()
    assert (found.dense() - dense).norm() <= rounding(dense)
    cross = found.left.T @ found.left
    assert (cross - cross.diagonal().diag()).norm() <= rounding(cross)
    assert (cross.diagonal() - found.right.square().sum(1)).norm() <= rounding(cross)
    if len(cross) > 1:
        raw = low_rank.left.T @ low_rank.left
        assert (raw - raw.diagonal().diag()).norm() > rounding(raw)


def test_balancing_a_zero_map_is_exact() -> None:
    found = LowRank(torch.zeros(4, 2), torch.zeros(2, 3)).balanced()
    assert torch.equal(found.dense(), torch.zeros(4, 3))
    assert found.left.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_balanced_factors_survive_sixteen_bits(dtype: torch.dtype) -> None:
    low_rank = ill_conditioned()
    dense = low_rank.dense()
    allowed = rounding(dense, 1, dtype)

    def rounded(factors: LowRank) -> Tensor:
        return LowRank(factors.left.to(dtype).double(), factors.right.to(dtype).double()).dense()

    assert allowed < dense.norm()
    assert (rounded(low_rank.balanced()) - dense).norm() <= allowed
    assert not (rounded(low_rank) - dense).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_built_modules_survive_sixteen_bits(form: Form, dtype: torch.dtype) -> None:
    low_rank = ill_conditioned()
    dense = low_rank.dense()
    module = build(low_rank, form).to(dtype).double()
    assert (module.map().dense() - dense).norm() <= rounding(dense, 1, dtype)


# modules


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rank", [3, 7])
def test_a_state_dict_goes_round(form: Form, biased: bool, rank: int) -> None:
    low_rank = LowRank(gaussian(9, rank), gaussian(rank, 7, seed=1))
    source = build(low_rank, form, gaussian(9, seed=2) if biased else None).float()
    target = MODULES[form](7, 9, rank, biased)
    inputs = gaussian(4, 7, seed=3).float()
    with torch.no_grad():
        assert not torch.equal(target(inputs), source(inputs))
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(target(inputs), source(inputs))


@pytest.mark.parametrize("rank", [2, 4])
def test_a_pivoted_module_that_outputs_its_rank_has_no_rest(rank: int) -> None:
    module = PivotedLinear(6, 4, rank)
    assert (module.rest is None) == (rank == 4)
    assert module(torch.ones(2, 6)).shape == (2, 4)
    assert module.map().dense().shape == (4, 6)


def test_a_module_describes_its_map() -> None:
    assert "7 -> 3 -> 9" in repr(FactoredLinear(7, 9, 3))
    assert "7 -> 3 + 6" in repr(PivotedLinear(7, 9, 3))


@pytest.mark.parametrize("form", FORMS)
def test_a_module_trains_both_of_its_parts(form: Form) -> None:
    module = MODULES[form](7, 9, 3, bias=True)
    module(gaussian(4, 7).float()).square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


# errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [0, 5])
def test_a_module_of_an_impossible_rank_is_refused(form: Form, rank: int) -> None:
    with pytest.raises(RankError, match=f"rank {rank} for a 9 x 4 matrix: legal are 1 to 4"):
        MODULES[form](4, 9, rank)


def test_factors_wider_than_the_map_are_refused() -> None:
    for form in FORMS:
        with pytest.raises(RankError, match="rank 5 for a 9 x 4 matrix: legal are 1 to 4"):
            build(LowRank(gaussian(9, 5), gaussian(5, 4)), form)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="form 'shared': legal are factored, pivoted"):
        build(some_low_rank(), "shared")  # type: ignore[arg-type]


def test_dependent_columns_have_no_pivots() -> None:
    dependent = LowRank(torch.ones(9, 3), gaussian(3, 7))
    for run in (lambda: pivot(dependent), lambda: build(dependent, "pivoted")):
        with pytest.raises(NotPositiveDefinite, match="the 9 x 3 left factor has dependent columns"):
            run()
    assert build(LowRank(dependent.left.double(), dependent.right), "factored").rank == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [8, 11])
def test_a_bias_of_the_wrong_length_is_refused(form: Form, length: int) -> None:
    with pytest.raises(ConfigError, match=rf"bias of shape \({length},\) for 9 outputs"):
        build(some_low_rank(), form, torch.ones(length))
