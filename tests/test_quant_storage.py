"""Storages: bit for bit bitsandbytes', within their bounds, as large as they say."""

import json
import math
import re
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from eckart.errors import ConfigError, NotFinite, StoreError
from eckart.quant import formats, storage
from eckart.quant.grid import Grid
from eckart.quant.storage import STORAGES

EPS = torch.finfo(torch.float32).eps
NAMES = tuple(STORAGES)
AFFINE = ("int6", "int5", "int4", "int3", "int2")
CODEBOOKS = ("nf4", "nf4-dq", "fp4", "fp4-dq")
shapes = st.tuples(st.integers(1, 40), st.integers(1, 150))
seeds = st.integers(0, 2**31)


def normal(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return a normal matrix whose rows have very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(shape[0], 1).uniform_(-4, 2, generator=generator)
    return torch.randn(shape, generator=generator) * sizes


def with_zeros(weight: Tensor, seed: int) -> Tensor:
    """Set some of the blocks of 64 of the flattened matrix, perhaps the last, to zero."""
    flat = weight.clone().view(-1)
    for start in range(0, flat.numel(), 64):
        if (seed + start // 64) % 3 == 0:
            flat[start : start + 64] = 0
    return flat.view(weight.shape)


def rounded_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    grid = storage.get(name).grid(weight)
    return storage.get(name).pack(grid.codes(weight), grid)


def reference(name: str, weight: Tensor) -> tuple[Tensor, Any]:
    kind, double = name.removesuffix("-dq"), name.endswith("-dq")
    found: tuple[Tensor, Any] = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=double
    )
    return found


class TestBitsandbytes:
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    def test_codebooks_are_equal(self, kind: str) -> None:
        assert torch.equal(storage.get(kind).levels, bnb.get_4bit_type(kind, device="cpu"))

    def test_dynamic_maps_are_equal(self) -> None:
        assert torch.equal(formats.dynamic_map(), bnb.create_dynamic_map())

    @pytest.mark.parametrize("name", CODEBOOKS)
    @settings(deadline=None, max_examples=40)
    @given(shape=shapes, seed=seeds, zeros=st.booleans())
    def test_codes_scales_and_values_are_equal(
        self, name: str, shape: tuple[int, int], seed: int, zeros: bool
    ) -> None:
        weight = normal(shape, seed)
        weight = with_zeros(weight, seed) if zeros else weight
        chosen = storage.get(name)
        codes = formats.block_codes(weight, formats.block_absmax(weight), chosen.levels)
        tensors = chosen.pack(codes, chosen.grid(weight))
        packed, state = reference(name, weight)
        assert torch.equal(tensors["codes"], packed.view(-1))
        if name.endswith("-dq"):
            assert torch.equal(tensors["absmax"], state.absmax)
            assert torch.equal(tensors["nest_absmax"].view(torch.float32), state.state2.absmax)
            assert torch.equal(tensors["nest_offset"].view(torch.float32)[0], state.offset)
        else:
            assert torch.equal(tensors["absmax"].view(torch.float32), state.absmax)
        values = chosen.decode(tensors, shape)
        # Where rows are no whole blocks its kernel reads other blocks than it wrote, but not in one long row.
        state.shape = torch.Size([1, weight.numel()])
        assert torch.equal(values.view(-1), bnb.dequantize_4bit(packed, state).reshape(-1))
        if zeros:
            assert not values.view(-1)[weight.view(-1) == 0][:64].any()

    @settings(deadline=None, max_examples=20)
    @given(count=st.integers(1, 3000), seed=seeds)
    def test_double_quantisation_of_any_scales_is_equal(self, count: int, seed: int) -> None:
        absmax = torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 4
        codes, scales, offset = formats.nest(absmax)
        packed, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
        assert torch.equal(codes, packed)
        assert torch.equal(scales, state.absmax)
        spread = scales.repeat_interleave(256)[:count]
        found = formats.unnest(codes, spread, offset)
        assert torch.equal(found, bnb.dequantize_blockwise(packed, state) + absmax.mean())
        assert bool(((found - absmax).abs() <= 0.0071 * spread + 4 * EPS).all())

    @settings(deadline=None, max_examples=30)
    @given(shape=shapes, seed=seeds)
    def test_int8_rows_are_equal(self, shape: tuple[int, int], seed: int) -> None:
        weight = normal(shape, seed)
        codes, absmax = formats.row_codes(weight)
        packed, stats, _ = bnb.int8_vectorwise_quant(weight.clone())
        assert torch.equal(codes, packed)
        assert torch.equal(absmax, stats)
        chosen = storage.get("int8")
        grid = chosen.grid(weight)
        assert torch.equal(grid.parts["absmax"].view(torch.float32), stats)
        shifted = (codes.to(torch.int16) + 127).to(torch.uint8)
        values = chosen.decode(chosen.pack(shifted, grid), shape)
        theirs = bnb.int8_vectorwise_dequant(packed, stats)
        assert bool(((values - theirs).abs() <= 2 * EPS * stats[:, None]).all())

    @pytest.mark.parametrize("name", CODEBOOKS)
    def test_rounding_to_the_grid_is_never_worse(self, name: str) -> None:
        weight = normal((30, 128), 5)
        chosen = storage.get(name)
        own = chosen.grid(weight).rounded(weight)
        theirs = bnb.dequantize_4bit(*reference(name, weight))
        bound = (weight - theirs).abs() + 4 * EPS * weight.abs()
        assert bool(((weight - own).abs() <= bound).all())


class TestErrors:
    @pytest.mark.parametrize("name", NAMES)
    @settings(deadline=None, max_examples=20)
    @given(shape=shapes, seed=seeds)
    def test_rounding_errs_by_half_a_gap_at_most(self, name: str, shape: tuple[int, int], seed: int) -> None:
        weight = normal(shape, seed)
        grid = storage.get(name).grid(weight)
        ordered = grid.levels.sort().values
        half = float((ordered[1:] - ordered[:-1]).max()) / 2
        bound = half * grid.scale.abs()
        if name.endswith("-dq"):
            # What double quantisation has taken off the absmax, at most.
            spread = grid.parts["nest_absmax"].view(torch.float32).max()
            bound = bound + 0.0071 * spread
        assert bool(((grid.rounded(weight) - weight).abs() <= bound + 4 * EPS * weight.abs().max()).all())

    @pytest.mark.parametrize("name", NAMES)
    def test_noise_of_a_normal_weight(self, name: str) -> None:
        weight = 0.02 * torch.randn(512, 1024, generator=torch.Generator().manual_seed(11))
        error = weight - storage.get(name).grid(weight).rounded(weight)
        share = float(error.square().mean() / weight.square().mean())
        assert share == pytest.approx(storage.get(name).noise, rel=0.02)

    def test_noise_falls_with_bits(self) -> None:
        order = ["int8", "int6", "int5", "int4", "int3", "int2"]
        noises = [storage.get(name).noise for name in order]
        assert noises == sorted(noises)
        assert storage.get("nf4").noise < storage.get("fp4").noise

    @settings(deadline=None, max_examples=30)
    @given(shape=shapes, seed=seeds, shift=st.floats(-3, 3))
    def test_affine_rows_err_by_half_a_step(self, shape: tuple[int, int], seed: int, shift: float) -> None:
        weight = normal(shape, seed)
        weight = weight + shift * weight.abs().amax(1, keepdim=True)
        codes, step, zero = formats.affine_rows(weight)
        values = (codes.to(torch.float32) - zero) * step
        ends = torch.cat([weight, torch.zeros(len(weight), 1)], 1)
        assert torch.allclose(step[:, 0], (ends.amax(1) - ends.amin(1)) / 255)
        assert bool(((values - weight).abs() <= step / 2 + 300 * EPS * step).all())
        assert bool(((zero >= 0) & (zero <= 255) & (zero == zero.round())).all())

    def test_affine_rows_store_zeros_exactly(self) -> None:
        weight = torch.tensor([[0.0, 1.0, 7.3], [0.0, -2.0, 1.1], [0.0, 0.0, 0.0]])
        codes, step, zero = formats.affine_rows(weight)
        assert torch.equal(((codes.to(torch.float32) - zero) * step)[weight == 0], torch.zeros(5))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("shape", [(3, 128), (4, 70), (1, 5)])
    def test_zeros_are_exact(self, name: str, shape: tuple[int, int]) -> None:
        tensors = rounded_tensors(name, torch.zeros(shape))
        assert not storage.get(name).decode(tensors, shape).any()
        weight = normal((4, 192), 3)
        weight.view(-1)[64:128] = 0
        assert not storage.get(name).decode(rounded_tensors(name, weight), (4, 192)).view(-1)[64:128].any()

    @pytest.mark.parametrize("name", NAMES)
    def test_scales_that_know_the_columns_err_less_in_their_weights(self, name: str) -> None:
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(48, 200, generator=generator)
        importance = torch.rand(200, generator=generator) ** 8
        chosen = storage.get(name)

        def cost(grid: Grid) -> float:
            return float(((weight - grid.rounded(weight)).square() * importance).sum())

        assert cost(chosen.grid(weight, importance)) < 0.95 * cost(chosen.grid(weight))

    def test_the_best_of_the_ranges_is_taken(self) -> None:
        weight, importance = normal((6, 128), 1), torch.rand(128)
        chosen = storage.get("nf4")
        best = chosen.grid(weight, importance)
        whole = formats.block_absmax(weight)
        for shrink in formats.SHRINKS:
            scale = chosen.scales.spread(whole * shrink, (6, 128))
            other = Grid(chosen.levels, scale).rounded(weight)
            costs = [
                ((weight - values).square() * importance).view(-1, 64).sum(1)
                for values in (best.rounded(weight), other)
            ]
            assert bool((costs[0] <= costs[1] * (1 + 1e-5)).all())

    def test_unimportant_columns_do_not_stretch_the_range(self) -> None:
        weight = torch.full((1, 64), 0.1)
        weight[0, 5] = 0.2
        importance = torch.ones(64)
        importance[5] = 0
        grid = storage.get("nf4").grid(weight, importance)
        assert float(grid.scale[0, 0]) == pytest.approx(0.1)

    @settings(deadline=None, max_examples=30)
    @given(values=st.lists(st.floats(-(2**-20), 2**-20, width=32), min_size=1, max_size=80))
    @pytest.mark.parametrize("name", AFFINE)
    def test_ranges_below_float16_are_covered(self, name: str, values: list[float]) -> None:
        weight = torch.tensor([values])
        grid = storage.get(name).grid(weight)
        tiny = torch.finfo(torch.float32).tiny
        assert bool(((grid.rounded(weight) - weight).abs() <= grid.scale / 2 * (1 + 1e-5) + tiny).all())


class TestTensors:
    @pytest.mark.parametrize("name", NAMES)
    @settings(deadline=None, max_examples=20)
    @given(shape=shapes, seed=seeds)
    def test_packing_is_undone_exactly(self, name: str, shape: tuple[int, int], seed: int) -> None:
        weight, chosen = normal(shape, seed), storage.get(name)
        grid = chosen.grid(weight)
        codes = grid.codes(weight)
        tensors = chosen.pack(codes, grid)
        found, same = chosen.unpack(tensors, shape)
        assert torch.equal(found, codes)
        assert torch.equal(same.scale, grid.scale)
        assert torch.equal(chosen.decode(tensors, shape), grid.rounded(weight))

    @pytest.mark.parametrize("name", NAMES)
    @settings(deadline=None, max_examples=20)
    @given(shape=shapes)
    def test_the_layout_is_what_is_packed_and_holds_integers(self, name: str, shape: tuple[int, int]) -> None:
        chosen, tensors = storage.get(name), rounded_tensors(name, normal(shape))
        chosen.check(tensors, shape)
        assert not any(tensor.is_floating_point() for tensor in tensors.values())
        assert chosen.bytes(shape) == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("shape", [(64, 128), (7, 33)])
    def test_bytes_are_those_of_the_file(self, name: str, shape: tuple[int, int], tmp_path: Path) -> None:
        file = tmp_path / "w.safetensors"
        save_file(rounded_tensors(name, normal(shape)), file)
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        assert "codes" in json.loads(content[8:header])
        assert len(content) - header == storage.get(name).bytes(shape)

    @pytest.mark.parametrize(
        ("name", "bits"),
        [
            ("int8", 8.0),
            ("llm.int8", 8.0),
            ("nf4", 4.5),
            ("fp4", 4.5),
            ("nf4-dq", 4 + 8 / 64 + 32 / (64 * 256)),
            ("fp4-dq", 4.126953125),
            ("int6", 6.375),
            ("int5", 5.375),
            ("int4", 4.375),
            ("int3", 3.375),
            ("int2", 2.375),
        ],
    )
    def test_bits_per_parameter(self, name: str, bits: float) -> None:
        chosen, shape = storage.get(name), (2**12, 2**14)
        assert chosen.bits() == bits
        assert 8 * chosen.bytes(shape) / math.prod(shape) == pytest.approx(bits, abs=0.002)

    def test_bytes_of_double_quantisation_to_the_last(self) -> None:
        # 576 x 577 / 2 of codes, a byte for each block, float32 for each 256 of them, and the mean.
        blocks = -(-576 * 577 // 64)
        expected = 576 * 577 // 2 + blocks + 4 * -(-blocks // 256) + 4
        assert storage.get("nf4-dq").bytes((576, 577)) == expected

    @settings(deadline=None, max_examples=40)
    @given(width=st.sampled_from([2, 3, 4]), count=st.integers(1, 100), seed=seeds)
    def test_streams_of_bits(self, width: int, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2**width, (count,), generator=generator, dtype=torch.uint8)
        stream = formats.pack_bits(codes, width)
        bits = "".join(f"{int(code):0{width}b}" for code in codes)
        assert "".join(f"{int(byte):08b}" for byte in stream).startswith(bits)
        assert stream.numel() == formats.packed_bytes(count, width)
        assert torch.equal(formats.unpack_bits(stream, width, count), codes)
        places = torch.randint(0, count, (3, 5), generator=generator)
        assert torch.equal(formats.gather_bits(stream, width, places), codes[places].to(torch.int64))

    @pytest.mark.parametrize("name", NAMES)
    @settings(deadline=None, max_examples=15)
    @given(shape=shapes, seed=seeds)
    def test_rows_are_those_of_the_matrix(self, name: str, shape: tuple[int, int], seed: int) -> None:
        chosen, tensors = storage.get(name), rounded_tensors(name, normal(shape, seed))
        ids = torch.randint(0, shape[0], (2, 3), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(chosen.rows(tensors, shape, ids), chosen.decode(tensors, shape)[ids])


class TestRefusals:
    def test_an_unknown_name(self) -> None:
        with pytest.raises(ConfigError, match=re.escape("storage 'int9': legal are int8, llm.int8, nf4")):
            storage.get("int9")

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_weights_that_are_not_finite(self, name: str, bad: float) -> None:
        weight = torch.ones(4, 64)
        weight[1, 3] = bad
        with pytest.raises(NotFinite, match="weight .4, 64. has 1 NaN or infinite entries"):
            storage.get(name).grid(weight)

    def test_columns_that_do_not_fit(self) -> None:
        chosen = storage.get("nf4")
        with pytest.raises(ConfigError, match=re.escape("weights of columns of shape (3,): give (4,)")):
            chosen.grid(torch.ones(2, 4), torch.ones(3))
        with pytest.raises(ConfigError, match="a weight of columns is -1: legal are 0 and more"):
            chosen.grid(torch.ones(2, 4), -torch.ones(4))
        with pytest.raises(NotFinite, match="weights of columns are NaN"):
            chosen.grid(torch.ones(2, 4), torch.full((4,), math.nan))

    def test_a_range_beyond_float16(self) -> None:
        with pytest.raises(NotFinite, match=r"a group of 64 has a step of 6.67e\+04, float16 ends at 65504"):
            storage.get("int4").grid(torch.full((1, 64), 1e6))

    def test_tensors_of_another_storage(self) -> None:
        tensors = rounded_tensors("nf4", torch.ones(2, 64))
        with pytest.raises(StoreError, match=r"nf4-dq stores a 2 x 64 matrix as codes \(64,\) uint8, absmax"):
            storage.get("nf4-dq").decode(tensors, (2, 64))
        with pytest.raises(StoreError, match="the declared storage and the tensors disagree"):
            storage.get("nf4").decode(tensors, (2, 65))
        with pytest.raises(StoreError, match="got codes .64,. float32"):
            storage.get("nf4").check(tensors | {"codes": tensors["codes"].float()}, (2, 64))

    @pytest.mark.parametrize("name", NAMES)
    def test_scales_that_are_not_finite_are_seen(self, name: str) -> None:
        tensors = rounded_tensors(name, torch.ones(2, 64))
        assert storage.get(name).finite(tensors)
        for part, tensor in tensors.items():
            if tensor.dtype in (torch.int32, torch.int16):
                broken = tensor.clone()
                wide = torch.float32 if tensor.dtype == torch.int32 else torch.float16
                broken.view(wide)[..., 0] = math.nan
                assert not storage.get(name).finite(tensors | {part: broken})


class TestNormality:
    def test_a_normal_matrix_of_blocks_of_any_size(self) -> None:
        generator = torch.Generator().manual_seed(4)
        weight = torch.randn(4096, 64, generator=generator)
        found = formats.normality(weight * 10 ** torch.randn(4096, 1, generator=generator))
        assert abs(found.kurtosis) < 5 * (24 / weight.numel()) ** 0.5
        assert found.distance < 2 / weight.numel() ** 0.5

    def test_others_are_told_from_it(self) -> None:
        torch.manual_seed(0)
        heavy = formats.normality(torch.distributions.Laplace(0.0, 1.0).sample((1024, 64)))
        light = formats.normality(torch.rand(1024, 64) - 0.5)
        assert heavy.kurtosis > 2
        assert light.kurtosis < -1
        assert min(heavy.distance, light.distance) > 0.09

    def test_scale_does_not_matter(self) -> None:
        weight = normal((20, 100))
        assert formats.normality(8 * weight) == formats.normality(weight)

    def test_nothing_to_measure(self) -> None:
        for weight in (torch.zeros(64, 64), torch.ones(3, 5)):
            with pytest.raises(ConfigError, match="has no block of 64 entries that is not zero"):
                formats.normality(weight)
