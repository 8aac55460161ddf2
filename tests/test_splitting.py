"""Fused projections in parts: rows found by what they do, each part with its own metric."""

from typing import Any

import pytest
import torch
from torch import nn

from eckart import ConfigError, ModelError, Recipe, dimensions, kinds, models, planning, splitting
from eckart.calibrate import calibrate
from eckart.fused import Layout, SplitLinear

from . import tiny
from .conftest import Compress, logits

HEADS = ("q_rows", "k_rows", "v_rows")
# Read in the code of each architecture: rows of queries, keys and values in each group, or in all.
EXPECTED: dict[str, tuple[tuple[int, ...], bool]] = {
    "phi3": ((32, 16, 16), False),
    "gpt2": ((32, 32, 32), False),
    "gpt-neox": ((8, 8, 8), True),
    "bloom": ((8, 8, 8), True),
    "falcon": ((8, 8, 8), True),
    "falcon-multi-query": ((32, 8, 8), False),
    "falcon-new-decoder": ((16, 8, 8), True),
}


def parts_of(model: nn.Module) -> dict[str, SplitLinear]:
    """Return the split projections of `model` by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, SplitLinear)}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_rows_of_heads_are_those_that_the_architecture_has(name: str) -> None:
    model = tiny.build(name)
    before = logits(model, tiny.tokens())
    assert splitting.unfold(model, True) == []
    rows, grouped = EXPECTED[name]
    layouts = [part.layout for part in parts_of(model).values() if part.layout.parts[0][0] in HEADS]
    assert layouts == [Layout(tuple(zip(HEADS, rows, strict=True)), grouped)] * 2
    assert torch.allclose(logits(model, tiny.tokens()), before, atol=1e-5)


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_the_rows_of_gate_and_up(name: str) -> None:
    model = tiny.build(name)
    assert splitting.unfold(model, True) == []
    found = [part for part in parts_of(model).values() if part.layout.parts[0][0] not in HEADS]
    assert found
    assert {part.layout for part in found} == {Layout((("gate_rows", 48), ("up_rows", 48)), False)}


class _Gated(nn.Module):
    """An MLP whose gate and up stand in the order, and as closely, as is asked for."""

    def __init__(self, interleaved: bool, up_first: bool) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(8, 12), nn.Linear(6, 8)
        self.interleaved, self.up_first = interleaved, up_first

    def forward(self, hidden: torch.Tensor) -> Any:
        both = self.gate_up(hidden)
        first, second = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, dim=-1)
        gate, up = (second, first) if self.up_first else (first, second)
        return self.down(nn.functional.silu(gate) * up)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("up_first", [True, False])
def test_any_order_of_gate_and_up_is_found(interleaved: bool, up_first: bool) -> None:
    model = nn.Sequential(nn.ModuleList([_Gated(interleaved, up_first) for _ in range(2)]))
    assert splitting.split(model) == []
    names = ("up_rows", "gate_rows") if up_first else ("gate_rows", "up_rows")
    rows = 1 if interleaved else 6
    wanted = Layout(tuple((name, rows) for name in names), interleaved)
    assert [part.layout for part in parts_of(model).values()] == [wanted, wanted]


def test_what_cannot_be_verified_stays_whole_and_is_named(compress: Compress) -> None:
    model = tiny.build("gpt-oss")  # its experts add one to up: no half doubles what is read
    warnings = splitting.unfold(model, True)
    assert parts_of(model) == {}
    assert "8 fused projections stay whole" in warnings[0]
    assert "model.layers.0.mlp.experts.each.0.gate_up" in warnings[0]
    _, result = compress(tiny.build("gpt-oss"), split="fused")
    assert any("fused projections stay whole" in warning for warning in result.warnings)


@pytest.mark.parametrize("name", tiny.FUSED)
def test_a_part_has_the_metric_of_its_rows(name: str) -> None:
    """One input for all parts; of the gradients of all rows, those of its own."""
    whole, split = kinds.unfold(tiny.build(name)), tiny.build(name)
    assert splitting.unfold(split, True) == []
    cut = parts_of(split)
    windows = torch.randint(2, tiny.VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))

    def statistics(model: Any) -> Any:
        names = [target.name for target in models.targets(model)]
        return calibrate(
            model, windows, names, ("gram", "gradient"),
            gradient_windows=4, generator=torch.Generator().manual_seed(0),
        ).stats  # fmt: skip

    expected, found = statistics(whole), statistics(split)
    for fused, module in cut.items():
        leaders = {found.leader(f"{fused}.{part}") for part, _ in module.layout.parts}
        assert len(leaders) == 1  # the second moment of the input is held once
        gram, gradient = (expected.moment(kind, fused) for kind in ("gram", "gradient"))
        rows = module.layout.cut(torch.arange(module.out_features))
        for (part, _), own in zip(module.layout.parts, rows, strict=True):
            seen, back = (found.moment(kind, f"{fused}.{part}") for kind in ("gram", "gradient"))
            assert (seen.count, back.count) == (gram.count, gradient.count)
            assert torch.allclose(seen.mean(), gram.mean(), rtol=1e-3, atol=1e-5 * float(gram.mean().max()))
            wanted = gradient.mean()[own][:, own]
            atol = 1e-4 * float(wanted.abs().max())
            assert torch.allclose(back.mean(), wanted, rtol=1e-2, atol=atol)
            other = gradient.mean()[: len(own), : len(own)].flip(0, 1)
            assert not torch.allclose(back.mean(), other, rtol=1e-2, atol=atol)


def test_parts_have_ranks_of_their_own(compress: Compress) -> None:
    model, result = compress(tiny.build("gpt2"), split="fused", form="factored")
    ranks = {row.name.removeprefix("transformer.h.0.attn.c_attn."): row.rank for row in result.modules}
    assert set(HEADS) <= set(ranks)
    assert len({ranks[name] for name in HEADS}) > 1
    assert parts_of(model)


def test_patterns_name_the_parts(compress: Compress) -> None:
    _, result = compress(tiny.build("phi3"), split="fused", exclude=["v_rows"])
    names = [row.name for row in result.modules]
    assert any(name.endswith("qkv_proj.k_rows") for name in names)
    assert not any(name.endswith("v_rows") for name in names)
    with pytest.raises(ModelError, match=r"'v_rows' matches none .* matrices"):
        compress(tiny.build("phi3"), exclude=["v_rows"])


def test_parts_are_made_narrower_like_matrices_of_their_own(compress: Compress) -> None:
    model = tiny.build("phi3")
    splitting.unfold(model, True)
    found = dimensions.verified(model, dimensions.find(model, models.targets(model)))
    assert [tuple(copies for _, copies in mlp.writers) for mlp in found if mlp.kind == "mlp"] == [(1, 1)] * 2
    small, result = compress(tiny.build("phi3"), split="fused", form="width")
    assert any(row.form == "narrow" for row in result.modules)
    assert logits(small, tiny.tokens()).isfinite().all()


@pytest.mark.parametrize("name", ["gpt2", "falcon-new-decoder", "phi3", "mixtral"])
def test_a_plan_has_the_shapes_of_the_run(name: str) -> None:
    recipe, model = Recipe(keep=0.6, of="linears", method="svd", split="fused"), tiny.build(name)
    classes = [type(module) for module in model.modules()]
    plan = planning.plan(recipe, model, torch.float32)
    assert [type(module) for module in model.modules()] == classes
    assert not plan.exact
    assert splitting.unfold(model, True) == []
    planned = [(choice.target.name, choice.target.shape) for choice in plan.choices]
    assert sorted(planned) == sorted((target.name, target.shape) for target in models.targets(model))


def test_split_is_none_or_fused() -> None:
    with pytest.raises(ConfigError, match="split 'qkv': legal are none, fused"):
        Recipe(keep=0.5, split="qkv")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="stock has the matrices .* leave out split 'fused'"):
        Recipe(keep=0.5, split="fused", stock=True)
