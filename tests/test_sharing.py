"""Shared bases, anchored targets, and rank moved between matrices."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import eckart
from eckart import ConfigError, ModelError, Recipe, StoreError, closed, models, reallocate, sharing
from eckart.dimensions import find
from eckart.factors import FactoredLinear

from . import tiny
from .conftest import Compress, logits, reload


def _shared(model: Any) -> dict[str, tuple[FactoredLinear, FactoredLinear]]:
    pairs = models.bases(model).items()
    found = {}
    for name, first in pairs:
        own, other = model.get_submodule(name), model.get_submodule(first)
        assert isinstance(own, FactoredLinear)
        assert isinstance(other, FactoredLinear)
        found[name] = (own, other)
    return found


@pytest.mark.parametrize("name", tiny.LINEAR)
def test_a_basis_is_stored_once_loaded_once_and_comes_back(
    name: str, compress: Compress, tmp_path: Path
) -> None:
    model, result = compress(tiny.build(name, num_hidden_layers=4), method="basis-sharing")
    pairs = _shared(model)
    assert pairs
    assert result.after.model == models.parameter_count(model)
    eckart.save(model, None, tmp_path / "a", result)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert not any(f"{name}.down.weight" in stored for name in pairs)
    assert (tmp_path / "a" / "model.safetensors").stat().st_size == result.after.bytes
    again = reload(tmp_path / "a")
    assert models.bases(again) == models.bases(model)
    assert all(own.down is other.down for own, other in _shared(again).values())
    assert torch.equal(logits(again, tiny.tokens()), logits(model, tiny.tokens()))
    again.save_pretrained(tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == stored.keys()
    plain = eckart.densify(again)
    plain.save_pretrained(tmp_path / "c")
    dense = logits(reload(tmp_path / "c"), tiny.tokens())
    assert torch.allclose(dense, logits(model, tiny.tokens()), atol=1e-3 * float(dense.abs().max()))


def test_a_shared_basis_is_the_best_one_for_all(compress: Compress) -> None:
    """Eckart and Young for the matrices on top of each other, in the mean of their metrics."""
    dense = tiny.build("llama-bias-untied", num_hidden_layers=4)
    model, result = compress(copy.deepcopy(dense), method="basis-sharing", dtype="float32")
    ranks = {row.name: row.rank for row in result.modules}
    for name, (own, first) in _shared(model).items():
        assert own.rank == first.rank == ranks[name]
        best = torch.linalg.lstsq(first.down.weight.T.double(), own.map().dense().T.double()).solution
        assert torch.allclose(best.T.float(), own.up.weight, atol=1e-4)
    groups = sharing.bases(dense, models.targets(dense), find(dense, models.targets(dense)), 2)
    inside = {name for group in groups for name in group}
    assert not any(name.endswith(("o_proj", "down_proj")) for name in inside)
    assert inside == {*models.bases(model), *models.bases(model).values()}


def test_alike_matrices_share_without_loss(compress: Compress) -> None:
    """Two blocks with the same weights need one basis of the rank that one of them needs."""
    dense = tiny.build("llama-bias-untied")
    first, second = (dense.get_submodule(name) for name in models.block_names(dense))
    second.load_state_dict(first.state_dict())
    rows = dense.get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        rows.weight.copy_(rows.weight[:, :8] @ torch.randn(8, 32, generator=torch.Generator().manual_seed(0)))
    second.load_state_dict(first.state_dict())
    model, result = compress(copy.deepcopy(dense), method="basis-sharing", dtype="float32")
    module = model.get_submodule("model.layers.1.mlp.up_proj")
    wanted = dense.get_submodule("model.layers.1.mlp.up_proj").weight.detach()
    assert next(row.rank for row in result.modules if row.name.endswith("up_proj")) >= 8
    assert torch.allclose(module.map().dense(), wanted, atol=1e-3 * float(wanted.abs().max()))


def test_layers_says_how_many_blocks_share(compress: Compress) -> None:
    model, _ = compress(
        tiny.build("llama", num_hidden_layers=4),
        recipe=Recipe(keep=0.6, of="linears", method="basis-sharing", layers=4),
    )
    assert len(set(models.bases(model).values())) * 3 == len(models.bases(model))


def test_what_cannot_share_is_said(compress: Compress) -> None:
    with pytest.raises(ModelError, match="no two of the 1 blocks have matrices that could share a basis"):
        compress(tiny.build("llama", num_hidden_layers=1), method="basis-sharing")
    with pytest.raises(ConfigError, match="rank is a rule for ranks: give keep or size .* shared bases"):
        compress(tiny.build("llama"), method="basis-sharing", rank=4)
    with pytest.raises(ConfigError, match="form 'shared' has uniform allocation: use method basis-sharing"):
        compress(tiny.build("llama"), form="shared")
    with pytest.raises(ConfigError, match="layers 1: must be a whole number of at least 2"):
        Recipe(keep=0.5, layers=1)


def test_a_basis_that_does_not_fit_is_refused(compress: Compress, tmp_path: Path) -> None:
    model, result = compress(tiny.build("llama"), method="basis-sharing")
    eckart.save(model, None, tmp_path / "a", result)
    text = (tmp_path / "a" / "config.json").read_text()
    broken = text.replace(
        '"basis": "model.layers.0.self_attn.q_proj"', '"basis": "model.layers.0.mlp.up_proj"'
    )
    assert broken != text
    (tmp_path / "a" / "config.json").write_text(broken)
    with pytest.raises(StoreError, match="has the basis of model.layers.0.mlp.up_proj, which does not"):
        reload(tmp_path / "a")


def test_closed_form_keeps_what_is_shared(compress: Compress) -> None:
    dense = tiny.build("llama", num_hidden_layers=4)
    model, _ = compress(copy.deepcopy(dense), method="basis-sharing", dtype="float32")
    before = models.bases(model)
    rows = torch.randint(2, tiny.VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(0))
    closed.refit(model, dense, rows, 1.0, metrics=closed.Metrics({}))
    assert models.bases(model) == before


def test_aa_svd_is_svd_llm_solved_again_on_the_inputs_that_are_left(compress: Compress) -> None:
    """Its outputs on the calibration text are closer to the dense ones than those of the one-shot factors."""
    dense = tiny.build("llama")
    plain, first = compress(copy.deepcopy(dense), method="svd-llm", keep=0.5, of="linears", dtype="float32")
    model, result = compress(copy.deepcopy(dense), method="aa-svd", keep=0.5, of="linears", dtype="float32")
    assert [row.rank for row in result.modules] == [row.rank for row in first.modules]
    assert result.seconds["anchor"] > 0
    assert result.compressed.loss != first.compressed.loss
    assert not torch.equal(logits(plain, tiny.tokens()), logits(model, tiny.tokens()))


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_rank_moves_to_where_it_was_taken_from(form: str, compress: Compress) -> None:
    """Ranks that were spoilt on purpose come back to something better, at no more parameters."""
    dense = tiny.build("llama")
    model, result = compress(copy.deepcopy(dense), method="svd", form=form, dtype="float32")
    rows = torch.randint(2, tiny.VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(0))
    moved = reallocate.reallocated(model, dense, rows)
    assert moved
    before = models.parameter_count(model)
    for name, module in moved.items():
        assert module.kind == form
        models.replace(model, name, module)
    assert models.parameter_count(model) <= before
    ranks = [row.rank for row in result.modules]
    assert ranks != [module.rank for module in reallocate.movable(model).values()]


def test_there_is_nothing_to_move_in_a_dense_model() -> None:
    dense = tiny.build("llama")
    assert reallocate.reallocated(dense, dense, tiny.tokens()) == {}
