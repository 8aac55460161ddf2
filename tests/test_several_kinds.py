"""Distances of outputs of other kinds: probabilities, lengths that vary, questions, durations, drawn ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.utils import ModelOutput

from eckart import ConfigError, batches
from eckart.several import Parts, Several, settled

BATCH = {"pixel_values": torch.zeros(2, 3)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(what: Several, dense: Any, other: Any, batch: Any = None) -> float:
    given = BATCH if batch is None else batch
    return float(what.summed(other, given, what.rows(dense, given)).total)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_probabilities_are_as_far_apart_as_their_scores(classes: int, steps: int, seed: int) -> None:
    dense, other = noise(2, steps, classes, seed=seed), noise(2, steps, classes, seed=seed + 100)
    scores = Several(Parts((("logits", -1),)))
    chances = Several(Parts(chances=(("last_hidden_state", -1),)))
    wanted = apart(scores, ModelOutput(logits=dense), ModelOutput(logits=other))
    soft = [ModelOutput(last_hidden_state=part.softmax(-1)) for part in (dense, other)]
    assert apart(chances, *soft) == pytest.approx(wanted, rel=1e-4)
    # Of scores after a softmax, another softmax is another distribution.
    taken = Several(Parts((("last_hidden_state", -1),)))
    assert apart(taken, *soft) != pytest.approx(wanted, rel=1e-4)


def test_gradients_at_probabilities_are_those_at_their_scores() -> None:
    scores = noise(2, 3, 5).requires_grad_()
    found = []
    for what, output in (
        (Several(Parts((("logits", -1),))), ModelOutput(logits=scores)),
        (Several(Parts(chances=(("p", -1),))), ModelOutput(p=scores.softmax(-1))),
    ):
        total = what.to_differentiate(output, BATCH, "sampled", torch.Generator().manual_seed(1)).total
        found.append(torch.autograd.grad(total, scores)[0])
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert float(found[0].abs().max()) > 0.1


@given(st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_ragged_outputs_are_compared_as_far_as_both_go(one: int, other: int) -> None:
    what = Several(Parts(chances=(("p", -1),), values=("wave",), ragged=True))
    whole = noise(2, 6, 4).softmax(-1), noise(2, 6, seed=1)
    changed = noise(2, 6, 4, seed=2).softmax(-1), noise(2, 6, seed=3)
    dense = ModelOutput(p=whole[0][:, :one], wave=whole[1][:, :one])
    small = ModelOutput(p=changed[0][:, :other], wave=changed[1][:, :other])
    both = min(one, other)
    cut = [ModelOutput(p=p[:, :both], wave=wave[:, :both]) for p, wave in (whole, changed)]
    assert apart(what, dense, small) == pytest.approx(apart(what, *cut), rel=1e-5)
    fixed = Several(Parts(chances=(("p", -1),), values=("wave",)))
    assert apart(fixed, *cut) == pytest.approx(apart(what, *cut), rel=1e-5)
    if one != other:
        with pytest.raises(ConfigError, match="a shape that depends on values has no distance"):
            apart(fixed, dense, small)


def test_each_question_is_a_choice_among_its_own_options() -> None:
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "num_options": torch.tensor([[2, 3]])}
    what = Several(Parts(options="num_options"))
    dense, other = noise(5), noise(5, seed=1)
    parts = [(dense[:2], other[:2]), (dense[2:], other[2:])]
    wanted = sum(float(-(a.softmax(0) * b.log_softmax(0)).sum()) for a, b in parts)
    assert apart(what, dense, other, batch) == pytest.approx(wanted, rel=1e-5)
    assert float(-(dense.softmax(0) * other.log_softmax(0)).sum()) != pytest.approx(wanted, rel=0.02)


def test_durations_behind_the_scores_are_a_distribution_of_their_own() -> None:
    dense, other = noise(2, 3, 7), noise(2, 3, 7, seed=1)
    both = [ModelOutput(logits=part) for part in (dense, other)]
    pieces = [
        [ModelOutput(logits=part[..., place]) for part in (dense, other)]
        for place in (slice(0, 5), slice(5, 7))
    ]
    plain = Several(Parts((("logits", -1),)))
    wanted = sum(apart(plain, *piece) for piece in pieces)
    assert apart(Several(Parts((("logits", -1),)), cut=5), *both) == pytest.approx(wanted, rel=1e-5)
    assert apart(plain, *both) != pytest.approx(wanted, rel=1e-2)


class Speaker(nn.Module):
    """Says something of a length and with noise that are drawn, from states that are not."""

    def __init__(self, drawing: bool, level: float = 1.0) -> None:
        super().__init__()
        self.map, self.drawing, self.level = nn.Linear(3, 4), drawing, level
        self.config = SimpleNamespace()

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> ModelOutput:
        states = self.map(pixel_values) * self.level
        length = int(torch.randint(3, 9, ())) if self.drawing else 4
        wave = states[:, :1].expand(-1, length)
        wave = wave + torch.randn_like(wave) if self.drawing else wave
        return ModelOutput(
            waveform=wave, hidden_states=(states, 2 * states) if output_hidden_states else None
        )


PARTS = Parts((), ("waveform",), ragged=True, drawn="hidden_states")


def test_of_what_is_drawn_the_states_are_compared() -> None:
    batch = {"pixel_values": noise(2, 3)}
    model = Speaker(drawing=True)
    what, extra = settled(PARTS, model, batch)
    assert extra == {"output_hidden_states": True}
    rows = what.rows(model(**batch, output_hidden_states=True), batch)
    assert torch.equal(rows[0].flatten(), 2 * model.map(batch["pixel_values"]).flatten())
    what, extra = settled(PARTS, Speaker(drawing=False), batch)
    assert (extra, what.parts) == ({}, PARTS)


def test_every_call_draws_the_same_and_leaves_the_generator_alone() -> None:
    batch = {"pixel_values": noise(2, 3)}
    model = Speaker(drawing=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = (batches.call(model, batch).waveform for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    shapes = {model(**batch).waveform.shape for _ in range(20)}
    assert len(shapes) > 1


def test_what_is_zero_everywhere_is_refused() -> None:
    batch = {"pixel_values": noise(2, 3)}
    with pytest.raises(ConfigError, match="Speaker gives waveform of zero everywhere .*give other data"):
        settled(PARTS, Speaker(drawing=False, level=0.0), batch)
