"""Stored modules: the maps of their dequantised matrices, whatever runs them, casts them or loads them."""

import copy
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from eckart.errors import NotFinite, StoreError
from eckart.factors import NarrowLinear
from eckart.quant import kernels, storage
from eckart.quant.storage import STORAGES
from eckart.quant.stored import StoredEmbedding, StoredHead, StoredLinear, empty

NAMES = tuple(STORAGES)
WEIGHT_ONLY = tuple(name for name in NAMES if name != "llm.int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
shapes = st.tuples(st.integers(1, 150), st.integers(1, 140))
seeds = st.integers(0, 99)


def linear(shape: tuple[int, int], bias: bool = True) -> nn.Linear:
    torch.manual_seed(shape[0] * 1000 + shape[1])
    return nn.Linear(shape[1], shape[0], bias)


def stored(plain: nn.Linear, name: str) -> StoredLinear:
    chosen = storage.get(name)
    grid = chosen.grid(plain.weight)
    return StoredLinear.of(plain, chosen, grid.codes(plain.weight.detach()), grid)


def table(count: int, dim: int, name: str, **options: Any) -> StoredEmbedding:
    torch.manual_seed(1)
    plain = nn.Embedding(count, dim, **options)
    chosen = storage.get(name)
    grid = chosen.grid(plain.weight)
    return StoredEmbedding.of(plain, chosen, grid.codes(plain.weight.detach()), grid)


def plain_of(module: StoredLinear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Return the nn.Linear of the dequantised matrix, rounded to `dtype`."""
    made = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    made.weight = nn.Parameter(module.dequantised(), requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().clone())
    return made.to(dtype)


def inputs(module: Any, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*sizes, module.in_features, generator=generator).to(dtype)


def close(found: Tensor, expected: Tensor, terms: int) -> bool:
    """Tell whether two sums of `terms` products, computed in the same dtype, are equal up to rounding."""
    bound = 4 * torch.finfo(expected.dtype).eps * (terms**0.5 + 4) * expected.abs().max().double()
    return bool(((found.double() - expected.double()).abs() <= bound).all())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 64 * 100)


@pytest.fixture
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "_bitsandbytes", lambda: None)
    kernels._warn.cache_clear()
    yield
    kernels._warn.cache_clear()


class TestLinear:
    @pytest.mark.parametrize("name", WEIGHT_ONLY)
    @settings(deadline=None, max_examples=15)
    @given(shape=shapes, tokens=st.integers(1, 12))
    def test_it_is_the_map_of_its_dequantised_matrix(
        self, name: str, shape: tuple[int, int], tokens: int
    ) -> None:
        module = stored(linear(shape), name)
        for dtype in DTYPES:
            x = inputs(module, tokens, dtype=dtype)
            own, other = module(x), plain_of(module, dtype)(x)
            assert own.dtype == dtype
            assert close(own, other, shape[1])

    @pytest.mark.parametrize("name", WEIGHT_ONLY)
    def test_parts_make_the_whole(self, name: str, small_parts: None) -> None:
        for shape in ((300, 100), (257, 64), (129, 101)):
            module = stored(linear(shape), name)
            x = inputs(module, 2, 5)
            assert module(x).shape == (2, 5, shape[0])
            assert close(module(x), plain_of(module)(x), shape[1])

    @pytest.mark.parametrize("name", NAMES)
    def test_gradients_are_those_of_the_dequantised_matrix(self, name: str) -> None:
        module = stored(linear((70, 96)), name)
        other = plain_of(module)
        x = inputs(module, 3, 4).requires_grad_()
        out = torch.randn(3, 4, 70, generator=torch.Generator().manual_seed(1))
        assert module.bias is not None
        own = torch.autograd.grad(module(x), (x, module.bias), out)
        expected = torch.autograd.grad(other(x), (x, other.bias), out)
        assert all(close(a, b, 70) for a, b in zip(own, expected))

    @pytest.mark.parametrize("name", NAMES)
    def test_nothing_dequantised_waits_for_the_gradient(self, name: str) -> None:
        module, kept = stored(linear((64, 64), bias=False), name), []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(inputs(module, 2).requires_grad_())
        assert not kept

    def test_values_are_the_same_by_bitsandbytes_and_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("nf4", "nf4-dq", "fp4", "fp4-dq"):
            module = stored(linear((40, 192)), name)
            parts = storage.get(name), module.tensors(), (40, 192)
            fast = [kernels.dequantised(*parts, dtype) for dtype in DTYPES]
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "_has_kernels", lambda device: False)
                slow = [kernels.dequantised(*parts, dtype) for dtype in DTYPES]
            assert all(torch.equal(a, b) for a, b in zip(fast, slow))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("shape", [(6, 64), (5, 37), (130, 128), (1, 1)])
    def test_kernels_decode_what_the_reference_does(self, name: str, shape: tuple[int, int]) -> None:
        module = stored(linear(shape), name)
        assert torch.equal(module.dequantised(), storage.get(name).decode(module.tensors(), shape))

    @pytest.mark.parametrize("name", NAMES)
    def test_autocast(self, name: str) -> None:
        module = stored(linear((40, 64)), name)
        x = inputs(module, 5).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, module(x.to(torch.bfloat16)))
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.dtype == torch.float32

    @pytest.mark.parametrize("tokens", [1, 8, 9])
    def test_int8_of_few_tokens_in_bfloat16(self, tokens: int) -> None:
        module = stored(linear((70, 192)), "int8")
        x = inputs(module, tokens, dtype=torch.bfloat16)
        assert close(module(x), plain_of(module)(x.to(torch.float32)).to(torch.bfloat16), 192)

    def test_codes_do_not_overflow_float16(self) -> None:
        plain = nn.Linear(4096, 2, bias=False)
        nn.init.constant_(plain.weight, 0.01)
        module = stored(plain, "int8")
        out = module(torch.full((1, 4096), 1.0, dtype=torch.float16))
        assert bool(((out - 40.96).abs() < 0.1).all())

    @pytest.mark.parametrize("name", WEIGHT_ONLY)
    def test_compiled_whole(self, name: str) -> None:
        module = stored(linear((40, 64)), name)
        x = inputs(module, 2)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert close(compiled(x), module(x), 64)
        torch._dynamo.reset()

    def test_llm_int8_compiled_has_the_same_gradient(self) -> None:
        module = stored(linear((40, 64)), "llm.int8")
        x = inputs(module, 2).requires_grad_()
        compiled = torch.compile(module, backend="eager")
        own, other = compiled(x), module(x)
        assert torch.equal(own, other)
        assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (own, other)))
        torch._dynamo.reset()

    def test_weights_that_are_not_finite_are_refused(self) -> None:
        plain = linear((4, 64))
        with torch.no_grad():
            plain.weight[2, 2] = math.inf
        with pytest.raises(NotFinite, match="has 1 NaN or infinite entries"):
            stored(plain, "nf4")

    def test_codes_of_another_matrix_are_refused(self) -> None:
        plain, chosen = linear((4, 64)), storage.get("nf4")
        grid = chosen.grid(plain.weight[:3])
        with pytest.raises(StoreError, match="nf4 stores a 4 x 64 matrix as"):
            StoredLinear.of(plain, chosen, grid.codes(plain.weight.detach()[:3]), grid)


class TestMixed:
    """LLM.int8(): inputs in int8 as well, but for columns with outliers."""

    @settings(deadline=None, max_examples=20)
    @given(sizes=st.tuples(st.integers(1, 6), st.integers(2, 80)), outliers=st.integers(0, 3), seed=seeds)
    def test_it_is_bitsandbytes_product(self, sizes: tuple[int, int], outliers: int, seed: int) -> None:
        tokens, columns = sizes
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, columns, generator=generator).clamp(-4, 4)
        x[0, :outliers] = 9.0
        weight = torch.randn(5, columns, generator=generator)
        plain = nn.Linear(columns, 5, bias=False)
        plain.weight = nn.Parameter(weight)
        found = stored(plain, "llm.int8")(x)
        codes, stats, wide = bnb.int8_vectorwise_quant(x.clone(), threshold=6.0)
        own, own_stats, _ = bnb.int8_vectorwise_quant(weight.clone())
        expected = (codes.double() @ own.double().T) * stats[:, None] * own_stats / 127**2
        if wide is not None:
            expected = expected + x[:, wide].double() @ (own[:, wide].double() * own_stats[:, None] / 127).T
        assert close(found, expected.float(), columns)

    def test_outliers_stay_exact(self) -> None:
        module = stored(linear((16, 64), bias=False), "llm.int8")
        x = 10 + inputs(module, 3).abs()
        assert close(module(x), plain_of(module)(x), 64)
        small = inputs(module, 3).clamp(-4, 4)
        assert not close(module(small), plain_of(module)(small), 64)

    def test_inputs_err_by_half_a_step(self) -> None:
        module = stored(linear((16, 64), bias=False), "llm.int8")
        x = inputs(module, 3).clamp(-4, 4)
        step = x.abs().amax(1, keepdim=True) / 127
        bound = step / 2 * module.dequantised().abs().sum(1)
        assert bool(((module(x) - plain_of(module)(x)).abs() <= bound * 1.001).all())

    @settings(deadline=None, max_examples=20)
    @given(t=st.integers(1, 5), m=st.integers(1, 20), n=st.integers(1, 2500), seed=seeds)
    def test_integer_products_are_exact(self, t: int, m: int, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        left = torch.randint(-127, 128, (t, n), dtype=torch.int8, generator=generator)
        right = torch.randint(-127, 128, (m, n), dtype=torch.int8, generator=generator)
        left[0], right[0] = 127, 127
        expected = (left.to(torch.int64) @ right.to(torch.int64).T).to(torch.int32)
        assert torch.equal(kernels.exact_product(left, right), expected)
        assert torch.equal(kernels.integer_product(left, right), expected)


class TestFallback:
    def test_one_warning_names_the_cost(self, no_bitsandbytes: None) -> None:
        module = stored(linear((8, 64)), "nf4")
        x = inputs(module, 2)
        with pytest.warns(
            kernels.ReferenceWarning, match="about 1.5 times as long, a token at a time"
        ) as seen:
            out = module(x)
        assert "pip install 'eckart[tune]'" in str(seen[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(module(x), out)
        assert close(out, plain_of(module)(inputs(module, 2)), 64)

    def test_no_warning_where_nothing_is_missed(self, no_bitsandbytes: None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name in ("int8", "llm.int8", "int4", "int3", "int2"):
                module = stored(linear((8, 64)), name)
                module(inputs(module, 2))


class TestState:
    @pytest.mark.parametrize("name", NAMES)
    def test_casts_leave_the_stored_tensors_alone(self, name: str) -> None:
        module = stored(linear((9, 70)), name)
        before = {key: tensor.clone() for key, tensor in module.tensors().items()}
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            module.to(dtype)
            assert module.bias is not None
            assert module.bias.dtype == dtype
            assert all(torch.equal(tensor, before[key]) for key, tensor in module.tensors().items())
            assert module.tensors().keys() == before.keys()

    @pytest.mark.parametrize("name", NAMES)
    def test_saved_and_loaded_into_an_empty_one(self, name: str) -> None:
        module = stored(linear((9, 70)), name)
        state = load(save(module.state_dict()))
        assert set(state) == {*module.tensors(), "bias"}
        with torch.device("meta"):
            fresh = StoredLinear(70, 9, storage.get(name), bias=True)
        assert all(tensor.is_meta for tensor in fresh.state_dict().values())
        fresh.load_state_dict(state, assign=True)
        fresh.check("fresh")
        other = StoredLinear(70, 9, storage.get(name), bias=True)
        other.load_state_dict(state)
        x = inputs(module, 4)
        assert torch.equal(fresh(x), module(x))
        assert torch.equal(other(x), module(x))

    def test_a_copy_is_its_own(self) -> None:
        module = stored(linear((9, 70)), "nf4-dq")
        twin = copy.deepcopy(module)
        x = inputs(module, 4)
        expected = module(x)
        module.tensors()["codes"].zero_()
        assert torch.equal(twin(x), expected)
        assert not torch.equal(module(x), expected)

    def test_check_names_what_is_damaged(self) -> None:
        module = stored(linear((9, 70)), "int4")
        module.check("layers.0.up")
        module.tensors()["scale"].view(torch.float16)[0, 0] = math.nan
        message = "scales of layers.0.up (int4, 9 x 70) are NaN or infinite: the file is damaged"
        with pytest.raises(StoreError, match=re.escape(message)):
            module.check("layers.0.up")
        module.register_buffer("scale", torch.zeros(9, 2))
        with pytest.raises(StoreError, match=r"layers.0.up: int4 stores .* got .*scale \(9, 2\) float32"):
            module.check("layers.0.up")

    def test_of_keeps_bias_mode_and_the_history_of_a_narrow_one(self) -> None:
        plain = linear((6, 64)).eval()
        plain.bias.requires_grad_(False)
        module = stored(plain, "int8")
        assert module.bias is not None
        assert torch.equal(module.bias, plain.bias)
        assert module.bias is not plain.bias
        assert not module.bias.requires_grad
        assert not module.training
        assert module.narrow is None
        narrow = NarrowLinear(64, 6, False, whole=(8, 64), copies=2)
        nn.init.normal_(narrow.weight)
        assert stored(narrow, "int8").narrow == ((8, 64), 2)

    def test_empty_ones_take_device_and_dtype(self) -> None:
        with torch.device("meta"):
            made = empty(linear((6, 64)).to(torch.bfloat16), storage.get("nf4"))
            rows = empty(nn.Embedding(5, 64, padding_idx=2, dtype=torch.bfloat16), storage.get("nf4"))
        assert isinstance(made, StoredLinear)
        assert made.bias is not None
        assert made.bias.dtype == torch.bfloat16
        assert made.tensors()["codes"].is_meta
        assert isinstance(rows, StoredEmbedding)
        assert rows.padding_idx == 2

    def test_print(self) -> None:
        module = stored(linear((6, 64)), "nf4-dq")
        assert repr(module) == "StoredLinear(64 -> 6, nf4-dq, bias=True)"
        rows = table(10, 64, "int8")
        assert repr(rows) == "StoredEmbedding(10 x 64, int8)"
        assert repr(StoredHead(rows)) == "StoredHead(64 -> 10, int8, tied)"


class TestTables:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("dim", [64, 37])
    def test_rows_are_those_of_the_table(self, name: str, dim: int) -> None:
        module = table(50, dim, name)
        ids = torch.randint(0, 50, (2, 7))
        expected = nn.functional.embedding(ids, module.dequantised())
        assert torch.equal(module(ids), expected)
        assert torch.equal(module.to(torch.bfloat16)(ids), expected.to(torch.bfloat16))
        assert module(ids[:, :0]).shape == (2, 0, dim)

    def test_rows_have_the_dtype_of_the_table_that_was_stored(self) -> None:
        assert table(5, 64, "int8", dtype=torch.float16)(torch.tensor([1])).dtype == torch.float16
        with torch.device("meta"):
            fresh = empty(nn.Embedding(5, 64, dtype=torch.bfloat16), storage.get("int8"))
        fresh.to_empty(device="cpu")
        assert fresh(torch.tensor([1])).dtype == torch.bfloat16

    @pytest.mark.parametrize("ids", [[-1, 2], [0, 50]])
    def test_tokens_outside_of_the_table(self, ids: list[int]) -> None:
        with pytest.raises(IndexError, match="the table has 50 rows"):
            table(50, 64, "nf4")(torch.tensor(ids))

    @pytest.mark.parametrize("name", WEIGHT_ONLY)
    def test_the_head_is_the_transposed_table(self, name: str) -> None:
        rows, bias = table(50, 64, name), torch.randn(50)
        head = StoredHead(rows, bias)
        x = inputs(head, 3)
        assert close(head(x), nn.functional.linear(x, rows.dequantised(), bias), 64)
        assert torch.equal(head.dequantised(), rows.dequantised())

    def test_table_and_head_stay_one_when_copied_and_loaded(self) -> None:
        rows = table(50, 64, "nf4")
        model = nn.ModuleDict({"rows": rows, "head": StoredHead(rows)})
        assert set(model.state_dict()) == {"rows.codes", "rows.absmax"}
        twin: Any = copy.deepcopy(model)
        assert twin["head"].table is twin["rows"]
        assert twin["rows"] is not rows
        twin["rows"].tensors()["codes"].zero_()
        x = torch.ones(1, 64)
        assert not torch.equal(twin["head"](x), model["head"](x))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin["head"](x), model["head"](x))

    def test_gradients_reach_what_comes_before_the_head(self) -> None:
        rows = table(50, 64, "nf4-dq")
        x = torch.ones(1, 64, requires_grad=True)
        (gradient,) = torch.autograd.grad(StoredHead(rows)(x).sum(), x)
        assert close(gradient[0], rows.dequantised().sum(0), 50)


def test_int8_in_bfloat16_where_a_mapped_file_puts_it() -> None:
    """PyTorch's kernel for int8 ends the process where rows do not start at a multiple of 16 bytes."""
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    chosen = storage.get("int8")
    grid = chosen.grid(weight)
    module = StoredLinear.of(linear_of(weight), chosen, grid.codes(weight), grid).to(torch.bfloat16)
    inputs = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = module(inputs)
    room = torch.zeros(weight.numel() + 64, dtype=torch.int8)
    start = (1 - room.data_ptr()) % 64
    codes = room[start : start + weight.numel()].view(24, 128)
    codes.copy_(module.tensors()["codes"])
    module._buffers["codes"] = codes
    assert torch.allclose(module(inputs), expected, rtol=0.02, atol=0.02)
    module.align()
    assert module.tensors()["codes"].data_ptr() % 64 == 0
    assert torch.equal(module(inputs), expected)


def linear_of(weight: torch.Tensor) -> torch.nn.Linear:
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = torch.nn.Parameter(weight)
    return made
