"""Kinds of modules: what is unfolded computes the same, and folds to what it was, on every device."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from eckart import StoreError, declaration, dense, factors, kinds, models, skeleton
from eckart.experts import Expert, Experts, is_stacked
from eckart.factors import FactoredLinear, NarrowLinear
from eckart.fused import Layout, SplitLinear
from eckart.linalg import truncated_svd

from . import tiny
from .conftest import logits

UNFOLDED = ["gpt2", "falcon", "mixtral", "qwen2-moe", "gpt-oss", "deepseek-v3"]
EXPERTS = ["mixtral", "qwen3-moe", "gpt-oss", "granite-moe", "olmoe"]


def kinds_of(model: nn.Module) -> list[tuple[str, type]]:
    """Return the modules of `model` by name, with their classes."""
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("name", UNFOLDED)
def test_unfolding_computes_the_same_and_folds_to_the_same_bits(name: str) -> None:
    model = tiny.build(name)
    before, classes, expected = (
        copy.deepcopy(model.state_dict()),
        kinds_of(model),
        logits(model, tiny.tokens()),
    )
    storages = {value.untyped_storage().data_ptr() for value in model.parameters()}
    assert kinds.unfold(model) is model
    assert kinds_of(model) != classes
    assert {value.untyped_storage().data_ptr() for value in model.parameters()} <= storages  # views
    assert torch.allclose(logits(model, tiny.tokens()), expected, rtol=1e-4, atol=1e-5)
    once = kinds_of(model)
    assert kinds_of(kinds.unfold(model)) == once
    for unfolded in (copy.deepcopy(model), model):
        kinds.fold(unfolded)
        assert kinds_of(unfolded) == classes
        assert torch.equal(logits(unfolded, tiny.tokens()), expected)
        state = unfolded.state_dict()
        assert list(state) == list(before)
        assert all(torch.equal(before[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", UNFOLDED)
def test_on_the_meta_device_the_same_modules_come_out(name: str) -> None:
    model = tiny.build(name)
    empty = kinds.on_meta(model)
    assert {value.device.type for value in empty.state_dict().values()} == {"meta"}
    with torch.device("meta"):  # as transformers makes skeletons
        kinds.unfold(empty)
    kinds.unfold(model)
    assert kinds_of(empty) == kinds_of(model)
    shapes = [tuple(value.shape) for value in empty.state_dict().values()]
    assert shapes == [tuple(value.shape) for value in model.state_dict().values()]
    assert kinds_of(kinds.fold(empty)) == kinds_of(tiny.build(name))


def test_a_block_alone_or_a_matrix_alone_is_unfolded() -> None:
    block: Any = tiny.build("gpt2").transformer.h[0]
    assert id(kinds.unfold(block)) == id(block)
    assert type(block.mlp.c_fc) is nn.Linear
    conv = Conv1D(5, 3)
    linear = kinds.unfold(conv)
    inputs = torch.randn(2, 4, 3)
    assert type(linear) is nn.Linear
    assert torch.allclose(linear(inputs), conv(inputs), atol=1e-6)
    again = kinds.fold(linear)
    assert type(again) is Conv1D
    assert torch.equal(again(inputs), conv(inputs))


def test_a_module_that_two_share_stays_shared() -> None:
    conv = Conv1D(4, 4)
    both: Any = nn.ModuleList([nn.Sequential(conv), nn.Sequential(conv)])
    kinds.unfold(both)
    assert both[0][0] is both[1][0]
    assert type(both[0][0]) is nn.Linear
    kinds.fold(both)
    assert both[0][0] is both[1][0]
    assert type(both[0][0]) is Conv1D


@pytest.mark.parametrize("bias", [True, False])
def test_a_low_rank_module_remembers_what_it_stands_for(bias: bool) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = Conv1D(6, 4)

    holder: Any = Holder()
    if not bias:
        holder.map.bias = None
    weight = holder.map.weight.detach().clone()
    kinds.unfold(holder)
    svd = truncated_svd(holder.map.weight.detach(), 3)
    low_rank = factors.build(factors.LowRank(svd.left * svd.values, svd.right), "factored", holder.map.bias)
    models.replace(holder, "map", low_rank.to(torch.float32))
    kinds.fold(holder)
    assert isinstance(holder.map, FactoredLinear)
    models.replace(holder, "map", dense.dense_linear(holder.map))
    kinds.fold(holder)
    assert type(holder.map) is Conv1D
    assert (holder.map.bias is not None) == bias
    cut = holder.map.weight.T
    assert torch.allclose(cut, (svd.left * svd.values @ svd.right).to(cut), atol=1e-6)
    assert not torch.allclose(cut, weight.T, atol=1e-6)


def test_what_is_never_called_or_computes_something_else_is_left_alone() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert kinds.kind_of(attention.out_proj) is None

    class Positive(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return nn.functional.linear(inputs, self.weight.abs(), self.bias)

    assert kinds.kind_of(Positive(3, 2)) is None
    assert kinds.kind_of(nn.Linear(3, 2)) is None
    assert kinds.kind_of(NarrowLinear(3, 2, False, whole=(4, 3))) is None


# experts


def by_hand(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return what `experts` do, token by token."""
    rows = []
    for row, picks, shares in zip(hidden, chosen, weights, strict=True):
        parts = [
            share * experts.each[int(pick)](row[None])[0]
            for pick, share in zip(picks, shares, strict=True)
            if int(pick) < len(experts.each)
        ]
        rows.append(torch.stack([torch.zeros_like(row), *parts]).sum(0))
    return torch.stack(rows)


