"""A fused model is the same function, and the way back gives every parameter its place."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eckart
from eckart import channels, common_pivots, fusing, joint, models, refine
from eckart.errors import ConfigError, ModelError, NotPositiveDefinite
from eckart.factors import (
    FORMS,
    FactoredLinear,
    Form,
    LowRank,
    PartialLinear,
    PivotedLinear,
    build,
    pivot,
    rearranged,
)
from eckart.lean import TALL, LeanJoint, LeanPivoted
from eckart.lean import lean as lean_of
from eckart.quant import storage
from eckart.quant.stored import StoredLinear
from eckart.stages import silent

from . import tiny, wards
from .conftest import Compress, logits, reload

FAST = settings(deadline=None, max_examples=25, derandomize=True)
IDS = tiny.tokens()


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_rank(rows: int, columns: int, rank: int, seed: int = 0) -> LowRank:
    return LowRank(gaussian(rows, rank, seed=seed), gaussian(rank, columns, seed=seed + 1))


def close(found: Tensor, expected: Tensor, scale: float = 200.0) -> bool:
    eps = torch.finfo(expected.dtype).eps
    return bool((found - expected).norm() <= scale * eps * max(expected.shape) * expected.norm())


# selecting


@given(shape=st.lists(st.integers(0, 4), max_size=3), width=st.integers(1, 7), seed=st.integers(0, 99))
@FAST
def test_rearranged_is_indexing_and_so_are_its_gradients(shape: list[int], width: int, seed: int) -> None:
    places = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[: max(1, width - 1)]
    shape = [*shape, 2048] if seed % 2 else shape  # little and much are selected in different ways
    for kind in (torch.int32, torch.int64):
        own, other = (gaussian(*shape, width, seed=seed).requires_grad_() for _ in range(2))
        found, expected = rearranged(own, places.to(kind)), other[..., places]
        assert torch.equal(found, expected)
        weights = gaussian(*expected.shape, seed=seed + 1)
        torch.autograd.backward((found * weights).sum())
        torch.autograd.backward((expected * weights).sum())
        assert torch.equal(own.grad, other.grad)  # type: ignore[arg-type]
        with torch.no_grad():
            assert torch.equal(rearranged(own, places.to(kind)), expected)


# one module


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [False, True])
@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), shape=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 999),
)  # fmt: skip
@FAST
def test_a_lean_module_computes_its_map(
    form: Form, biased: bool, rows: int, columns: int, shape: list[int], seed: int
) -> None:
    rank = 1 + seed % min(rows, columns)
    bias = gaussian(rows, seed=seed + 2) if biased else None
    module = build(low_rank(rows, columns, rank, seed), form, bias).float()
    lean = lean_of(module)
    inputs = gaussian(*shape, columns, seed=seed + 3, dtype=torch.float32)
    expected = module(inputs).detach()
    with torch.no_grad():
        found = lean(inputs)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * (1 + expected.norm())
    with_gradient = lean(inputs.requires_grad_())
    assert torch.equal(with_gradient.detach(), expected)
    assert with_gradient.requires_grad
    plain = lean.plain()
    assert type(plain) is type(module)
    assert all(own is other for own, other in zip(plain.parameters(), module.parameters(), strict=True))


def test_what_listens_to_a_part_hears_it() -> None:
    module = build(low_rank(9, 7, 3), "pivoted").float()
    assert isinstance(module, PivotedLinear)
    lean, inputs, heard = LeanPivoted.of(module), gaussian(2, 7, dtype=torch.float32), []
    assert lean.rest is not None
    for part in (lean.pivot, lean.rest):
        for register in (part.register_forward_hook, part.register_forward_pre_hook):
            handle = register(lambda own, *_: heard.append(own))
            with torch.no_grad():
                lean(inputs)
            handle.remove()
    with torch.no_grad():
        lean(inputs)
    assert heard == [lean.pivot, lean.pivot, lean.rest, lean.rest]
    both: list[Any] = [lean.rest.register_full_backward_hook, lean.rest.register_full_backward_pre_hook]
    for register_back in both:
        handle = register_back(lambda own, *_: heard.append(own))
        torch.autograd.backward(lean(inputs.requires_grad_()).sum())
        handle.remove()
    assert heard[4:] == [lean.rest, lean.rest]
    vars(lean.rest)["forward"] = lambda found: found.new_zeros(*found.shape[:-1], 6)
    assert lean.joined(inputs)[:, 3:].norm() == 0
    assert torch.equal(lean(inputs), rearranged(lean.joined(inputs), lean.order))


def test_autocast_and_half_precision_are_those_of_the_plain_module() -> None:
    for form in FORMS:
        module = build(low_rank(9, 7, 3), form, gaussian(9)).float()
        lean = lean_of(module)
        inputs = gaussian(2, 5, 7, dtype=torch.float32)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert lean(inputs).dtype == torch.bfloat16
            assert torch.equal(lean(inputs), module(inputs))
        with torch.no_grad():
            assert torch.equal(lean.bfloat16()(inputs.bfloat16()), module.bfloat16()(inputs.bfloat16()))


def test_another_order_that_is_loaded_is_kept_to() -> None:
    one, other = (build(low_rank(9, 7, 3, seed), "pivoted").float() for seed in (0, 5))
    assert isinstance(one, PivotedLinear)
    with torch.no_grad():
        one.order.copy_(torch.arange(9))
    lean = LeanPivoted.of(one)
    assert lean.straight
    lean.load_state_dict(other.state_dict())
    assert not lean.straight
    inputs = gaussian(2, 7, dtype=torch.float32)
    with torch.no_grad():
        assert close(lean(inputs), other(inputs))
        lean.straight = True
        assert not close(lean(inputs), other(inputs))


@pytest.mark.parametrize("form", FORMS)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 999))
@FAST
def test_a_tall_matrix_is_kept_by_columns_in_memory_and_nowhere_else(
    form: Form, rows: int, columns: int, seed: int
) -> None:
    rank = 1 + seed % min(rows, columns)
    module: Any = build(low_rank(rows, columns, rank, seed), form).float()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    lean: Any = lean_of(module)

    def kept(by_columns: bool) -> None:
        for part in lean.children():
            height, width = part.weight.shape
            tall = by_columns and height >= 1.5 * width
            assert part.weight.T.is_contiguous() if tall else part.weight.is_contiguous()

    kept(True)
    for name, weight in copy.deepcopy(lean).state_dict().items():
        assert torch.equal(weight, before[name])
    lean.bfloat16()
    kept(False)  # several times slower by columns
    lean.float()
    kept(True)
    lean.plain()
    kept(False)


@pytest.mark.parametrize("form", FORMS)
@given(
    heights=st.lists(st.integers(1, 12), min_size=2, max_size=3),
    columns=st.integers(2, 9),
    seed=st.integers(0, 999),
)
@FAST
def test_lean_maps_that_go_on_from_one_product_compute_what_they_did(
    form: Form, heights: list[int], columns: int, seed: int
) -> None:
    rank = 1 + seed % min(sum(heights), columns)
    stack = low_rank(sum(heights), columns, rank, seed)
    plain = [module.float() for module in joint.build(stack, [(height, None) for height in heights], form)]
    before = [{name: weight.clone() for name, weight in module.state_dict().items()} for module in plain]
    inputs = gaussian(2, 3, rank, seed=seed, dtype=torch.float32)
    expected = [module(inputs).detach() for module in plain]
    fast: list[Any] = [lean_of(module) for module in plain]
    assert all(type(module) is LeanJoint for module in fast)
    assert all(module.down is plain[0].down for module in fast)
    for module, output, state in zip(fast, expected, before, strict=True):
        if module.up is not None:
            height, width = module.up.weight.shape
            tall = height >= TALL * width
            assert module.up.weight.T.is_contiguous() if tall else module.up.weight.is_contiguous()
        with torch.no_grad():
            assert close(module(inputs), output, 2000)
            with torch.autocast("cpu", torch.bfloat16):
                assert module(inputs).shape == output.shape
        again = module.plain()
        assert type(again) is joint.JointLinear
        assert again.down is plain[0].down
        assert all(torch.equal(weight, state[name]) for name, weight in again.state_dict().items())
        assert all(weight.is_contiguous() for weight in again.state_dict().values())


# pivots chosen together


@given(rows=st.integers(2, 14), seed=st.integers(0, 999))
@FAST
def test_joint_pivots_give_the_maps_that_separate_ones_do(rows: int, seed: int) -> None:
    ranks = [1 + (seed * factor) % rows for factor in (3, 5)]
    maps = [low_rank(rows, rows + 2, rank, seed + place) for place, rank in enumerate(ranks)]
    separate = [pivot(one) for one in maps]
    order = common_pivots.joint_order([one.left for one in maps], bound=1e6)
    assert order is not None
    assert torch.equal(order.sort().values, torch.arange(rows))
    for one, own in zip(maps, separate, strict=True):
        together = common_pivots.repivoted(own, order)
        rank = one.left.shape[1]
        assert torch.equal(together.skeleton.pivots, order[:rank])
        assert (together.dense() - own.dense()).norm() <= 1e-9 * own.dense().norm()
        size = float(together.skeleton.multipliers.abs().max()) if rank < rows else 0.0
        if size > 1.1:  # the bound is one of what really comes out
            assert common_pivots.joint_order([part.left for part in maps], bound=0.99 * size) is None


def test_joint_pivots_stay_small_where_rows_are_alike_to_none() -> None:
    lefts = [gaussian(120, 40, seed=1), gaussian(120, 30, seed=2)]
    order = common_pivots.joint_order(lefts)
    assert order is not None
    for left in lefts:
        skeleton = common_pivots.repivoted(pivot(LowRank(left, gaussian(left.shape[1], 5))), order).skeleton
        assert skeleton.multipliers.abs().max() <= common_pivots.BOUND


def test_maps_whose_pivots_exclude_one_another_have_no_joint_ones() -> None:
    upper, lower = torch.zeros(8, 3), torch.zeros(8, 3)
    upper[:3], lower[5:] = torch.eye(3), torch.eye(3)
    assert common_pivots.joint_order([upper, lower]) is None
    modules = [build(LowRank(left, gaussian(3, 4)), "pivoted") for left in (upper.double(), lower.double())]
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    assert all(isinstance(module, PivotedLinear) for module in modules)
    assert not common_pivots.align(modules)  # type: ignore[arg-type]
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("lefts", "bound", "error", "message"),
    [
        ([(4, 2)], 1.0, ConfigError, r"bound=1.0 \(must exceed 1\)"),
        ([(4, 2), (5, 2)], 4.0, ConfigError, r"shapes \[\(4, 2\), \(5, 2\)\] \(as many rows each"),
        ([(2, 4)], 4.0, ConfigError, "none wide"),
        ([(4, 0)], 4.0, ConfigError, "at least one row and column"),
    ],
)
def test_what_has_no_order_is_refused(
    lefts: list[tuple[int, int]], bound: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        common_pivots.joint_order([gaussian(*shape) for shape in lefts], bound)


def test_dependent_columns_are_refused() -> None:
    with pytest.raises(NotPositiveDefinite, match="the 5 x 2 left factor has dependent columns: lower"):
        common_pivots.joint_order([gaussian(5, 1).expand(5, 2)])


# channels of a whole module


class Gated(nn.Module):
    """An MLP of gate and up, or of up alone; `twist` makes channels that are not free."""

    def __init__(self, gated: bool = True, twist: str = "") -> None:
        super().__init__()
        self.gate = nn.Linear(6, 16) if gated else None
        self.up, self.down, self.twist = nn.Linear(6, 16), nn.Linear(16, 6), twist
        if twist == "scaled":
            self.scale = nn.Parameter(torch.linspace(1, 2, 16))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(inputs))
        hidden = hidden if self.gate is None else hidden * self.gate(inputs)
        if self.twist == "scaled":
            hidden = hidden * self.scale
        if self.twist == "mixed":
            hidden = hidden.cumsum(-1)
        return self.down(hidden)  # type: ignore[no-any-return]


def pivoted(linear: nn.Linear, rank: int, seed: int = 0) -> PivotedLinear:
    bias = None if linear.bias is None else linear.bias.detach().double()
    made = build(low_rank(linear.out_features, linear.in_features, rank, seed), "pivoted", bias)
    assert isinstance(made, PivotedLinear)
    return made.float()


def factored(linear: nn.Linear, rank: int, seed: int = 0) -> FactoredLinear:
    made = build(
        low_rank(linear.out_features, linear.in_features, rank, seed),
        "factored",
        gaussian(16)[: linear.out_features],
    )
    assert isinstance(made, FactoredLinear)
    return made.float()


def stored(linear: nn.Linear, name: str = "int8") -> StoredLinear:
    chosen = storage.get(name)
    grid = chosen.grid(linear.weight)
    return StoredLinear.of(linear, chosen, grid.codes(linear.weight.detach()), grid)


READERS: dict[str, Any] = {
    "dense": lambda linear: linear,
    "pivoted": lambda linear: pivoted(linear, 3, 7),
    "factored": lambda linear: factored(linear, 3, 7),
    "partial": lambda linear: PartialLinear.slice(linear, "columns", torch.arange(0, 16, 3)),
    "int8": stored,
}
OTHERS: dict[str, Any] = {
    "none": None,
    "dense": lambda linear: linear,
    "factored": lambda linear: factored(linear, 4, 9),
    "partial": lambda linear: PartialLinear.slice(linear, "rows", torch.arange(1, 16, 2)),
    "pivoted": lambda linear: pivoted(linear, 4, 9),
    "int8": stored,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("other", OTHERS)
def test_channels_move_through_every_kind_of_map(reader: str, other: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": Gated(OTHERS[other] is not None)})
    mlp: Any = model["mlp"]
    mlp.up, mlp.down = pivoted(mlp.up, 4), READERS[reader](mlp.down)
    if mlp.gate is not None:
        mlp.gate = OTHERS[other](mlp.gate)
    before, inputs = copy.deepcopy(mlp), gaussian(2, 5, 6, dtype=torch.float32)
    expected = mlp(inputs)
    fused = eckart.fuse(model)["mlp"]
    assert close(fused(inputs), expected)
    with torch.no_grad():
        assert close(fused(inputs), expected)
    found = fusing.gathers(model)
    straight = [name for name in ("mlp.gate", "mlp.up") if name in found.folded]
    assert len(straight) == 1  # of two with orders of their own one is put in order
    state = before.state_dict()
    moved = {name for name, tensor in mlp.state_dict().items() if not torch.equal(tensor, state[name])}
    assert {name.partition(".")[0] for name in moved} >= {straight[0].removeprefix("mlp."), "down"}
    eckart.unfuse(model)
    assert {name: type(part) for name, part in mlp.named_modules()} == {
        name: type(part) for name, part in before.named_modules()
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in mlp.state_dict().items())


@pytest.mark.parametrize("ranks", [(4, 4), (3, 6), (6, 3)])
def test_with_joint_pivots_nothing_is_put_in_order(ranks: tuple[int, int]) -> None:
    torch.manual_seed(0)
    mlp: Any = Gated()
    mlp.gate, mlp.up = pivoted(mlp.gate, ranks[0], 1), pivoted(mlp.up, ranks[1], 2)
    model, inputs = nn.ModuleDict({"mlp": mlp}), gaussian(2, 5, 6, dtype=torch.float32)
    expected = mlp(inputs).detach()
    assert len(fusing.gathers(eckart.fuse(model)).left) == 1
    eckart.fuse(model, joint_pivots=True, bound=100.0)
    assert fusing.gathers(model) == fusing.Gathers(("mlp.gate", "mlp.up"), ())
    with torch.no_grad():
        assert close(model["mlp"](inputs), expected, 2000)
    dense = {name: mlp.get_submodule(name).map().dense() for name in ("gate", "up")}
    eckart.unfuse(model)
    for name, found in dense.items():  # rows are back in place
        assert not close(mlp.get_submodule(name).map().dense(), found)
    with torch.no_grad():
        assert close(mlp(inputs), expected, 2000)
    assert fusing.gathers(eckart.fuse(model)).left == ()  # the order that both have stays one


@pytest.mark.parametrize("twist", ["scaled", "mixed"])
def test_channels_that_something_else_knows_stay(twist: str) -> None:
    torch.manual_seed(0)
    mlp: Any = Gated(twist=twist)
    mlp.up = pivoted(mlp.up, 4)
    model, inputs = nn.ModuleDict({"mlp": mlp}), gaussian(2, 5, 6, dtype=torch.float32)
    expected, state = mlp(inputs).detach(), copy.deepcopy(mlp.state_dict())
    eckart.fuse(model)
    assert fusing.gathers(model) == fusing.Gathers((), ("mlp.up",))
    assert all(torch.equal(tensor, state[name]) for name, tensor in mlp.state_dict().items())
    with torch.no_grad():
        assert close(mlp(inputs), expected)
    channels.move(mlp, channels.Channels(("gate", "up"), "down", 16), torch.randperm(16))
    assert not close(mlp(inputs), expected)


def test_channels_that_share_scales_stay() -> None:
    for name in ("nf4", "int4"):
        mlp: Any = Gated()
        mlp.up, mlp.down = pivoted(mlp.up, 4), stored(mlp.down, name)
        assert channels.find(mlp) == {}


def test_weights_that_two_maps_share_stay() -> None:
    first, second = Gated(), Gated()
    first.up = pivoted(first.up, 4)  # type: ignore[assignment]
    second.down.weight = first.down.weight
    model = nn.ModuleDict({"first": first, "second": second})
    assert "first" not in channels.find(model)
    eckart.fuse(model)
    assert fusing.gathers(model).left == ("first.up",)


@pytest.mark.parametrize(
    ("model", "message"),
    [("folder", "got a str: give a model, as eckart.load"), (nn.Linear(2, 2, device="meta"), "device meta")],
)
def test_what_cannot_be_fused_is_refused(model: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        eckart.fuse(model)


# whole models


@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "opt", "gpt-neox", "phi3", "gemma2"])
def test_a_fused_model_is_the_same_function(name: str, compress: Compress) -> None:
    model, _ = compress(tiny.build(name), form="pivoted", allocation="uniform")
    expected, state = logits(model, IDS), {k: v.clone() for k, v in model.state_dict().items()}
    eckart.fuse(model)
    assert fusing.is_fused(model)
    assert close(logits(model, IDS), expected, 2000)
    found = fusing.gathers(model)
    if name != "phi3":  # its gate and up are one matrix
        assert len(found.folded) == model.config.num_hidden_layers
    eckart.unfuse(model)
    assert not fusing.is_fused(model)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_a_fused_model_with_a_common_right_factor_is_the_same_function(
    form: Form, compress: Compress, tmp_path: Path
) -> None:
    # A copy of it has products in common as well, and its folder the same bytes.
    choice = {"keep": 0.4, "of": "linears", "share_inputs": True, "dtype": "float32"}
    model, _ = compress(tiny.build("llama"), form=form, **choice)
    shared = models.bases(model)
    assert shared
    expected = logits(model, IDS)
    eckart.save(model, None, tmp_path / "before")
    fast = copy.deepcopy(eckart.fuse(model))
    assert any(isinstance(module, LeanJoint) for module in fast.modules())
    assert models.bases(fast) == shared
    assert close(logits(fast, IDS), expected, 2000)
    eckart.save(fast, None, tmp_path / "after")
    files = [tmp_path / place / "model.safetensors" for place in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert close(logits(eckart.densify(fast), IDS), expected, 2000)
    eckart.unfuse(model)
    assert not fusing.is_fused(model)
    assert torch.equal(logits(model, IDS), expected)


def test_saving_a_fused_model_writes_what_it_was(
    tmp_path: Path, compress: Compress, tokenizer: Any, llama: Any
) -> None:
    model, _ = compress(llama, form="pivoted", allocation="uniform")
    eckart.save(model, tokenizer, tmp_path / "before")
    fast = eckart.load(tmp_path / "before", fast=True)
    assert fusing.gathers(fast).folded
    eckart.save(fast, tokenizer, tmp_path / "after")
    assert fusing.gathers(fast).folded
    files = [tmp_path / place / "model.safetensors" for place in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # By transformers' own way the folder holds channels in the order that they have now: the same function.
    fast.save_pretrained(tmp_path / "own")
    expected = logits(model, IDS)
    assert close(logits(reload(tmp_path / "own"), IDS), expected, 2000)
    dense = eckart.densify(fast)
    assert close(logits(dense, IDS), expected, 2000)
    plain = eckart.densify(model)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[key]), key


def test_a_fused_model_heals_like_one_that_is_not() -> None:
    dense = tiny.build("llama")
    plain = wards.cut(dense, 8, "pivoted")
    fused = eckart.fuse(copy.deepcopy(plain))
    before = logits(plain, IDS)
    for student in (plain, fused):
        refine.heal(student, copy.deepcopy(dense), wards.lessons(), wards.settings(), watch=silent)
    assert fusing.gathers(fused).folded
    after = logits(plain, IDS)
    assert (after - before).norm() > 0.01 * before.norm()
    assert (logits(fused, IDS) - after).norm() < 0.01 * (after - before).norm()
    eckart.unfuse(fused)
    assert (logits(fused, IDS) - after).norm() < 0.01 * (after - before).norm()


def _names(parts: Sequence[str]) -> set[str]:
    return {part.rpartition(".")[2] for part in parts}


def test_gates_fold_and_what_reads_the_residual_stream_does_not(compress: Compress, llama: Any) -> None:
    model, _ = compress(llama, form="pivoted", allocation="uniform")
    found = fusing.gathers(eckart.fuse(model, joint_pivots=True, bound=1000.0))
    assert _names(found.folded) == {"gate_proj", "up_proj"}
    assert _names(found.left) == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
