"""Rows of examples and losses on them: padding and packing change nothing, nor does a head that sees less."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eckart import ModelError
from eckart.adapt import batches, losses
from eckart.adapt.batches import Collator, check_packing, evaluating, packed, rows
from eckart.adapt.examples import IGNORED, Example

from . import tiny

PAD = 1
PACKS = sorted(set(tiny.LINEAR) - {"opt"})


def close(own: Tensor, other: Tensor) -> None:
    """Assert that both are the same to rounding in float32, relative to the largest entry."""
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * float(other.detach().abs().max()) + 1e-6)


def example(size: int, seed: int = 0, learned: int | None = None) -> Example:
    """Return random ids, of which the last `learned` are learned, or all."""
    ids = torch.randint(2, tiny.VOCABULARY, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    quiet = 0 if learned is None else size - learned
    return Example(ids, [IGNORED] * quiet + ids[quiet:])


def some(*sizes: int) -> list[Example]:
    """Return examples of which the second half is learned, and of every third all."""
    return [
        example(size, seed=index, learned=None if index % 3 == 2 else size // 2)
        for index, size in enumerate(sizes)
    ]


def pieces(row: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """Return (ids, labels) of the examples in a packed row: positions begin anew with each."""
    starts = [index for index, place in enumerate(row["position_ids"]) if place == 0]
    spans = list(zip(starts, [*starts[1:], len(row["input_ids"])], strict=True))
    for start, end in spans:
        assert row["position_ids"][start:end] == list(range(end - start))
    return [(row["input_ids"][start:end], row["labels"][start:end]) for start, end in spans]


@given(st.lists(st.integers(2, 12), min_size=1, max_size=5))
def test_padding_is_on_the_right_and_learned_nowhere(sizes: list[int]) -> None:
    made = some(*sizes)
    batch = Collator(PAD)(rows(made))
    assert batch["input_ids"].shape == batch["labels"].shape == (len(sizes), max(sizes))
    for one, ids, labels in zip(made, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        size = len(one.ids)
        assert ids == one.ids + [PAD] * (max(sizes) - size)
        assert labels[1:size] == one.labels[1:]
        assert labels[0] == IGNORED
        assert set(labels[size:]) <= {IGNORED}
    assert int((batch["labels"] != IGNORED).sum()) == sum(one.learned for one in made)


@pytest.mark.parametrize("architecture", tiny.LINEAR)
@torch.no_grad()
def test_padding_changes_no_logits(architecture: str) -> None:
    model = tiny.build(architecture)
    made = some(5, 17, 40)
    found = model(**{"input_ids": Collator(PAD)(rows(made))["input_ids"]}, use_cache=False).logits
    for one, logits in zip(made, found, strict=True):
        alone = model(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0]
        close(logits[: len(one.ids)], alone)


@pytest.mark.parametrize(
    ("given_ids", "expected"),
    [({"pad_token_id": 5, "eos_token_id": 2}, 5), ({"pad_token_id": None, "eos_token_id": 2}, 2), ({}, 0)],
)
def test_what_rows_are_padded_with(given_ids: dict[str, Any], expected: int) -> None:
    assert batches.pad_token(SimpleNamespace(**given_ids)) == expected


@given(st.lists(st.integers(2, 24), min_size=1, max_size=40), st.integers(24, 40))
def test_packed_rows_hold_every_example_once(sizes: list[int], seq_len: int) -> None:
    made = some(*sizes)
    found = packed(made, seq_len)
    assert all(len({len(values) for values in row.values()}) == 1 for row in found)
    assert all(len(row["input_ids"]) <= seq_len for row in found)
    inside = sorted(piece for row in found for piece in pieces(row))
    assert inside == sorted((one.ids, [IGNORED, *one.labels[1:]]) for one in made)
    # Two rows that fit into one would be one.
    totals = sorted(len(row["input_ids"]) for row in found)
    assert len(totals) < 2 or totals[0] + totals[1] > seq_len


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(2, 22), max_size=6), min_size=1, max_size=30))
def test_packed_rows_are_hardly_more_than_the_fewest(cuts: list[list[int]]) -> None:
    """Examples that fill whole rows without a gap: the fewest rows are known."""
    sizes = []
    for row in cuts:
        places = [0]
        for place in sorted(row):
            if place - places[-1] >= 2:
                places.append(place)
        sizes += [end - start for start, end in zip(places, [*places[1:], 24], strict=True)]
    found = packed([example(size, index) for index, size in enumerate(sizes)], 24)
    assert len(cuts) <= len(found) <= math.floor(11 / 9 * len(cuts) + 6 / 9)


@given(st.permutations([12, 10, 8, 6, 4]))
def test_the_longest_come_first_into_the_fullest_row(sizes: list[int]) -> None:
    """Shortest first, or into the emptiest row, these need three."""
    assert sorted(len(row["input_ids"]) for row in packed(some(*sizes), 20)) == [20, 20]


def test_padding_of_packed_rows_is_an_example_of_its_own() -> None:
    made = packed(some(6, 5, 4, 7), 11)
    batch = Collator(PAD)([*made, *packed(some(4), 11)])
    assert batch["position_ids"][-1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]
    assert batch["labels"][-1, 4:].tolist() == [IGNORED] * 7
    assert batch["position_ids"].shape == batch["input_ids"].shape


def packed_and_alone(model: Any) -> tuple[Tensor, Tensor]:
    """Return the losses of packed rows, in one batch, and those of the same examples alone, in that order."""
    made = some(9, 20, 14, 5, 30, 3, 11)
    found = packed(made, 48)
    assert len(found) < len(made)
    alone = {tuple(one.ids): losses.run(model, Collator(PAD)(rows([one]))) for one in made}
    order = [alone[tuple(ids)] for row in found for ids, _ in pieces(row)]
    return losses.run(model, Collator(PAD)(found)), torch.cat(order)


@pytest.mark.parametrize("architecture", PACKS)
def test_packed_examples_are_learned_as_if_alone(architecture: str) -> None:
    """The loss of every token, and so the gradient of every weight, is that of the example by itself."""
    model = tiny.build(architecture)
    check_packing(model)
    found, alone = packed_and_alone(model)
    close(found, alone)
    weights = list(model.parameters())
    together, apart = (torch.autograd.grad(one.sum(), weights) for one in (found, alone))
    for own, other in zip(together, apart, strict=True):
        close(own, other)


@pytest.mark.parametrize("architecture", ["opt", "bloom"])
def test_a_model_that_mixes_packed_examples_is_refused(architecture: str) -> None:
    if architecture == "opt":
        model = tiny.build("opt")
    else:
        torch.manual_seed(0)
        small = transformers.BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
        model = transformers.BloomForCausalLM(small).eval()
    with pytest.raises(
        ModelError,
        match=f"^{type(model).__name__} lets examples that are packed into one row see each other: leave out "
        "--packing",
    ):
        check_packing(model)


@torch.no_grad()
def test_a_model_that_is_refused_does_learn_something_else() -> None:
    found, alone = packed_and_alone(tiny.build("opt"))
    assert float((found - alone).abs().max()) > 0.1


class Bare(nn.Module):
    """A language model whose forward knows no positions."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=tiny.VOCABULARY))

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(tiny.VOCABULARY, 8)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))


