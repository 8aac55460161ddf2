"""The distance of several outputs: zero at the dense model, and gradients with its curvature."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import hessian
from transformers.utils import ModelOutput

from eckart import ConfigError
from eckart.errors import NotFinite
from eckart.several import Parts, Several

BATCH = {"pixel_values": torch.zeros(2, 3)}
WHAT = Several(Parts((("logits", 1),), ("boxes",)))


def made(logits: Tensor, boxes: Tensor) -> ModelOutput:
    return ModelOutput(logits=logits, boxes=boxes, last_hidden_state=torch.ones(2, 3))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 5), st.integers(1, 4), st.floats(0.01, 100))
@settings(deadline=None, max_examples=25)
def test_the_distance_is_least_at_the_dense_outputs_in_any_unit(classes: int, side: int, unit: float) -> None:
    dense = made(noise(2, classes, side), noise(2, side, 4, seed=1))
    reference = WHAT.rows(dense, BATCH)
    least = float(WHAT.summed(dense, BATCH, reference).total)
    chances = dense.logits.softmax(1)
    entropy = -(chances * chances.log()).sum(1).mean()
    assert least == pytest.approx(2 * float(entropy), rel=1e-4)
    other = made(dense.logits + 0.3 * noise(2, classes, side, seed=2), dense.boxes)
    assert float(WHAT.summed(other, BATCH, reference).total) > least
    moved = made(dense.logits, dense.boxes * 1.1)
    added = float(WHAT.summed(moved, BATCH, reference).total) - least
    assert added == pytest.approx(2 * 0.01 / 2, rel=1e-2)  # a relative error of 0.1, squared and halved
    scaled = made(dense.logits, unit * moved.boxes), made(dense.logits, unit * dense.boxes)
    again = WHAT.summed(scaled[0], BATCH, WHAT.rows(scaled[1], BATCH))
    assert float(again.total) == pytest.approx(least + added, rel=1e-4)


def test_the_second_moment_of_gradients_is_the_curvature_of_the_distance() -> None:
    logits = noise(2, 3, 5).requires_grad_()
    boxes = noise(2, 4, seed=1).requires_grad_()
    dense = made(logits, boxes)
    reference = [row.detach() for row in WHAT.rows(dense, BATCH)]

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return WHAT.summed(made(a, b), BATCH, reference).total

    curvature = hessian(distance, (logits.detach(), boxes.detach()))  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    squares = [torch.zeros(30), torch.zeros(8)]
    count = 4000
    for _ in range(count):
        total = WHAT.to_differentiate(dense, BATCH, "sampled", generator).total
        for square, gradient in zip(squares, torch.autograd.grad(total, (logits, boxes)), strict=True):
            square += gradient.flatten().square() / count
    wanted = [curvature[0][0].reshape(30, 30).diagonal(), curvature[1][1].reshape(8, 8).diagonal()]
    for square, own in zip(squares, wanted, strict=True):
        assert torch.allclose(square, own, rtol=0.15, atol=0.02 * float(own.max()))
    assert not torch.allclose(2 * squares[0], wanted[0], rtol=0.15, atol=0.02 * float(wanted[0].max()))


def test_padding_counts_as_equal_and_what_is_not_finite_is_refused() -> None:
    boxes = noise(2, 4)
    padded = boxes.clone()
    padded[0, 0] = -torch.inf
    dense = made(noise(2, 3, 5), padded)
    reference = WHAT.rows(dense, BATCH)
    assert torch.isfinite(WHAT.summed(dense, BATCH, reference).total)
    for value in (torch.nan, torch.inf):
        broken = made(dense.logits, torch.full_like(boxes, value))
        with pytest.raises(NotFinite, match="the loss of a batch is NaN or infinite"):
            WHAT.summed(broken, BATCH, reference)


def test_a_shape_that_depends_on_values_is_refused() -> None:
    dense = made(noise(2, 3, 5), noise(2, 4))
    with pytest.raises(ConfigError, match="a shape that depends on values has no distance"):
        WHAT.summed(made(dense.logits, noise(2, 5)), BATCH, WHAT.rows(dense, BATCH))


def test_outputs_that_a_model_lacks_are_left_out() -> None:
    only = ModelOutput(logits=noise(2, 3, 5))
    assert [tuple(row.shape) for row in WHAT.rows(only, BATCH)] == [(10, 3)]
    other = ModelOutput(depth=noise(2, 3))
    assert [tuple(row.shape) for row in WHAT.rows(other, BATCH)] == [(6, 1)]
    with pytest.raises(ConfigError, match="without a tensor of outputs"):
        WHAT.rows(SimpleNamespace(), BATCH)