def stacked_of(name: str) -> nn.Module:
    """Return the first stacked experts of a tiny model, in float64."""
    model = tiny.build(name, torch.float64)
    found: nn.Module = next(module for module in model.modules() if is_stacked(module))
    return found


@pytest.mark.parametrize("name", EXPERTS)
def test_unfolded_experts_are_the_stacked_ones_token_by_token(name: str) -> None:
    stacked: Any = stacked_of(name)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 32, generator=generator, dtype=torch.float64)
    weights, chosen = torch.rand(20, 4, generator=generator, dtype=torch.float64).topk(2)
    expected = stacked(hidden, chosen, weights)
    experts: Any = kinds.unfold(stacked)
    assert isinstance(experts, Experts)
    assert torch.allclose(experts(hidden, chosen, weights), expected, atol=1e-12)
    assert torch.allclose(by_hand(experts, hidden, chosen, weights), expected, atol=1e-12)
    assert not torch.allclose(experts(hidden, chosen.flip(1), weights), expected, atol=1e-6)
    masked = torch.where(chosen == 1, 4, chosen)  # one beyond the last is none
    found = experts(hidden, masked, weights)
    assert torch.allclose(found, by_hand(experts, hidden, masked, weights), atol=1e-12)
    assert not torch.allclose(found, expected, atol=1e-6)


def test_what_is_heard_of_an_expert_says_which_rows_it_got() -> None:
    experts: Any = kinds.unfold(stacked_of("mixtral"))
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def hear(index: int) -> Any:
        return lambda module, args, output: seen.update({index: (module.routed, args[0])})

    for index, expert in enumerate(experts.each):
        expert.gate_up.register_forward_hook(hear(index))
    hidden = torch.randn(6, 32, dtype=torch.float64)
    chosen = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0], [0, 2]])
    experts(hidden, chosen, torch.full((6, 2), 0.5, dtype=torch.float64))
    assert set(seen) == {0, 1, 2}  # nobody chose the last
    for index, (rows, inputs) in seen.items():
        assert sorted(rows.tolist()) == [row for row in range(6) if index in chosen[row]]
        assert torch.equal(inputs, hidden[rows])
    assert not any(hasattr(expert.gate_up, "routed") for expert in experts.each)


def test_experts_with_a_norm_or_other_parameters_are_not_understood() -> None:
    stacked: Any = stacked_of("mixtral")
    assert is_stacked(stacked)
    other = copy.deepcopy(stacked)
    other.extra = nn.Parameter(torch.zeros(3))
    assert not is_stacked(other)
    stacked.has_post_expert_norm = True
    assert not is_stacked(stacked)


def test_weights_that_stay_in_an_unfolded_container_lie_in_memory_of_their_own() -> None:
    experts: Any = kinds.unfold(stacked_of("mixtral"))
    whole = experts.each[1].down.weight.untyped_storage().nbytes()
    linear = experts.each[0].down
    models.replace(experts, "each.0.down", FactoredLinear(linear.in_features, linear.out_features, 2))
    assert id(kinds.fold(experts)) == id(experts)
    size = experts.each[1].down.weight.untyped_storage().nbytes()
    assert size == linear.weight.numel() * linear.weight.element_size() < whole
    assert isinstance(experts.each[1], Expert)


# parts


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """Draw a layout and how many rows a matrix of it has."""
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    grouped = draw(st.booleans())
    groups = draw(st.integers(1, 3)) if grouped else 1
    return Layout(tuple((f"p{i}", size) for i, size in enumerate(rows)), grouped), groups * sum(rows)


