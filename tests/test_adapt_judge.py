"""What held-out examples say: exact means, label words by their probability, whatever the batches."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart import NotFinite
from eckart.adapt.examples import IGNORED, Example
from eckart.adapt.judge import Judged, judge

from . import tiny

PAD = 1
SINGLE = ((5,), (9,), (14,))
SEVERAL = ((5, 6, 7), (9,), (5, 8), (5, 6))


@cache
def model() -> Any:
    return tiny.build("llama")


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(2, tiny.VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@cache
def spoken() -> tuple[Example, ...]:
    """Examples of every length, of which more or less is learned."""
    made = []
    for index, size in enumerate((3, 18, 7, 25, 7, 2, 31, 12, 5)):
        own = ids(size, index)
        quiet = (index * 5) % size
        made.append(Example(own, [IGNORED] * quiet + own[quiet:]))
    return tuple(one for one in made if one.learned)


def labelled(words: Sequence[tuple[int, ...]], count: int = 24) -> list[Example]:
    made = []
    for index in range(count):
        prompt, answer = ids(3 + index % 7, 100 + index), index % len(words)
        word = list(words[answer])
        made.append(Example(prompt + word, [IGNORED] * len(prompt) + word, answer))
    return made


@cache
@torch.no_grad()
def logs(own: tuple[int, ...]) -> torch.Tensor:
    """Return log p(token | before) of every token but the first, in float64."""
    found = model()(input_ids=torch.tensor([own])).logits[0, :-1].double().log_softmax(-1)
    picked: torch.Tensor = found.gather(1, torch.tensor(own[1:])[:, None])[:, 0]
    return picked


def mean(examples: Sequence[Example]) -> tuple[float, int]:
    """Return the loss per learned token, example by example, and the tokens."""
    picked = [
        -logs(tuple(one.ids))[torch.tensor([label != IGNORED for label in one.labels[1:]])]
        for one in examples
    ]
    whole = torch.cat(picked)
    return float(whole.mean()), len(whole)


def likeliest(example: Example, words: Sequence[tuple[int, ...]]) -> int:
    scores = [float(logs((*example.prompt, *word))[-len(word) :].sum()) for word in words]
    return max(range(len(words)), key=scores.__getitem__)


@settings(deadline=None, max_examples=10)
@given(st.permutations(spoken()), st.integers(1, 12), st.booleans())
def test_the_loss_is_the_mean_over_tokens_however_it_is_batched(
    order: list[Example], batch: int, training: bool
) -> None:
    loss, tokens = mean(spoken())
    model().train(training)
    found = judge(model(), order, PAD, batch=batch)
    assert found == Judged(found.loss, tokens, None)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert all(module.training == training for module in model().modules())
    model().eval()


def test_long_examples_count_by_their_tokens() -> None:
    """The mean over tokens is not the mean of examples' or batches' means."""
    loss, _ = mean(spoken())
    each = [mean([one])[0] for one in spoken()]
    assert abs(sum(each) / len(each) - loss) > 1e-2
    assert judge(model(), spoken(), PAD).loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("words", [SINGLE, SEVERAL], ids=["one token", "several"])
def test_accuracy_is_the_share_of_likeliest_words(words: tuple[tuple[int, ...], ...]) -> None:
    made = labelled(words)
    right = [likeliest(one, words) == one.answer for one in made]
    assert 0 < sum(right) < len(right)
    loss, tokens = mean(made)
    for batch, order in ((1, made), (5, made[::-1]), (24, made)):
        found = judge(model(), order, PAD, batch=batch, word_ids=words)
        assert found.accuracy == sum(right) / len(right)
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.tokens == tokens == sum(len(words[one.answer or 0]) for one in made)
    assert judge(model(), made, PAD).accuracy is None


@pytest.mark.parametrize("words", [SINGLE, SEVERAL], ids=["one token", "several"])
def test_a_model_is_right_where_the_answer_is_what_it_would_write(words: tuple[tuple[int, ...], ...]) -> None:
    made = []
    for one in labelled(words):
        answer = likeliest(one, words)
        word = list(words[answer])
        made.append(Example(one.prompt + word, [IGNORED] * len(one.prompt) + word, answer))
    assert judge(model(), made, PAD, word_ids=words).accuracy == 1.0
    wrong = [Example(one.ids, one.labels, ((one.answer or 0) + 1) % len(words)) for one in made]
    assert judge(model(), wrong, PAD, word_ids=words).accuracy == 0.0


@pytest.mark.parametrize(("value", "said"), [(math.nan, "nan"), (-math.inf, "inf")])
def test_a_loss_that_is_not_finite_is_refused(value: float, said: str) -> None:
    broken = tiny.build("phi").train()  # its head has a bias
    with torch.no_grad():
        broken.lm_head.bias[spoken()[0].ids[-1]] = value
    with pytest.raises(
        NotFinite, match=f"the loss on held-out data is {said}: lower the rate, or train in float32"
    ):
        judge(broken, spoken(), PAD)
    assert all(module.training for module in broken.modules())


def test_progress_is_told_and_the_context_entered() -> None:
    told: list[tuple[int, int]] = []
    entered: list[int] = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        entered.append(len(told))
        yield

    made = labelled(SEVERAL, count=10)
    judge(
        model(), made, PAD, batch=4, word_ids=SEVERAL, around=around,
        watch=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(4, 10), (8, 10), (10, 10)]
    assert set(entered) == {0, 1, 2}


def test_no_gradient_is_kept() -> None:
    fresh = tiny.build("llama")
    judge(fresh, spoken(), PAD)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in fresh.parameters())
