"""Laws of the divergence between next-token distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from eckart.divergence import Chances, chances, divergence
from eckart.errors import ConfigError


def _pair(tokens: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    own, other = (2 * torch.randn(tokens, size, generator=made, dtype=torch.float64) for _ in range(2))
    return own, other, torch.randint(size, (tokens,), generator=made)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 300),
    st.integers(2, 40),
    st.floats(0.3, 4.0),
    st.floats(0.0, 1.0),
    st.integers(0, 99),
)
def test_value_and_gradient_are_those_of_torch(
    tokens: int, size: int, temperature: float, mixed: float, seed: int
) -> None:
    own, other, labels = _pair(tokens, size, seed)
    own = own.float().requires_grad_()
    found = divergence(own, chances(other, temperature), labels, temperature, mixed)
    (gradient,) = torch.autograd.grad(3 * found, own)
    twin = own.detach().clone().requires_grad_()
    kl = functional.kl_div(
        (twin / temperature).log_softmax(-1),
        (other.float() / temperature).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    expected = (1 - mixed) * temperature**2 * kl + mixed * functional.cross_entropy(twin, labels)
    (wanted,) = torch.autograd.grad(3 * expected, twin)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(3, 40), st.data())
def test_the_largest_entries_bound_the_whole_from_below(tokens: int, size: int, data: st.DataObject) -> None:
    """Merging entries cannot raise a divergence (data processing inequality), and all but one is all."""
    own, other, labels = _pair(tokens, size, data.draw(st.integers(0, 99)))
    whole = float(divergence(own.float(), chances(other), labels))
    count = data.draw(st.integers(1, size - 1))
    part = float(divergence(own.float(), chances(other, largest=count), labels))
    assert part <= whole + 1e-5
    if count == size - 1:
        assert part == pytest.approx(whole, abs=1e-4)


def test_the_gradient_of_the_largest_entries_is_that_of_autograd() -> None:
    own, other, labels = _pair(7, 20, 0)
    target = chances(other, largest=5)
    own = own.float().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(own, target, labels), own)
    assert target.ids is not None
    share = own.softmax(-1)
    kept = share.gather(-1, target.ids)
    rest, left = target.rest().squeeze(-1), 1 - kept.sum(-1)
    expected = (target.log.exp() * (target.log - kept.log())).sum(-1) + rest * (rest / left).log()
    (wanted,) = torch.autograd.grad(expected.mean(), own)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_a_model_that_agrees_has_no_divergence_and_no_gradient() -> None:
    own, _, labels = _pair(5, 11, 1)
    for target in (chances(own), chances(own, largest=3)):
        twin = own.float().requires_grad_()
        found = divergence(twin, target, labels)
        (gradient,) = torch.autograd.grad(found, twin)
        assert abs(float(found.detach())) < 1e-6
        assert float(gradient.abs().max()) < 1e-6
    other = own.roll(1, -1)
    assert float(divergence(other.float(), chances(own), labels)) > 0.1


def test_all_entries_are_the_whole() -> None:
    _, other, _ = _pair(3, 6, 2)
    assert chances(other, largest=6).ids is None
    some = chances(other, largest=2)
    torch.testing.assert_close(some.rest() + some.log.exp().sum(-1, True), torch.ones(3, 1))
    assert isinstance(some.part(1, 2), Chances)


def test_a_temperature_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"temperature 0: must be above 0"):
        chances(torch.zeros(1, 2), 0.0)