@settings(max_examples=50, deadline=None)
@given(layouts(), st.integers(1, 3), st.booleans())
def test_a_split_matrix_is_the_matrix(drawn: tuple[Layout, int], inputs: int, bias: bool) -> None:
    layout, rows = drawn
    linear = nn.Linear(inputs, rows, bias)
    split = SplitLinear.of(linear, layout)
    hidden = torch.randn(2, 5, inputs)
    assert (split.in_features, split.out_features) == (inputs, rows)
    assert torch.allclose(split(hidden), linear(hidden), atol=1e-6)
    joined = split.joined([nn.Linear])
    assert joined is not None
    assert torch.equal(joined.weight, linear.weight)
    assert bias == (joined.bias is not None)
    assert joined.bias is None or torch.equal(joined.bias, linear.bias)
    assert layout.fits(rows)
    assert not Layout((*layout.parts, ("more", rows)), layout.grouped).fits(rows)


def test_parts_may_lose_whole_groups() -> None:
    layout = Layout((("a", 2), ("b", 1)), True)
    linear = nn.Linear(4, 9)
    split: Any = SplitLinear.of(linear, layout)
    keep = torch.tensor([0, 2])
    for name, size in layout.parts:
        part = split.get_submodule(name)
        rows = (keep[:, None] * size + torch.arange(size)).flatten()
        setattr(split, name, NarrowLinear.slice(part, rows, None))
    hidden = torch.randn(3, 4)
    expected = linear(hidden).view(3, 3, 3)[:, keep].flatten(1)
    assert torch.allclose(split(hidden), expected, atol=1e-6)
    assert split.joined([nn.Linear]) is None


@pytest.mark.parametrize(
    ("unfolded", "message"),
    [
        ({"a": {"kind": "expert"}}, "declares 'a' as unfolded to .* legal is"),
        ({"a b": {"kind": "experts"}}, "declares 'a b' as unfolded"),
        ({"a": {"kind": "split", "parts": [["q", 0]], "grouped": False}}, "declares 'a' as unfolded"),
        ({"a": {"kind": "split", "parts": [["q", 2], ["q", 2]], "grouped": False}}, "declares 'a'"),
        ({"a": {"kind": "split", "parts": [["../q", 2]], "grouped": False}}, "declares 'a' as unfolded"),
        ({"a": {"kind": "split", "parts": [["q", 2]]}}, "declares 'a' as unfolded"),
    ],
)
def test_a_wrong_declaration_of_what_is_unfolded_is_refused(unfolded: Any, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        declaration.EckartConfig({}, unfolded=unfolded)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("transformer.h.0.attn", {"kind": "experts"}),
        ("transformer.h.7", {"kind": "linear"}),
        ("transformer.h.0.attn.c_attn", {"kind": "split", "parts": [["q", 5]], "grouped": False}),
    ],
)
def test_a_declaration_that_does_not_fit_the_model_is_refused(name: str, spec: Any) -> None:
    config = declaration.EckartConfig({}, unfolded={name: spec})
    with pytest.raises(StoreError, match=f"declares {name} as unfolded to .* does not fit"):
        skeleton.build_skeleton(tiny.build("gpt2"), config)


# names on disk

LEAVES = (
    "weight",
    "bias",
    "down.weight",
    "up.weight",
    "up.bias",
    "pivot.weight",
    "rest.weight",
    "order",
    "codes",
)
HOLDERS = ("mlp", "feed_forward", "block_sparse_moe", "moe", "mixer")


def test_no_conversion_of_transformers_catches_the_names_of_what_is_unfolded() -> None:
    """Stock files hold experts one by one, and are stacked by their names; ours stay as they are."""
    own = [f"experts.each.3.{name}.{leaf}" for name in ("gate_up", "up", "down") for leaf in LEAVES]
    own += [f"{name}.{leaf}" for name in ("qkv_proj.q_rows", "gate_up_proj.up_rows") for leaf in LEAVES]
    own += [f"experts.each.3.gate_up.{name}.{leaf}" for name in ("gate_rows", "up_rows") for leaf in LEAVES]
    caught, seen = set(), 0
    for kind in CONFIG_MAPPING_NAMES:
        for transform in get_checkpoint_conversion_mapping(kind) or []:
            seen += 1
            for tail in own:
                for holder in HOLDERS:
                    found, _ = transform.rename_source_key(f"model.layers.0.{holder}.{tail}")
                    if not found.endswith(f".{tail}"):
                        caught.add((kind, tail, found))
    assert seen > 100
    assert not caught
    stock = "model.layers.0.mlp.experts.3.gate_proj.weight"
    names = [t.rename_source_key(stock)[0] for t in get_checkpoint_conversion_mapping("qwen2_moe")]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
