"""Ranks before training: an optimum of what gradients say, from a model that is left as it was."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from eckart import NotFinite, RankError
from eckart.adapt import allocation, losses, targets
from eckart.adapt.batches import Batch, Collator, rows
from eckart.adapt.examples import IGNORED, Example
from eckart.adapt.tuning import Tuning

from . import tiny, wards


def some(count: int = 4, seed: int = 0) -> list[Batch]:
    """Return batches of one example each, of which the end is learned."""
    made = []
    for index in range(count):
        draws = torch.Generator().manual_seed(seed + index)
        ids = torch.randint(2, tiny.VOCABULARY, (10 + index,), generator=draws).tolist()
        made.append(Collator(1)(rows([Example(ids, [IGNORED] * 6 + ids[6:])])))
    return made


def ranks(
    model: Any, chosen: list[str], batches: list[Batch] | None = None, **settings: Any
) -> dict[str, int]:
    tuning = Tuning(**{"rank": "auto"} | settings)
    return allocation.ranks(
        model, chosen, tuning, some() if batches is None else batches, contextlib.nullcontext, lambda *_: None
    )


def gradients(model: Any, chosen: list[str]) -> dict[str, torch.Tensor]:
    """Return those of the summed loss, which transformers computes as a mean."""
    weights = [model.get_submodule(name).weight for name in chosen]
    total = torch.zeros(())
    for batch in some():
        learned = int((batch["labels"][:, 1:] != IGNORED).sum())
        total = total + model(**batch).loss * learned
    return dict(zip(chosen, torch.autograd.grad(total, weights), strict=True))


def gain(found: dict[str, int], squares: dict[str, list[float]]) -> float:
    return sum(sum(squares[name][:rank]) for name, rank in found.items())


def cost(found: dict[str, int], shapes: dict[str, tuple[int, int]]) -> int:
    return sum(rank * sum(shapes[name]) for name, rank in found.items())


EQUAL = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.0.self_attn.o_proj",
]
UNEQUAL = ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]


@pytest.mark.parametrize("chosen", [EQUAL, UNEQUAL], ids=["equal shapes", "others"])
@pytest.mark.parametrize("budget", [64, 100, 200, 333, 500])
def test_no_other_ranks_within_the_budget_gain_more(budget: int, chosen: list[str], llama: Any) -> None:
    """Where shapes are equal; else a budget may end within a term, and no more than that term is lost."""
    shapes = targets.shapes(llama, chosen)
    grads = gradients(llama, chosen)
    squares = {name: torch.linalg.svdvals(grad.double()).square().tolist() for name, grad in grads.items()}
    found = ranks(llama, chosen, budget=budget)
    assert list(found) == chosen
    assert cost(found, shapes) <= budget
    others = (
        dict(zip(chosen, pick, strict=True)) for pick in itertools.product(range(500 // 48 + 1), repeat=3)
    )
    best = max(gain(other, squares) for other in others if cost(other, shapes) <= budget)
    lost = 0.0 if chosen is EQUAL else max(one[0] for one in squares.values())
    assert best - lost - 1e-6 * best <= gain(found, squares) <= best * (1 + 1e-6)
    left = budget - cost(found, shapes)
    assert all(sum(shapes[name]) > left for name in chosen)  # nothing more fits


def test_the_budget_is_that_of_uniform_ranks(llama: Any) -> None:
    chosen = targets.names(llama)
    shapes = targets.shapes(llama, chosen)
    uniform = cost(dict.fromkeys(chosen, 3), shapes)
    found = ranks(llama, chosen, auto_rank=3)
    assert uniform - min(map(sum, shapes.values())) < cost(found, shapes) <= uniform
    assert len(set(found.values())) > 1
    assert found == ranks(llama, chosen, budget=uniform)
    whole = ranks(llama, chosen, auto_rank=100)
    grads = gradients(llama, chosen)
    assert all(rank <= min(grads[name].shape) for name, rank in whole.items())


def test_the_gain_is_how_the_loss_falls(llama: Any) -> None:
    """A small step along the best part of rank r lowers the loss by the r largest squared singular values."""
    (name,) = chosen = EQUAL[:1]
    left, values, right = torch.linalg.svd(gradients(llama, chosen)[name])
    (found,) = allocation._spectra(llama, chosen, some(), contextlib.nullcontext, lambda *_: None).values()

    def loss() -> float:
        with torch.no_grad():
            return float(sum(losses.run(llama, batch).double().sum() for batch in some()))

    start = loss()
    for rank in (1, 3):
        step = 3e-2 / float(values[0])
        part = (left[:, :rank] * values[:rank]) @ right[:rank]
        weight = llama.get_submodule(name).weight
        with torch.no_grad():
            weight.sub_(step * part)
            fallen = (start - loss()) / step
            weight.add_(step * part)
        assert fallen == pytest.approx(float(found[:rank].square().sum()), rel=0.05)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_spectra_are_those_of_the_summed_losss_gradients(architecture: str) -> None:
    model = tiny.build(architecture)
    chosen = targets.names(model)
    found = allocation._spectra(model, chosen, some(), contextlib.nullcontext, lambda *_: None)
    assert list(found) == chosen
    for name, grad in gradients(model, chosen).items():
        expected = torch.linalg.svdvals(grad.double())
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4 * float(expected[0]))


def test_batches_are_summed(llama: Any) -> None:
    def found(batches: list[Batch]) -> torch.Tensor:
        quiet = contextlib.nullcontext
        return torch.cat([
            *allocation._spectra(llama, EQUAL, batches, quiet, lambda *_: None).values()
        ])  # fmt: skip

    one = some(1)
    torch.testing.assert_close(found(one * 3), 3 * found(one), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found(some()), found(some()[::-1]), rtol=1e-3, atol=1e-5)


def test_factors_of_a_compressed_model_get_ranks(llama: Any) -> None:
    model = wards.cut(llama, 6)
    chosen = targets.names(model, ["q_proj", "down_proj"])
    found = ranks(model, chosen, auto_rank=2)
    assert list(found) == chosen
    assert max(found.values()) <= 6
    shapes = targets.shapes(model, chosen)
    assert 0 < cost(found, shapes) <= cost(dict.fromkeys(chosen, 2), shapes)


def test_what_the_loss_does_not_depend_on_gets_no_rank(llama: Any) -> None:
    llama.model.layers[0].unused = nn.Linear(32, 32)
    found = ranks(llama, ["model.layers.0.unused", *EQUAL], auto_rank=2)
    assert found["model.layers.0.unused"] == 0
    assert sum(found.values()) == 8


class Watch:
    """Counts what is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.told.append((stage, done, total))