def test_a_model_without_positions_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"Bare takes no positions: leave out --packing \(.* unexpected keyword"
    ):
        check_packing(Bare())


def test_modes_are_restored(llama: Any) -> None:
    llama.train()
    llama.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in llama.named_modules()}
    with evaluating(llama):
        assert not any(module.training for module in llama.modules())
    assert {name: module.training for name, module in llama.named_modules()} == before
    with pytest.raises(ZeroDivisionError), evaluating(llama):
        raise ZeroDivisionError
    assert {name: module.training for name, module in llama.named_modules()} == before
    check_packing(llama)
    assert {name: module.training for name, module in llama.named_modules()} == before


def batch_of(*sizes: int) -> dict[str, Tensor]:
    return Collator(PAD)(rows(some(*sizes)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", tiny.LINEAR)
def test_a_head_that_sees_less_gives_the_same_logits_and_gradients(architecture: str, tied: bool) -> None:
    model = tiny.build(architecture, tie_word_embeddings=tied)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is table.weight) == tied
    batch, weights = batch_of(12, 7, 4), list(model.parameters())
    places = losses.before(batch["labels"])
    whole = model(input_ids=batch["input_ids"], use_cache=False).logits
    with losses.head_at(model, places):
        part = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert part.shape == (int(places.sum()), tiny.VOCABULARY)
    close(part, whole[places])
    found = [losses.learned_losses(logits, batch["labels"]) for logits in (part, whole)]
    close(*found)
    own, other = (torch.autograd.grad(one.sum(), weights) for one in found)
    for mine, theirs in zip(own, other, strict=True):
        close(mine, theirs)
    again = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert torch.equal(again, whole)


@pytest.mark.parametrize("architecture", tiny.LINEAR)
@torch.no_grad()
def test_losses_are_those_of_transformers(architecture: str) -> None:
    model = tiny.build(architecture)
    batch = batch_of(16, 9, 5)
    found = losses.run(model, batch)
    assert found.dtype == torch.float32
    assert len(found) == int((batch["labels"][:, 1:] != IGNORED).sum())
    assert float(found.mean()) == pytest.approx(float(model(**batch).loss), rel=1e-5)


@torch.no_grad()
def test_losses_come_row_by_row(llama: Any) -> None:
    made = some(16, 9, 5)
    found = losses.run(llama, Collator(PAD)(rows(made)))
    expected = []
    for one in made:
        logs = llama(input_ids=torch.tensor([one.ids])).logits[0].log_softmax(-1)
        expected += [
            -logs[place - 1, token] for place, token in enumerate(one.labels) if place and token != IGNORED
        ]
    close(found, torch.stack(expected))
    sums = losses.sums(found, Collator(PAD)(rows(made))["labels"])
    close(sums, torch.stack([part.sum() for part in (found[:8], found[8:12], found[12:])]))


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_sums_are_of_what_is_learned_in_a_row(learned: list[list[bool]]) -> None:
    labels = torch.where(torch.tensor(learned), torch.arange(6), IGNORED)
    logits = torch.randn(*labels.shape, 6, generator=torch.Generator().manual_seed(0))
    found = losses.sums(losses.learned_losses(logits, labels), labels)
    targets = labels[:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(found, each.sum(1))


def test_the_head_is_left_as_it_was(llama: Any) -> None:
    places = torch.ones(2, 24, dtype=torch.bool)
    with pytest.raises(ZeroDivisionError), losses.head_at(llama, places):
        raise ZeroDivisionError
    assert not llama.lm_head._forward_pre_hooks


@torch.no_grad()
def test_a_head_that_is_given_something_else_is_left_alone(llama: Any) -> None:
    ids = tiny.tokens()
    places = torch.zeros_like(ids, dtype=torch.bool)
    with losses.head_at(llama, places):
        last = llama(input_ids=ids, logits_to_keep=1).logits
    assert torch.equal(last, llama(input_ids=ids, logits_to_keep=1).logits)
    places[:, :3] = True
    states = torch.randn(*ids.shape, 32)
    with losses.head_at(llama, places):
        assert llama.lm_head(states).shape == (6, tiny.VOCABULARY)
        assert llama.lm_head(input=states).shape == (*ids.shape, tiny.VOCABULARY)
    headless = copy.copy(llama.model)
    headless.get_output_embeddings = lambda: None
    with losses.head_at(headless, places):
        assert headless(input_ids=ids).last_hidden_state.shape == (*ids.shape, 32)
