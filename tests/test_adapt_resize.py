"""Resizing: the Eckart-Young optimum of every update, without its dense product, within a budget."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eckart
from eckart import ConfigError, ModelError, RankError
from eckart.adapt import resize, store
from eckart.adapt.store import Adapter, Factors, Nf4
from eckart.factors import LowRank

from . import adapters, tiny
from .adapters import VARIANTS, differ
from .conftest import logits

pytestmark = adapters.QUIET
sides = st.integers(1, 9)


def factors(m: int, n: int, rank: int, scale: float = 1.5, **more: Any) -> Factors:
    made = torch.Generator().manual_seed(100 * m + 10 * n + rank)
    left, right = (torch.randn(shape, generator=made) for shape in ((m, rank), (rank, n)))
    return Factors(left, right, scale, **more)


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


@given(sides, sides, st.integers(1, 12))
def test_the_thin_svd_is_that_of_the_dense_product(m: int, n: int, rank: int) -> None:
    """Also where the factors have more terms than the product can have."""
    product = factors(m, n, rank).product()
    found = resize.thin_svd(product)
    count = min(m, n, rank)
    assert found.values.shape == (count,)
    assert torch.allclose(found.values, torch.linalg.svdvals(product.dense())[:count], atol=1e-10)
    assert torch.allclose(found.left * found.values @ found.right, product.dense(), atol=1e-10)
    assert torch.allclose(found.left.T @ found.left, torch.eye(count, dtype=torch.float64), atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(sides, sides, st.integers(1, 9), st.integers(1, 9))
def test_a_lower_rank_is_the_eckart_young_optimum(m: int, n: int, rank: int, wanted: int) -> None:
    one = factors(m, n, rank)
    made, done = resize.resize(Adapter({"a": one}), rank=wanted)
    values = torch.linalg.svdvals(one.delta())
    lost = float(values[wanted:].norm())
    assert norm(made.delta("a") - one.delta()) == pytest.approx(lost, abs=1e-5 * norm(one.delta()))
    assert done.rows[0].after == made.factors["a"].rank == min(wanted, rank, m, n)
    assert done.error == pytest.approx(lost / norm(one.delta()), abs=1e-6)
    assert done.error == pytest.approx(done.rows[0].error)
    assert done.rows[0].energy == pytest.approx(1 - done.error**2)
    assert made.factors["a"].scale == 1


def test_the_dense_product_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: LowRank) -> None:
        raise AssertionError("formed")

    monkeypatch.setattr(LowRank, "dense", forbidden)
    one = factors(20_000, 30_000, 2)
    made, done = resize.resize(Adapter({"a": one}), rank=1)
    assert made.factors["a"].rank == 1
    assert 0 < done.error < 1


@settings(deadline=None, max_examples=40)
@given(st.floats(0.05, 1.0))
def test_energy_is_held_by_the_fewest_terms(fraction: float) -> None:
    adapter = Adapter({"a": factors(9, 7, 5), "b": factors(6, 8, 4)})
    _, done = resize.resize(adapter, energy=fraction)
    for row in done.rows:
        squares = torch.linalg.svdvals(adapter.delta(row.name)).square()
        share = squares.cumsum(0) / squares.sum()
        assert row.energy >= fraction - 1e-12
        assert row.after == 1 or float(share[row.after - 2]) < fraction


@settings(deadline=None, max_examples=40)
@given(st.integers(14, 160))
def test_a_budget_of_parameters_is_kept_with_the_least_error(limit: int) -> None:
    """What is dropped is worth less, per parameter, than what is kept: no exchange helps."""
    adapter = Adapter({"a": factors(9, 7, 5), "b": factors(6, 8, 4)}, {"norm.weight": torch.ones(3)})
    if limit < 17:
        with pytest.raises(RankError, match="holds no term of any matrix: the least is 14"):
            resize.resize(adapter, params=limit)
        return
    made, done = resize.resize(adapter, params=limit)
    assert made.parameters == done.parameters_after <= limit
    assert made.extras.keys() == {"norm.weight"}
    ranks = {row.name: row.after for row in done.rows}
    spectra = {name: torch.linalg.svdvals(adapter.delta(name)).square().tolist() for name in ranks}
    cost = {"a": 16, "b": 14}
    # Nothing that still fits is left out.
    room = limit - made.parameters
    assert all(
        cost[name] > room or ranks[name] == adapter.factors[name].rank or spectra[name][ranks[name]] < 1e-9
        for name in ranks
    )


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_size_is_that_of_the_file(tmp_path: Path, share: float) -> None:
    variant = VARIANTS["plain"]
    source = adapters.save(adapters.wrap(adapters.base(variant), variant.config()), tmp_path / "in")
    before = (source / store.WEIGHTS).stat().st_size
    wanted = int(share * before)
    _, done = eckart.resize(source, out=tmp_path / "out", size=wanted)
    size = (tmp_path / "out" / store.WEIGHTS).stat().st_size
    assert size == done.file_bytes
    # Room is left for the header that all modules would need, and less than one more term.
    assert wanted - (before - done.bytes_before) - 4 * 96 < size <= wanted
    assert done.rule == f"a file of at most {wanted:,} bytes"


@pytest.mark.parametrize(
    "name", ["plain", "rslora", "patterns", "lora bias", "embeddings", "whole head", "adalora"]
)
def test_full_rank_keeps_the_function(name: str, tmp_path: Path) -> None:
    variant, tokens = VARIANTS[name], tiny.tokens()
    model = adapters.base(variant)
    made = adapters.wrap(model, variant.config())
    adapters.save(made, tmp_path / "in")
    _, done = eckart.resize(tmp_path / "in", out=tmp_path / "out", rank=64)
    assert differ(logits(adapters.load(model, tmp_path / "out"), tokens), logits(made, tokens)) < 1e-5
    assert done.error < 1e-6
    assert "adapter resized: rank at most 64" in str(done)
    assert {row.before for row in done.rows} >= {row.after for row in done.rows}


def test_a_higher_rank_adds_nothing() -> None:
    adapter = Adapter({"a": factors(6, 5, 2)})
    made, _ = resize.resize(adapter, rank=9)
    assert made.factors["a"].rank == 2


def test_a_bias_keeps_a_term_to_hang_on_and_its_size() -> None:
    small = Factors(1e-6 * torch.ones(6, 2), torch.ones(2, 5), 3.0, bias=torch.ones(6))
    adapter = Adapter({"a": small, "b": factors(6, 5, 3)})
    made, _ = resize.resize(adapter, params=6 + 11 + 11)
    assert {name: one.rank for name, one in made.factors.items()} == {"a": 1, "b": 1}
    bias = made.factors["a"].bias
    assert bias is not None
    assert torch.equal(bias * made.factors["a"].scale, torch.full((6,), 3.0))
    with pytest.raises(RankError, match="a budget of 17 parameters: 17 are tensors that stay as they are"):
        resize.resize(adapter, params=17)


def test_updates_that_are_zero_are_left_out() -> None:
    zero = Factors(torch.zeros(6, 2), torch.ones(2, 5))
    made, done = resize.resize(Adapter({"a": zero, "b": factors(6, 5, 2)}), energy=1.0)
    assert list(made.factors) == ["b"]
    assert [row.after for row in done.rows] == [0, 2]
    assert done.rows[0].error == 0


def test_the_dtype_and_the_base_stay() -> None:
    one = factors(6, 5, 3)
    narrow = Factors(one.left.bfloat16(), one.right.bfloat16())
    storage = Nf4(True, ("a",))
    made, done = resize.resize(Adapter({"a": narrow}, config={"revision": "x"}, storage=storage), rank=2)
    assert made.factors["a"].left.dtype == torch.bfloat16
    assert (made.storage, made.config) == (storage, {"revision": "x"})
    assert (done.bytes_before, done.bytes_after) == (2 * 33, 2 * 22)


def test_dora_is_not_resized(tmp_path: Path) -> None:
    variant = VARIANTS["dora"]
    adapters.save(adapters.wrap(adapters.base(variant), variant.config()), tmp_path)
    with pytest.raises(ModelError, match="is adapted by DoRA: its magnitudes belong to base plus update, so"):
        eckart.resize(tmp_path, rank=2)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ConfigError, "got no rule for ranks: give exactly one of"),
        ({"rank": 2, "energy": 0.5}, ConfigError, "got rank and energy: give exactly one of"),
        ({"params": 100, "size": 100}, ConfigError, "got params and size: give one of them"),
        ({"rank": 0}, RankError, "rank 0: must be at least 1"),
        ({"size": 60}, RankError, r"size 60 bytes: 12 are whole tensors and \d+ the file's header"),
        ({"params": 3}, RankError, "a budget of 3 parameters: 3 are tensors that stay as they are"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    adapter = Adapter({"a": factors(6, 5, 2)}, {"norm.weight": torch.ones(3)})
    with pytest.raises(kind, match=message):
        resize.resize(adapter, **options)


def test_a_broken_adapter_is_refused() -> None:
    broken = Factors(torch.full((6, 2), math.nan), torch.ones(2, 5))
    with pytest.raises(
        ModelError, match="the update of a has NaN or infinite entries: the adapter is broken"
    ):
        resize.resize(Adapter({"a": broken}), rank=1)