def test_uniform_ranks_look_at_nothing() -> None:
    def found(**settings: Any) -> dict[str, int]:
        return allocation.ranks(None, ["a", "b"], Tuning(**settings), [], contextlib.nullcontext, Watch())

    assert found(rank=5) == {"a": 5, "b": 5}
    assert found(rank=5, method="adalora") == {"a": 8, "b": 8}
    assert found(rank=5, method="adalora", start_rank=6) == {"a": 6, "b": 6}


def test_progress_is_told_and_the_context_entered(llama: Any) -> None:
    watch, entered = Watch(), []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        entered.append(len(watch.told))
        yield

    allocation.ranks(llama, EQUAL, Tuning(rank="auto"), some(3), around, watch)
    assert watch.told == [("look at gradients", done, 3) for done in (1, 2, 3)]
    assert entered == [0, 1, 2]


def prepare(model: Any) -> dict[str, tuple[bool, torch.Tensor | None, torch.Tensor]]:
    """Give every other parameter no gradient to keep, the others one, and return all."""
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        parameter.grad = torch.full_like(parameter, 7.0) if index % 2 else None
    return state(model)


def state(model: Any) -> dict[str, tuple[bool, torch.Tensor | None, torch.Tensor]]:
    return {
        name: (
            value.requires_grad,
            None if value.grad is None else value.grad.clone(),
            value.detach().clone(),
        )
        for name, value in model.named_parameters()
    }


def same(own: Any, other: Any) -> bool:
    return own.keys() == other.keys() and all(
        flag == theirs[0]
        and (grad is theirs[1] if grad is None or theirs[1] is None else torch.equal(grad, theirs[1]))
        and torch.equal(value, theirs[2])
        for (flag, grad, value), theirs in zip(own.values(), other.values(), strict=True)
    )


def test_the_model_is_left_as_it_was(llama: Any) -> None:
    chosen = targets.names(llama)
    expected = ranks(llama, chosen, auto_rank=2)
    before = prepare(llama)
    llama.train()
    llama.model.layers[1].eval()
    modes = [module.training for module in llama.modules()]
    assert ranks(llama, chosen, auto_rank=2) == expected  # the gradients that it has are not counted
    assert same(state(llama), before)
    assert [module.training for module in llama.modules()] == modes
    with pytest.raises(KeyError):
        ranks(llama, chosen, [{"input_ids": tiny.tokens()}])
    assert same(state(llama), before)
    assert [module.training for module in llama.modules()] == modes


def test_a_budget_that_holds_nothing_is_refused(llama: Any) -> None:
    before = prepare(llama)
    with pytest.raises(
        RankError, match="a budget of 63 parameters holds no term of any matrix: the least is 64"
    ):
        ranks(llama, EQUAL, budget=63)
    assert same(state(llama), before)


def test_a_gradient_that_is_not_finite_is_refused(llama: Any) -> None:
    with torch.no_grad():
        llama.model.norm.weight[3] = torch.nan
    before = prepare(llama)
    with pytest.raises(
        NotFinite, match=rf"the gradient of {EQUAL[0]} \(32, 32\) has 1024 NaN or infinite entries"
    ):
        ranks(llama, EQUAL)
    assert {name: one[:1] for name, one in state(llama).items()} == {
        name: one[:1] for name, one in before.items()
    }
