"""Penalties: each gradient is that of its value, anchors bound, factors and matrices agree."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import ConfigError, RankError
from eckart.linalg import truncated_svd
from eckart.scratch.penalties import (
    Nuclear,
    Orthogonality,
    Penalty,
    StableRank,
    Tail,
    frobenius,
    polar_by_newton_schulz,
    polar_by_svd,
)

SHAPES = st.tuples(st.integers(3, 9), st.integers(3, 9))
SEEDS = st.integers(0, 2**16)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(weight: Tensor) -> Tensor:
    found: Tensor = torch.linalg.svdvals(weight)
    return found


REFERENCES: list[tuple[Penalty, Callable[[Tensor], Tensor]]] = [
    (Nuclear(), lambda weight: values(weight).sum()),
    (Tail(2), lambda weight: values(weight)[2:].square().sum() / 2),
    (StableRank(), lambda weight: values(weight).square().sum() / values(weight)[0] ** 2),
]


def slope(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, ...]:
    leaves = [part.clone().requires_grad_() for part in at]
    found: tuple[Tensor, ...] = torch.autograd.grad(function(*leaves), leaves)
    return found


@pytest.mark.parametrize(("penalty", "reference"), REFERENCES, ids=lambda part: type(part).__name__)
@settings(deadline=None, max_examples=25)
@given(shape=SHAPES, seed=SEEDS)
def test_on_a_matrix_value_and_gradient_are_exact_at_the_anchor(
    penalty: Penalty, reference: Callable[[Tensor], Tensor], shape: tuple[int, int], seed: int
) -> None:
    weight = drawn(*shape, seed=seed)
    found = penalty.on_matrix(weight, penalty.anchor(weight))
    (wanted,) = slope(reference, weight)
    assert torch.allclose(found.value, reference(weight), rtol=1e-6, atol=1e-9)
    assert torch.allclose(found.gradients[0], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(weight, wanted, rtol=1e-4)


@pytest.mark.parametrize(("penalty", "reference"), REFERENCES[1:], ids=lambda part: type(part).__name__)
@settings(deadline=None, max_examples=25)
@given(shape=SHAPES, seed=SEEDS)
def test_on_factors_they_are_those_of_the_product(
    penalty: Penalty, reference: Callable[[Tensor], Tensor], shape: tuple[int, int], seed: int
) -> None:
    left, right = drawn(shape[0], 3, seed=seed), drawn(3, shape[1], seed=seed + 1)
    found = penalty.on_factors(left, right)
    wanted = slope(lambda first, second: reference(_nonzero(first, second)), left, right)
    assert torch.allclose(found.value, reference(_nonzero(left, right)), rtol=1e-8, atol=1e-10)
    for own, other in zip(found.gradients, wanted, strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-7 * float(other.abs().max()))
    dense = penalty.on_matrix(left @ right, penalty.anchor(left @ right)).gradients[0]
    assert torch.allclose(
        found.gradients[0], dense @ right.T, rtol=1e-4, atol=1e-5 * float(dense.abs().max())
    )


def _nonzero(left: Tensor, right: Tensor) -> Tensor:
    """Return what has the singular values of the product that are not zero, whose gradient exists."""
    found: Tensor = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    return found


@settings(deadline=None, max_examples=25)
@given(shape=SHAPES, seed=SEEDS)
def test_the_bound_of_the_nuclear_norm_is_attained_by_balanced_factors_alone(
    shape: tuple[int, int], seed: int
) -> None:
    weight = drawn(*shape, seed=seed)
    svd = truncated_svd(weight, 3)
    norm, roots = svd.values.sum(), svd.values.sqrt()
    left, right = svd.left * roots, roots[:, None] * svd.right
    balanced = Nuclear().on_factors(left, right)
    assert torch.allclose(balanced.value, norm)
    assert float(Nuclear().on_factors(2 * left, right / 2).value) > float(norm) * (1 + 1e-6)
    polar = svd.left @ svd.right
    # At balanced factors the gradient is that of the norm, by the chain rule.
    assert torch.allclose(balanced.gradients[0], polar @ right.T)
    assert torch.allclose(balanced.gradients[1], left.T @ polar)


@settings(deadline=None, max_examples=25)
@given(shape=SHAPES, seed=SEEDS)
def test_old_anchors_bound_from_below_and_from_above(shape: tuple[int, int], seed: int) -> None:
    old = drawn(*shape, seed=seed)
    new = old + 0.3 * drawn(*shape, seed=seed + 1)
    nuclear, tail = Nuclear(), Tail(2)
    assert float(nuclear.on_matrix(new, nuclear.anchor(old)).value) <= float(values(new).sum()) * (1 + 1e-9)
    exact = float(values(new)[2:].square().sum() / 2)
    assert float(tail.on_matrix(new, tail.anchor(old)).value) >= exact * (1 - 1e-6)


def test_the_polar_factor_of_few_directions_has_no_others() -> None:
    weight = drawn(8, 2, seed=0) @ drawn(2, 6, seed=1)
    polar = polar_by_svd(weight)
    assert torch.allclose(values(polar), torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64), atol=1e-8)
    assert torch.allclose((polar * weight).sum(), values(weight).sum())


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_newton_schulz_comes_near_from_below(shape: tuple[int, int]) -> None:
    svd = truncated_svd(drawn(*shape, seed=0), 5)
    spectrum = torch.tensor([1.0, 0.5, 0.2, 0.05, 0.02], dtype=torch.float64)
    weight = (svd.left * spectrum) @ svd.right
    exact, near = polar_by_svd(weight), polar_by_newton_schulz(weight)
    assert float((near - exact).norm()) < 0.02 * float(exact.norm())
    assert not float((weight - exact).norm()) < 0.02 * float(exact.norm())
    assert float(values(near).max()) <= 1 + 1e-5
    tiny = (svd.left * torch.tensor([1.0, 0.5, 0.2, 0.05, 1e-5], dtype=torch.float64)) @ svd.right
    assert float(values(polar_by_newton_schulz(tiny))[4]) < 0.1 < 0.99 < float(values(polar_by_svd(tiny))[4])
    assert torch.equal(polar_by_newton_schulz(torch.zeros(3, 2)), torch.zeros(3, 2))


@settings(deadline=None, max_examples=25)
@given(shape=SHAPES, seed=SEEDS)
def test_stable_rank_does_not_depend_on_scale(shape: tuple[int, int], seed: int) -> None:
    weight = drawn(*shape, seed=seed)
    penalty = StableRank()
    first, second = (penalty.on_matrix(part, penalty.anchor(part)) for part in (weight, 7 * weight))
    assert torch.allclose(first.value, second.value)
    along = float((first.gradients[0] * weight).sum())
    assert abs(along) < 1e-8 * float(first.gradients[0].norm() * weight.norm())
    assert 1 <= float(first.value) <= min(shape) + 1e-9


@settings(deadline=None, max_examples=25)
@given(shape=SHAPES, seed=SEEDS)
def test_orthogonality_is_zero_where_the_factors_are_a_decomposition(
    shape: tuple[int, int], seed: int
) -> None:
    def reference(left: Tensor, right: Tensor) -> Tensor:
        grams = (left.T @ left, right @ right.T)
        return sum(((gram - gram.diagonal().diag()).square().sum() for gram in grams), torch.zeros(())) / 4

    left, right = drawn(shape[0], 3, seed=seed), drawn(3, shape[1], seed=seed + 1)
    found = Orthogonality().on_factors(left, right)
    assert torch.allclose(found.value, reference(left, right))
    for own, other in zip(found.gradients, slope(reference, left, right), strict=True):
        assert torch.allclose(own, other)
    svd = truncated_svd(left @ right, 3)
    none = Orthogonality().on_factors(svd.left * svd.values, svd.right)
    assert float(none.value) < 1e-16 * float(svd.values[0]) ** 4 < float(found.value)
    with pytest.raises(ConfigError, match=r"orthogonality is for factors.*factor it first"):
        Orthogonality().anchor(left)


@settings(deadline=None, max_examples=25)
@given(shape=SHAPES, seed=SEEDS)
def test_the_gradient_of_the_product_s_norm(shape: tuple[int, int], seed: int) -> None:
    left, right = drawn(shape[0], 3, seed=seed), drawn(3, shape[1], seed=seed + 1)
    found = frobenius(left, right)
    wanted = slope(lambda first, second: (first @ second).square().sum() / 2, left, right)
    assert torch.allclose(found.value, (left @ right).square().sum() / 2)
    for own, other in zip(found.gradients, wanted, strict=True):
        assert torch.allclose(own, other)
    assert not torch.allclose(found.gradients[0], left)


def test_a_tail_beyond_the_rank_of_factors_is_nothing() -> None:
    found = Tail(3).on_factors(drawn(5, 3, seed=0), drawn(3, 6, seed=1))
    assert float(found.value) == 0
    assert not any(bool(part.any()) for part in found.gradients)
    with pytest.raises(RankError, match="rank 6 for a 5 x 7 matrix"):
        Tail(6).anchor(drawn(5, 7, seed=0))


@pytest.mark.parametrize(
    ("penalty", "steps"),
    [(Nuclear(), 60), (Tail(2), 60), (StableRank(), 200)],
    ids=["nuclear", "tail", "stable-rank"],
)
def test_going_down_the_gradient_lowers_the_rank(penalty: Penalty, steps: int) -> None:
    weight = drawn(8, 6, seed=3).float()
    before = values(weight)
    for _ in range(steps):
        weight = weight - 0.02 * penalty.on_matrix(weight, penalty.anchor(weight)).gradients[0]
    share = values(weight)[2:].square().sum() / values(weight).square().sum()
    assert float(share) < 0.7 * float(before[2:].square().sum() / before.square().sum())
