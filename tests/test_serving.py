"""Layers of serving engines: tensors by name, parts by form, the same function as in the folder."""

import itertools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eckart.declaration import KINDS, declare
from eckart.errors import StoreError
from eckart.factors import FactoredLinear, LowRank, NarrowLinear, PartialLinear, build
from eckart.serving import shards
from eckart.serving.fused import FusedLinear, Product, plain

INPUTS = 12
FORMS = ("dense", "factored", "pivoted", "full", "narrow", "rows")
QKV = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}
Part = tuple[nn.Module, dict[str, Any], nn.Linear]


def made(form: str, outputs: int, bias: bool, generator: torch.Generator) -> Part:
    """Return a random module of the form, its declaration, and the dense nn.Linear of the same function."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    linear = nn.Linear(INPUTS, outputs, bias).to(torch.float64)
    linear.weight = nn.Parameter(draw(outputs, INPUTS))
    if bias:
        linear.bias = nn.Parameter(draw(outputs))
    rank = min(outputs, INPUTS) if form == "full" else max(1, outputs // 2 - 1)
    module: Any = linear
    if form in ("factored", "pivoted", "full"):
        low_rank = LowRank(draw(outputs, rank), draw(rank, INPUTS))
        module = build(low_rank, "factored" if form == "factored" else "pivoted", linear.bias)
        linear.weight = nn.Parameter(low_rank.dense())
    if form == "narrow":
        module = NarrowLinear.slice(linear, torch.arange(outputs // 2), None)
    if form == "rows":
        module = PartialLinear.slice(linear, "rows", torch.arange(1, outputs, 2))
    if form in ("narrow", "rows"):
        weight, own = module.padded()
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", None if own is None else nn.Parameter(own))
    spec = {} if form == "dense" else declare(nn.ModuleDict({"part": module})).modules["part"]
    return module, spec, linear


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def layer_of(parts: Mapping[str, Part]) -> shards.Layer:
    names = shards.names("a.qkv", QKV)
    sizes = [parts[name][2].out_features for name in names]
    return shards.layer(
        "a.qkv", names, sizes, INPUTS, {name: part[1] for name, part in parts.items() if part[1]}
    )


@settings(max_examples=40, deadline=None)
@given(
    forms=st.tuples(*[st.sampled_from(FORMS)] * 3),
    outputs=st.tuples(*[st.integers(4, 20)] * 3),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_fused_layer_computes_what_its_parts_compute(
    forms: tuple[str, ...], outputs: tuple[int, ...], bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = shards.names("a.qkv", QKV)
    parts = {
        name: made(form, m, bias, generator) for name, form, m in zip(names, forms, outputs, strict=True)
    }
    fused = FusedLinear(layer_of(parts), [state(parts[name][0]) for name in names], {})
    inputs = torch.randn(5, INPUTS, generator=generator, dtype=torch.float64)
    wanted = torch.cat([parts[name][2](inputs) for name in names], dim=-1)
    got = fused(inputs) + (0.0 if fused.bias is None else fused.bias)
    assert (fused.bias is not None) == bias
    error = (got - wanted).abs().max()
    assert error <= 1e4 * torch.finfo(torch.float64).eps * wanted.abs().max()
    # What is compared tells parts apart: in another order they are not close.
    other = torch.cat([parts[name][2](inputs) for name in reversed(names)], dim=-1)
    assert not torch.allclose(got, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_tensors_of_a_shard_are_those_of_its_module(form: str, bias: bool) -> None:
    module, spec, _ = made(form, 16, bias, torch.Generator().manual_seed(0))
    shard = shards.Shard("part", 16, INPUTS, spec)
    expected = shard.tensors() | (shard.biases() if bias else {})
    assert expected == {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shard.check(expected)


def test_a_matrix_may_read_some_of_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(INPUTS, 6).to(torch.float64)
    inputs = torch.randn(3, INPUTS, generator=generator, dtype=torch.float64)
    places = torch.tensor([1, 4, 5, 9])
    for module in (
        PartialLinear.slice(linear, "columns", places),
        NarrowLinear.slice(linear, None, torch.arange(7)),
    ):
        spec = declare(nn.ModuleDict({"o": module})).modules["o"]
        fused = FusedLinear(shards.layer("o", ["o"], [6], INPUTS, {"o": spec}), [state(module)], {})
        weight, bias = module.padded()
        assert torch.allclose(fused(inputs) + fused.bias, nn.functional.linear(inputs, weight, bias))
        assert not torch.allclose(fused(inputs) + fused.bias, linear(inputs))
        if isinstance(module, NarrowLinear):  # what is before it may be as narrow
            assert torch.allclose(fused(inputs[:, :7]), fused(inputs))


def narrow_mlp(width: int, reader: int) -> dict[str, dict[str, Any]]:
    writer = {"kind": "narrow", "shape": [width, INPUTS], "copies": 1}
    return {
        "a.gate": writer,
        "a.up": writer,
        "a.down": {"kind": "narrow", "shape": [INPUTS, reader], "copies": 1},
    }


def test_what_an_mlp_has_lost_is_not_put_back_and_what_heads_have_lost_is() -> None:
    declared = narrow_mlp(5, 5)
    mlp = shards.layer("a.gate_up", ["a.gate", "a.up"], [8, 8], INPUTS, declared)
    assert (mlp.narrowed, mlp.outputs) == (True, 10)
    heads = shards.layer("a.qkv", ["a.gate", "a.up", "a.v"], [8, 8, 8], INPUTS, declared)
    assert (heads.narrowed, heads.outputs) == (False, 24)
    for other in (narrow_mlp(5, 4), {**narrow_mlp(5, 5), "a.other": declared["a.gate"]}):
        assert not shards.layer("a.gate_up", ["a.gate", "a.up"], [8, 8], INPUTS, other).narrowed


def test_a_matrix_of_several_copies_is_padded_copy_by_copy() -> None:
    linear = nn.Linear(INPUTS, 8).to(torch.float64)
    module = NarrowLinear.slice(linear, torch.tensor([0, 1, 2, 4, 5, 6]), None, copies=2)
    spec = declare(nn.ModuleDict({"x": module})).modules["x"]
    fused = FusedLinear(shards.layer("x", ["x"], [4, 4], INPUTS, {"x": spec}), [state(module)], {})
    weight, bias = module.padded()
    inputs = torch.randn(3, INPUTS, dtype=torch.float64)
    assert torch.allclose(fused(inputs) + fused.bias, nn.functional.linear(inputs, weight, bias))


def test_a_shared_right_factor_is_one_product_in_both_layers() -> None:
    first, second = FactoredLinear(INPUTS, 8, 3), FactoredLinear(INPUTS, 8, 3)
    second.down = first.down
    declared = declare(nn.ModuleDict({"a": first, "b": second})).modules
    basis = Product(first.down.weight.detach())
    built = []
    for name, module in (("a", first), ("b", second)):
        tensors = state(module)
        if name == "b":
            del tensors["down.weight"]  # is in the files under the first name alone
        layer = shards.layer(name, [name], [8], INPUTS, declared)
        built.append(FusedLinear(layer, [tensors], {"a": basis}))
        inputs = torch.randn(3, INPUTS)
        assert torch.allclose(built[-1](inputs), module(inputs), atol=1e-6)
    assert built[0].firsts[0] is built[1].firsts[0] is basis


def test_parts_that_read_the_same_are_one_product() -> None:
    generator = torch.Generator().manual_seed(0)
    names = shards.names("a.qkv", QKV)
    forms = ("dense", "factored", "pivoted")
    parts = {name: made(form, 8, False, generator) for name, form in zip(names, forms, strict=True)}
    seen = []

    def run(product: Product, inputs: Tensor) -> Tensor:
        seen.append(product)
        return plain(product, inputs)

    fused = FusedLinear(layer_of(parts), [state(parts[name][0]) for name in names], {}, run)
    fused(torch.randn(2, INPUTS, dtype=torch.float64))
    assert [product.rows for product in seen] == [8 + 3 + 3, 8, 5]
    assert set(seen) == set(fused.products())


def test_a_fused_layer_compiles_without_a_break() -> None:
    generator = torch.Generator().manual_seed(0)
    names = shards.names("a.qkv", QKV)
    forms = ("narrow", "factored", "pivoted")
    parts = {name: made(form, 8, True, generator) for name, form in zip(names, forms, strict=True)}
    fused = FusedLinear(layer_of(parts), [state(parts[name][0]) for name in names], {})
    inputs = torch.randn(4, INPUTS, dtype=torch.float64)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(inputs), fused(inputs))


def test_names_and_places_of_parts() -> None:
    assert shards.names("m.0.a.qkv", QKV) == ["m.0.a.q", "m.0.a.k", "m.0.a.v"]
    assert shards.names("m.0.a.o", QKV) == ["m.0.a.o"]
    assert shards.names("o", QKV) == ["o"]
    assert [shards.place(which, 3, "x") for which in ("q", "k", "v", 0, 2)] == [0, 1, 2, 0, 2]
    assert shards.place(None, 1, "x") == 0


@pytest.mark.parametrize("which", [None, 3, -1, "w", (0, 1)])
def test_a_place_that_is_none_is_refused(which: object) -> None:
    with pytest.raises(StoreError, match=r"a tensor for part .* of 3: `eckart export"):
        shards.place(which, 3, "x")


@pytest.mark.parametrize(
    ("modules", "storage", "unfolded", "message"),
    [
        ({"a.q": {"kind": "corrected", "rank": 2}}, {}, {}, "a.q is corrected: only factored, pivoted"),
        ({"e": {"kind": "embedding", "rank": 2}}, {}, {}, "e is embedding: only"),
        ({}, {"a.q": "int8"}, {}, "a.q is stored in int8: storages"),
        ({}, {"head": {"table": "e"}}, {}, "head is tied to a stored table"),
        ({}, {}, {"a.qkv": {"kind": "split"}}, "a.qkv is unfolded to split: .*in one piece"),
    ],
)
def test_what_does_not_run_is_refused(
    modules: dict[str, Any], storage: dict[str, Any], unfolded: dict[str, Any], message: str
) -> None:
    shards.refuse({"a.o": {"kind": "pivoted", "rank": 2}}, {}, {})
    with pytest.raises(StoreError, match=message + ".*eckart export DIR --to dense"):
        shards.refuse(modules, storage, unfolded)


def test_layers_that_the_engine_does_not_have_are_refused() -> None:
    shards.refuse_unclaimed(["a"], ["a", "b"])
    with pytest.raises(
        StoreError, match=r"c \(2 in all\) is low-rank .*no layer of vLLM's model has that name"
    ):
        shards.refuse_unclaimed(["a", "d", "c"], ["a"])
    shards.refuse_foreign("m.experts", ["m.expertsize"])
    shards.refuse_foreign("", ["m"])
    with pytest.raises(
        StoreError, match=r"m\.experts\.0\.up \(1 in all\) is inside of m\.experts, which vLLM"
    ):
        shards.refuse_foreign("m.experts", ["m.experts.0.up", "x"])


def test_tensor_parallelism_is_refused() -> None:
    shards.refuse_parallel("a", 1)
    with pytest.raises(
        StoreError, match="a is low-rank and tensor parallelism of 2 .*--tensor-parallel-size 1"
    ):
        shards.refuse_parallel("a", 2)


def test_parts_of_another_model_are_refused() -> None:
    spec = {"kind": "factored", "rank": 3}
    with pytest.raises(StoreError, match="is made of 2 parts in this engine, the folder has a.q, a.k, a.v"):
        shards.layer("a.qkv", ["a.q", "a.k", "a.v"], [4, 4], INPUTS, {"a.q": spec})
    with pytest.raises(StoreError, match="a.q is declared as .*has 2 outputs and 12 inputs in this engine"):
        shards.layer("a.q", ["a.q"], [2], INPUTS, {"a.q": spec})
    reads = {"kind": "narrow", "shape": [4, 6], "copies": 1}
    with pytest.raises(StoreError, match="a.qkv reads one input, its parts a.q, a.k, a.v several"):
        shards.layer("a.qkv", ["a.q", "a.k", "a.v"], [4, 4, 4], INPUTS, {"a.q": reads})


def test_tensors_that_do_not_fit_are_refused() -> None:
    shard = shards.Shard("a.q", 8, INPUTS, {"kind": "factored", "rank": 3})
    good = shard.tensors()
    with pytest.raises(StoreError, match=r"a\.q, factored: tensors \['up.weight'\] are missing and \['rest"):
        shard.check({"down.weight": good["down.weight"], "rest.weight": (1, 1)})
    with pytest.raises(
        StoreError, match=r"a\.q\.up\.weight has shape \(8, 4\), its config.json says \(8, 3\)"
    ):
        shard.check(good | {"up.weight": (8, 4)})


def test_eckart_needs_no_vllm_and_names_its_plugin() -> None:
    code = "import sys, eckart; sys.exit(any(name.split('.')[0] == 'vllm' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    root = Path(__file__).parent.parent
    text = (root / "pyproject.toml").read_text()
    target = 'eckart = "eckart.serving.vllm_plugin:register"'
    assert f'[project.entry-points."vllm.general_plugins"]\n{target}\n' in text
    assert "def register() -> None:" in (root / "src/eckart/serving/vllm_plugin.py").read_text()


def test_every_form_of_folders_is_run_or_refused() -> None:
    for kind in itertools.chain(KINDS, ("shared",)):
        if kind not in shards.RUNS:
            with pytest.raises(StoreError, match=f"x is {kind}: only"):
                shards.refuse({"x": {"kind": kind, "rank": 1}}, {}, {})
    assert set(shards.RUNS) - {"narrow", "partial"} <= set(KINDS)
