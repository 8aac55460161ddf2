"""Decay of a product: exact, decoupled, in place of weight decay on the factors, and of nothing else."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.embeddings import build_embedding
from eckart.factors import FactoredLinear, LowRank, build
from eckart.linalg import truncated_svd
from eckart.scratch.decay import FrobeniusDecay, all_slopes, slopes

RATE, STRENGTH = 0.1, 0.3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(module: Any) -> Tensor:
    """Return the map of `module` with its graph."""
    eye = torch.eye(getattr(module, "in_features", 7), dtype=torch.float64)
    if hasattr(module, "codes"):
        found: Tensor = module(torch.arange(module.num_embeddings))
        return found
    shift: Tensor = module(torch.zeros_like(eye[:1]))
    mapped: Tensor = module(eye) - shift
    return mapped


LOW = LowRank(drawn(8, 3), drawn(3, 5, seed=1))
MODULES: dict[str, Any] = {
    "factored": build(LOW, "factored"),
    "factored with bias": build(LOW, "factored", drawn(8)),
    "pivoted": build(LOW, "pivoted"),
    "pivoted with bias": build(LOW, "pivoted", drawn(8)),
    "pivoted, all rows": build(LowRank(drawn(3, 3), drawn(3, 5)), "pivoted"),
    "embedding": build_embedding(LOW),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_slope_is_the_gradient_of_half_the_squared_norm(name: str) -> None:
    module = MODULES[name]
    found = slopes(module)
    wanted = torch.autograd.grad(product(module).square().sum() / 2, [value for value, _ in found])
    for (value, own), other in zip(found, wanted, strict=True):
        assert torch.allclose(own, other)
        assert not torch.allclose(own, value) or name == "pivoted, all rows"
    weights = [value for key, value in module.named_parameters() if key.endswith("weight")]
    assert {id(value) for value, _ in found} == {id(value) for value in weights}


def test_nothing_else_has_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 4))
    assert all_slopes(model) == []


def test_a_shared_factor_decays_by_the_sum() -> None:
    first, second = FactoredLinear(5, 8, 3).double(), FactoredLinear(5, 6, 3).double()
    second.down = first.down
    model = nn.ModuleList([first, second])
    found = {id(value): slope for value, slope in all_slopes(model)}
    whole = sum((product(part).square().sum() for part in (first, second)), torch.zeros(())) / 2
    (wanted,) = torch.autograd.grad(whole, [first.down.weight])
    assert torch.allclose(found[id(first.down.weight)], wanted)
    assert len(found) == 3


def stepped(
    model: nn.Module, decay: FrobeniusDecay, optimizer: torch.optim.Optimizer, frozen: Iterable[str] = ()
) -> None:
    """Do what Trainer does in a step, with gradients of zero."""
    for value in model.parameters():
        value.grad = torch.zeros_like(value) if value.requires_grad else None
    nothing: Any = None
    decay.on_pre_optimizer_step(nothing, nothing, nothing, model=model, optimizer=optimizer)
    optimizer.step()
    decay.on_optimizer_step(nothing, nothing, nothing, optimizer=optimizer)


@pytest.mark.parametrize("strength", [None, 0.7])
def test_in_a_step_products_decay_and_other_weights_decay_as_ever(strength: float | None) -> None:
    factored, dense = build(LOW, "factored", drawn(8)), nn.Linear(8, 4).double()
    model = nn.Sequential(factored, dense)
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    weights = [value for name, value in model.named_parameters() if name.endswith("weight")]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": STRENGTH}, {"params": biases, "weight_decay": 0.0}], lr=RATE
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    groups = [dict(group) for group in optimizer.param_groups]
    own = STRENGTH if strength is None else strength
    wanted = {id(value): value.detach() - RATE * own * slope for value, slope in slopes(factored)}
    stepped(model, FrobeniusDecay(strength), optimizer)
    for value, _ in slopes(factored):
        assert torch.allclose(value, wanted[id(value)])
    assert torch.allclose(dense.weight, before["1.weight"] * (1 - RATE * STRENGTH))
    for name in ("0.up.bias", "1.bias"):
        assert torch.equal(model.get_parameter(name), before[name])
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 2]
    for group, old in zip(optimizer.param_groups, groups, strict=True):
        assert group.keys() == old.keys()
        assert all(a is b for a, b in zip(group["params"], old["params"], strict=True))


def test_balanced_factors_shrink_each_singular_value_by_its_size() -> None:
    svd = truncated_svd(drawn(8, 5), 3)
    factored = build(LowRank(svd.left * svd.values, svd.right), "factored")
    optimizer = torch.optim.AdamW(factored.parameters(), lr=RATE, weight_decay=STRENGTH)
    stepped(factored, FrobeniusDecay(), optimizer)
    wanted = svd.values * (1 - RATE * STRENGTH * svd.values) ** 2
    assert torch.allclose(torch.linalg.svdvals(factored.map().dense())[:3], wanted)
    # Weight decay on the factors shrinks all alike.
    assert not torch.allclose(wanted / svd.values, torch.full_like(wanted, (1 - RATE * STRENGTH) ** 2))


def test_moments_do_not_notice_and_frozen_factors_stay() -> None:
    factored = build(LOW, "factored")
    assert isinstance(factored, FactoredLinear)
    factored.up.weight.requires_grad_(False)
    kept = factored.up.weight.detach().clone()
    optimizer = torch.optim.AdamW([factored.down.weight], lr=RATE, weight_decay=STRENGTH)
    for _ in range(3):
        stepped(factored, FrobeniusDecay(), optimizer)
    assert torch.equal(factored.up.weight, kept)
    state = optimizer.state[factored.down.weight]
    assert int(state["step"]) == 3
    assert not bool(state["exp_avg"].any())
