"""Heads made narrower: what is kept is an exact basis, what is lost is what the curve says."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from eckart import RankError, dimensions, heads, models
from eckart import dense as dense_module
from eckart.factors import PartialLinear
from eckart.heads import Heads
from eckart.linalg import Metric, weighted_error

from . import tiny
from .conftest import logits


def moment(size: int, seed: int) -> torch.Tensor:
    draws = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draws @ draws.T / (3 * size)


def attention(groups: int = 2, share: int = 3, size: int = 4, interleaved: bool | None = False) -> Heads:
    return Heads("a", "a.q", "a.k", "a.v", "a.o", groups * share, groups, size, interleaved)


def case(own: Heads, damp: float = 0.0) -> tuple[torch.Tensor, Metric, Metric]:
    width = own.count * own.size
    weight = torch.randn(10, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return weight, Metric(width, moment(width, 1), damp), Metric(10, moment(10, 2), damp)


def whole(found: heads.ValueNarrowing, own: Heads, kept: int) -> torch.Tensor:
    """The map from the old values of all heads to the outputs."""
    share = own.count // own.groups
    parts = torch.block_diag(*(found.basis[head // share][:kept] for head in range(own.count)))  # type: ignore[no-untyped-call]
    product: torch.Tensor = found.output(kept) @ parts
    return product


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_values_of_full_width_are_the_identity_and_the_curve_is_the_error(damp: float) -> None:
    own = attention()
    weight, inputs, outputs = case(own, damp)
    found = heads.narrow_values(own, weight, inputs, outputs)
    tail = found.tail()
    assert torch.allclose(whole(found, own, own.size), weight, atol=1e-8)
    assert bool((tail.diff() < 0).all())
    for kept in range(1, own.size + 1):
        error = weighted_error(weight - whole(found, own, kept), inputs, outputs)
        assert error == pytest.approx(float(tail[kept]), rel=1e-6, abs=1e-8 * float(tail[0]))


def test_one_head_is_the_generalised_svd() -> None:
    own = attention(groups=1, share=1, size=8)
    weight, inputs, outputs = case(own)
    tail = heads.narrow_values(own, weight, inputs, outputs).tail()
    root = outputs.root_times(inputs.root_times(weight.T).T)
    squares = torch.linalg.svdvals(root).square()
    for kept in range(9):
        assert float(tail[kept]) == pytest.approx(float(squares[kept:].sum()), rel=1e-5, abs=1e-9)


def test_the_basis_is_better_than_the_values_as_they_are() -> None:
    own = attention(size=8)
    weight, inputs, outputs = case(own)
    best = heads.narrow_values(own, weight, inputs, outputs).tail()
    columns = torch.arange(own.count * own.size).view(own.count, own.size)
    for kept in (2, 4, 6):
        cut = weight.clone()
        cut[:, columns[:, kept:].flatten()] = 0
        assert float(best[kept]) < 0.9 * weighted_error(weight - cut, inputs, outputs)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_dropped_pair_costs_what_zero_rows_cost(interleaved: bool) -> None:
    own = attention(groups=1, share=3, size=8, interleaved=interleaved)
    weight = torch.randn(24, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs, outputs = Metric(5, moment(5, 5)), Metric(24, moment(24, 6))
    found = heads.narrow_pairs(own, weight, inputs, outputs)
    worst = found.order[0, -1:]
    rows = heads.places(torch.cat(own.halves(worst)), own.count, own.size)
    error = torch.zeros_like(weight)
    error[rows] = weight[rows]
    assert float(found.tail()[-2]) == pytest.approx(weighted_error(error, inputs, outputs))
    assert float(found.tail()[-1]) == 0
    assert bool((found.tail().diff() <= 0).all())


# Norms of queries and keys, or positions that rotate a part of a head, rule pairs out (stablelm
# rotates two rows alone).
EXPECTED = {
    "llama": False, "llama-bias-untied": False, "mistral": False, "qwen2": False, "gemma2": False,
    "opt": False, "stablelm": True, "qwen3": None, "gemma3": None, "phi": None, "olmo2": None,
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_heads_are_found_by_what_they_do(name: str) -> None:
    model = tiny.build(name)
    found = heads.found(model, dimensions.find(model, models.targets(model)))
    assert len(found) == 2
    assert {own.interleaved for own in found} == {EXPECTED[name]}
    for own in found:
        # Where both have as many heads, either may pass for the query.
        roles = [own.query[-6:], own.key[-6:]]
        assert (sorted(roles) if name == "opt" else roles[::-1]) == ["k_proj", "q_proj"]
        assert own.value.endswith("v_proj")
        assert (own.count, own.groups) == (4, 4 if name == "opt" else 2)


def test_positions_that_rotate_neighbours_are_told_apart() -> None:
    config = transformers.CohereConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    found = heads.found(model, dimensions.find(model, models.targets(model)))
    assert [own.interleaved for own in found] == [True]


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_partial_linear_is_the_padded_one(side: Any, bias: bool) -> None:
    torch.manual_seed(1)
    linear = torch.nn.Linear(6, 8, bias)
    places = torch.tensor([1, 4, 5])
    weight = linear.weight.detach()[places] if side == "rows" else linear.weight.detach()[:, places]
    own = None if not bias else linear.bias.detach()[places] if side == "rows" else linear.bias.detach()
    module = PartialLinear.of(linear, side, places, weight, own)
    dense = dense_module.dense_linear(module)
    inputs = torch.randn(2, 3, 6)
    assert torch.allclose(module(inputs), dense(inputs), atol=1e-6)
    assert not torch.allclose(module(inputs), linear(inputs), atol=1e-6)
    assert int((dense.weight != 0).sum()) == weight.numel()


def test_a_partial_linear_keeps_something() -> None:
    with pytest.raises(RankError, match="9 of 8 rows: legal are 1 to 8"):
        PartialLinear(6, 8, 9, "rows")
    with pytest.raises(RankError, match="0 of 6 columns: legal are 1 to 6"):
        PartialLinear(6, 8, 0, "columns")


def test_a_model_narrowed_by_heads_saves_generates_and_densifies(compress: Any, tmp_path: Any) -> None:
    from eckart import densify, save

    from .conftest import reload

    model, result = compress(tiny.build("llama-bias-untied"), form="width", keep=0.45, of="linears")
    partial = [module for module in result.modules if module.form == "partial"]
    assert partial
    before = logits(model, tiny.tokens())
    save(model, None, tmp_path / "out", result)
    again = reload(tmp_path / "out")
    assert torch.equal(logits(again, tiny.tokens()), before)
    assert again.generate(tiny.tokens(), max_new_tokens=4, pad_token_id=1, do_sample=False).shape[1] == 28
    stock = densify(again)
    assert not models.low_rank_modules(stock)
    assert torch.allclose(logits(stock, tiny.tokens()), before, atol=1e-4 * float(before.abs().max()))
