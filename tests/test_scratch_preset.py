"""Models that are low-rank from the first step: what they hold, how they begin, what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

import eckart
from eckart import Override, models
from eckart.errors import ConfigError, ModelError, RankError
from eckart.factors import FactoredLinear, PivotedLinear
from eckart.linalg import truncated_svd
from eckart.scratch import preset
from eckart.scratch.decay import FrobeniusDecay
from eckart.scratch.preset import Structure

from . import tiny
from .conftest import logits, reload

EPS = torch.finfo(torch.float32).eps


def config(name: str = "llama") -> Any:
    kind, options = tiny.ARCHITECTURES[name]
    return getattr(transformers, kind)(**options)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "gpt-neox", "opt"])
def test_every_matrix_begins_as_the_best_approximation_of_its_usual_start(name: str, form: Any) -> None:
    dense = preset.build(config(name), seed=5)
    model = eckart.from_config(config(name), keep=0.5, of="linears", form=form, seed=5)
    changed = models.low_rank_modules(model)
    assert set(changed) == {target.name for target in models.targets(dense)}
    for key, module in changed.items():
        weight = models.find(dense, key).weight.detach()
        assert isinstance(module, (FactoredLinear, PivotedLinear))
        best = truncated_svd(weight, module.rank).dense()
        found = module.map().dense()
        assert torch.allclose(found, best, atol=100 * EPS * float(weight.norm()))
        assert not torch.allclose(found, weight, atol=100 * EPS * float(weight.norm()))


def test_factors_begin_balanced() -> None:
    model = eckart.from_config(config(), rank=6, seed=1)
    for module in models.low_rank_modules(model).values():
        assert isinstance(module, FactoredLinear)
        left, right = module.map().left, module.map().right
        gram = left.T @ left
        assert torch.allclose(gram, right @ right.T, atol=1e-5 * float(gram.max()))
        assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-5 * float(gram.max()))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_what_remains_is_what_was_asked_for(keep: float) -> None:
    whole = models.parameter_count(preset.build(config()))
    linears = sum(target.size for target in models.targets(preset.build(config())))
    by_model = models.parameter_count(eckart.from_config(config(), keep=0.7))
    assert 0.6 * whole < by_model <= 0.7 * whole
    by_linears = models.parameter_count(eckart.from_config(config(), keep=keep, of="linears"))
    assert whole - linears + 0.8 * keep * linears < by_linears <= whole - linears + keep * linears


def test_a_warm_start_is_compression_by_svd() -> None:
    trained = tiny.build("llama-bias-untied")
    made = preset.factorize(copy.deepcopy(trained), Structure(keep=0.5, of="linears"))
    other, _ = eckart.compress(copy.deepcopy(trained), keep=0.5, of="linears", method="svd", form="factored")
    own, theirs = made.state_dict(), other.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in own)
    assert own.keys() != trained.state_dict().keys()


def test_chosen_layers_stay_at_full_rank() -> None:
    rules = [Override("*.v_proj", dense=True), Override("*layers.1*.o_proj", rank=3)]
    model = eckart.from_config(config(), keep=0.5, of="linears", exclude=["*.down_proj"], overrides=rules)
    changed = models.low_rank_modules(model)
    assert not [name for name in changed if name.endswith(("v_proj", "down_proj"))]
    assert changed["model.layers.1.self_attn.o_proj"].rank == 3
    assert "model.layers.0.self_attn.q_proj" in changed
    inner = eckart.from_config(config(), rank=4, include=["q_proj"])
    assert all(name.endswith("q_proj") for name in models.low_rank_modules(inner))


def test_seeds_say_what_is_drawn_and_nothing_else_is() -> None:
    torch.manual_seed(3)
    wanted = torch.randn(3)
    torch.manual_seed(3)
    first, second, third = (eckart.from_config(config(), keep=0.8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.randn(3), wanted)
    ids = tiny.tokens()
    assert torch.equal(logits(first.eval(), ids), logits(second.eval(), ids))
    assert not torch.equal(logits(first, ids), logits(third.eval(), ids))


def test_the_config_stays_as_it_was_and_the_model_saves_and_loads(tmp_path: Path) -> None:
    given = config()
    before = given.to_dict()
    model = eckart.from_config(given, keep=0.8)
    assert given.to_dict() == before
    assert model.training
    model.save_pretrained(tmp_path / "model")
    loaded = reload(tmp_path / "model")
    assert models.low_rank_modules(loaded).keys() == models.low_rank_modules(model).keys()
    assert torch.equal(logits(loaded, tiny.tokens()), logits(model.eval(), tiny.tokens()))
    again = eckart.from_config(str(tmp_path_config(tmp_path, given)), keep=0.8)
    assert models.parameter_count(again) == models.parameter_count(model)


def tmp_path_config(folder: Path, given: Any) -> Path:
    given.save_pretrained(folder / "config")
    return folder / "config"


def test_it_trains_in_trainer(tmp_path: Path) -> None:
    model = eckart.from_config(config(), keep=0.8, seed=0)
    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(16).repeat(8, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, learning_rate=1e-2, weight_decay=0.1, report_to=[],
        use_cpu=True, logging_steps=1, disable_tqdm=True, per_device_train_batch_size=4, save_steps=6,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[FrobeniusDecay()])
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < 0.8 * found[0]
    loaded = reload(tmp_path / "checkpoint-12")
    assert torch.equal(logits(loaded, tiny.tokens()), logits(model.eval(), tiny.tokens()))


def test_modes_and_frozen_matrices_stay_as_they_were() -> None:
    model = tiny.build("llama-bias-untied").train()
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    preset.factorize(model, Structure(rank=4))
    assert model.training
    assert not model.model.layers[0].self_attn.q_proj.down.training
    assert model.model.layers[1].self_attn.q_proj.down.training
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {f"model.layers.1.self_attn.q_proj.{part}.weight" for part in ("down", "up")}


def test_embeddings_and_a_tied_head_can_be_low_rank() -> None:
    model = eckart.from_config(config(), rank=8, include=["embed_tokens", "q_proj"])
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.codes.weight is head.codes.weight
    assert model.training
    assert table.up.weight.requires_grad


def test_a_rank_above_break_even_is_refused_for_two_factors_alone() -> None:
    with pytest.raises(RankError, match=r"rank 11 of .*k_proj \(16 x 32\) is above break-even.*to 10 at"):
        eckart.from_config(config(), rank=11)
    rule = Override("*.q_proj", rank=16)
    with pytest.raises(RankError, match=r"q_proj \(32 x 32\) is above break-even.*form pivoted.*exclude"):
        eckart.from_config(config(), keep=0.8, overrides=[rule])
    model = eckart.from_config(config(), rank=15, form="pivoted")
    assert all(isinstance(module, PivotedLinear) for module in models.low_rank_modules(model).values())
    small = eckart.from_config(config(), rank=10)
    kept = models.low_rank_modules(small)["model.layers.0.self_attn.k_proj"]
    assert isinstance(kept, FactoredLinear)
    assert sum(value.numel() for value in kept.parameters()) < 16 * 32


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({}, ConfigError, "keep None and rank None: give exactly one"),
        ({"keep": 0.5, "rank": 4}, ConfigError, "give exactly one"),
        ({"keep": 1.5}, ConfigError, "keep 1.5"),
        ({"keep": 0.5, "form": "width"}, ConfigError, "form 'width': a preset is one of factored, pivoted"),
        ({"keep": 0.01}, RankError, "cannot be reached"),
        ({"keep": 0.5, "include": ["nothing"]}, ModelError, "'nothing' matches none"),
        ({"rank": 4, "dtype": "int8"}, ConfigError, "dtype 'int8'"),
    ],
)
def test_what_cannot_be_had_is_refused(given: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        eckart.from_config(config(), **given)


def test_other_things_than_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="got a int"):
        eckart.from_config(3, keep=0.5)
    eckart.from_config(config(), keep=0.8).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="the config is of a compressed model"):
        eckart.from_config(tmp_path / "small", keep=0.5)


def test_settings_out_of_a_mapping() -> None:
    made = preset.from_settings(
        {"rank": 4, "exclude": "v_proj", "overrides": [{"match": "q", "dense": True}]}
    )
    assert made == Structure(rank=4, exclude=("v_proj",), overrides=(Override("q", dense=True),))
    with pytest.raises(ConfigError, match=r"unknown key 'ranks': did you mean 'rank'"):
        preset.from_settings({"ranks": 4})
