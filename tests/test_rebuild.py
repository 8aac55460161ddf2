"""Blocks left out: what is left is the original with those blocks skipped, in memory, on disk and cached."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import eckart
from eckart import ConfigError, ModelError, Override, RankError, Recipe, hub, models, planning, rebuild
from eckart.models import Target

from . import tiny
from .conftest import Compress, logits, reload
from .test_stock import keep, without_eckart

NAMES = ["llama", "gemma2", "qwen3", "opt", "gpt-neox"]
LAYERS = 4
GONE = (1, 2)


def deep(name: str, layers: int = LAYERS, **options: Any) -> Any:
    """A tiny model with more blocks than usual."""
    return tiny.build(name, **{"num_hidden_layers": layers} | options)


def blocks(model: Any, places: Sequence[int] = GONE) -> list[str]:
    names = models.block_names(model)
    return [names[place] for place in places]


def skipping(model: Any, names: Sequence[str]) -> torch.Tensor:
    """Logits of `model` when the blocks `names` are the identity."""
    handles = []
    for name in names:
        block = model.get_submodule(name)

        def passing(module: Any, args: Any, output: Any) -> Any:
            return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

        handles.append(block.register_forward_hook(passing))
    found = logits(model, tiny.tokens())
    for handle in handles:
        handle.remove()
    return found


# fewer blocks


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_is_the_model_with_those_blocks_skipped(name: str) -> None:
    model = deep(name)
    whole, expected = logits(model, tiny.tokens()), skipping(model, blocks(model))
    made = rebuild.without_blocks(model, blocks(model))
    assert type(made) is type(model)
    assert len(models.block_names(made)) == LAYERS - len(GONE)
    assert torch.allclose(logits(made, tiny.tokens()), expected, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(whole, expected, atol=1e-2 * float(expected.abs().max()))
    assert torch.equal(logits(model, tiny.tokens()), whole), "the original stays as it is"
    assert model.config.num_hidden_layers == LAYERS


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_counts_the_blocks_that_are_left(name: str) -> None:
    model = deep(name)
    made = rebuild.without_blocks(model, blocks(model))
    prompt = tiny.tokens(6)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached = made.generate(prompt, **options)
    assert cached.shape == (2, 11)
    assert torch.equal(made.generate(prompt, use_cache=False, **options), cached)
    tokens = prompt
    for _ in range(5):
        tokens = torch.cat([tokens, logits(made, tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, tokens)


def test_what_the_config_says_of_every_block_is_cut() -> None:
    model = deep("gemma2")
    kinds = list(model.config.layer_types)
    assert len(set(kinds)) == 2
    for gone in ([0], [1], [0, 3], [1, 2]):
        config = rebuild.shallower(model, blocks(model, gone))
        assert config.layer_types == [kind for place, kind in enumerate(kinds) if place not in gone]
        assert config.num_hidden_layers == LAYERS - len(gone)
    assert model.config.layer_types == kinds
    assert rebuild.shallower(model, []).to_dict() == model.config.to_dict()


def test_the_kinds_of_the_wrong_blocks_are_another_model() -> None:
    model = deep("gemma2", sliding_window=4)
    gone = blocks(model, [0])
    config = rebuild.shallower(model, gone)
    expected = skipping(model, gone)
    made = rebuild.build(model, config, gone)
    assert torch.allclose(logits(made, tiny.tokens()), expected, atol=1e-5 * float(expected.abs().max()))
    config.layer_types = model.config.layer_types[:-1]
    with pytest.raises(ModelError, match="computes something else"):
        rebuild.build(model, config, gone)


def test_other_lists_of_that_length_are_not_cut() -> None:
    model = deep("llama", 3)
    model.config.eos_token_id = [1, 5, 7]
    assert rebuild.shallower(model, blocks(model, [1])).eos_token_id == [1, 5, 7]


def test_fewer_blocks_load_without_eckart(tmp_path: Path) -> None:
    folders = []
    for name in NAMES:
        model = deep(name)
        made = rebuild.without_blocks(model, blocks(model))
        folders.append(keep(tmp_path / name, made))
        config = json.loads((folders[-1] / "config.json").read_text())
        assert config["num_hidden_layers"] == LAYERS - len(GONE)
        assert "eckart" not in json.dumps(config)
        assert "quantization_config" not in config
        fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders[-1]))
        assert models.parameter_count(fresh) == models.parameter_count(made) < models.parameter_count(model)
    assert without_eckart(folders) == {str(folder): "equal" for folder in folders}


# names


def test_the_blocks_that_are_left_move_up() -> None:
    model = deep("llama", 12)
    gone = blocks(model, [1, 10])
    names = rebuild.names_without(model, gone)
    assert list(names) == blocks(model, [0, *range(2, 10), 11])
    assert list(names.values()) == [f"model.layers.{place}" for place in range(10)]
    assert rebuild.renamed("model.layers.11.mlp.up_proj", names, gone) == "model.layers.9.mlp.up_proj"
    assert rebuild.renamed("model.layers.1.mlp.up_proj", names, gone) is None
    assert rebuild.renamed("model.layers.10.mlp.up_proj", names, gone) is None
    assert rebuild.renamed("model.norm", names, gone) == "model.norm"
    targets = models.targets(model, include=["up_proj", "lm_head"])
    moved = rebuild.moved(targets, model, gone)
    assert [t.name for t in moved if t.name != "model.embed_tokens"] == [
        f"model.layers.{place}.mlp.up_proj" for place in range(10)
    ]
    assert all(isinstance(target, Target) for target in moved)
    assert rebuild.moved(targets, model, []) == targets
    state = rebuild.state(model, gone)
    assert len({name.split(".")[2] for name in state if ".layers." in name}) == 10
    assert state["model.layers.9.mlp.up_proj.weight"] is not None
    own = model.model.layers[11].mlp.up_proj.weight
    assert state["model.layers.9.mlp.up_proj.weight"].data_ptr() == own.data_ptr()


# rebuilding


@pytest.mark.parametrize("name", list(tiny.LINEAR))
def test_a_model_rebuilt_from_its_own_config_is_the_same(name: str) -> None:
    model = tiny.build(name)
    made = rebuild.build(model, model.config)
    assert made is not model
    assert torch.equal(logits(made, tiny.tokens()), logits(model, tiny.tokens()))
    assert made.generation_config is model.generation_config


def test_a_config_that_says_something_else_is_refused() -> None:
    model = tiny.build("llama")
    config = type(model.config)(**model.config.to_dict() | {"hidden_act": "relu"})
    message = r"LlamaForCausalLM made from the smaller config computes something else \(relative error"
    with pytest.raises(ModelError, match=message) as caught:
        rebuild.build(model, config)
    assert "leave out --stock or --depth" in str(caught.value)


def test_shapes_tell_whether_a_config_fits() -> None:
    model = tiny.build("llama")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kind, values = type(model.config), model.config.to_dict()
    assert rebuild.fits(type(model), model.config, shapes)
    assert not rebuild.fits(type(model), kind(**values | {"intermediate_size": 40}), shapes)
    assert not rebuild.fits(type(model), model.config, shapes | {"another": (1,)})
    refused = kind(**values)
    refused.num_key_value_heads = 0
    assert not rebuild.fits(type(model), refused, shapes)


def test_hooks_leave_with_the_context() -> None:
    for name in NAMES:
        model = deep(name)
        whole, expected = logits(model, tiny.tokens()), skipping(model, blocks(model))
        with rebuild.skipped(model, blocks(model)):
            assert torch.equal(logits(model, tiny.tokens()), expected)
        assert torch.equal(logits(model, tiny.tokens()), whole)
        assert not any(module._forward_hooks for module in model.modules())


# what a block costs


def test_a_block_that_does_nothing_costs_nothing() -> None:
    model = deep("llama", 3)
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        torch.nn.init.zeros_(linear.weight)
    steps: list[tuple[int, int]] = []
    rows = tiny.tokens(32)
    losses = rebuild.block_losses(
        model, models.targets(model), rows, lambda done, total: steps.append((done, total))
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert losses["model.layers.1"] == pytest.approx(0, abs=1e-5)
    assert all(loss > 0 for loss in losses.values())
    assert len(losses) == 2, "the costliest block stays"


def test_one_block_is_never_dropped(compress: Compress) -> None:
    single = deep("llama", 1)
    assert not rebuild.block_losses(single, models.targets(single), tiny.tokens(), lambda done, total: None)
    model, result = compress(deep("llama", 1), depth=True)
    assert len(models.block_names(model)) == 1
    assert not any(row.form == "dropped" for row in result.modules)


# the whole run


@pytest.mark.parametrize("form", ["factored", "pivoted", "width", "mixed"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_shallow_model_saves_and_loads_bit_equal(
    name: str, form: str, compress: Compress, tmp_path: Path, tokenizer: Any
) -> None:
    dense = deep(name)
    count = models.parameter_count(dense)
    model, result = compress(dense, depth=True, form=form, keep=0.3, of="linears")
    assert result.keep_linears <= 0.3
    dropped = [row for row in result.modules if row.form == "dropped"]
    assert dropped
    assert all((row.after, row.rank) == (0, 0) for row in dropped)
    assert len(models.block_names(model)) < LAYERS
    assert result.after.model == models.parameter_count(model) < count
    before = logits(model, tiny.tokens())
    eckart.save(model, tokenizer, tmp_path / "out", result)
    again = reload(tmp_path / "out")
    assert torch.equal(logits(again, tiny.tokens()), before)
    assert again.config.num_hidden_layers == len(models.block_names(model))
    assert result.after.bytes == hub.weight_bytes(tmp_path / "out")
    made = again.generate(tiny.tokens(4), max_new_tokens=3, do_sample=False, pad_token_id=1)
    assert made.shape[1] in range(5, 8)
    plain = eckart.densify(again)
    assert torch.allclose(logits(plain, tiny.tokens()), before, atol=2e-4 * float(before.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_stock_and_depth_need_no_eckart(name: str, compress: Compress, tmp_path: Path) -> None:
    recipe = Recipe(keep=0.3, of="linears", multiple=8, text=("unused",))
    model, result = compress(
        deep(name), stock=True, depth=True, recipe=recipe, keep=0.3, of="linears", exclude=[]
    )
    assert result.keep_linears <= 0.3
    assert len(models.block_names(model)) < LAYERS
    assert not models.low_rank_modules(model)
    eckart.save(model, None, tmp_path / "out", result)
    assert "eckart" not in (tmp_path / "out" / "config.json").read_text()
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), logits(model, tiny.tokens()))


def test_a_budget_that_only_depth_reaches(compress: Compress) -> None:
    options: dict[str, Any] = {"keep": 0.15, "of": "linears", "form": "width"}
    with pytest.raises(RankError, match="keep 0.15 of the linears cannot be reached"):
        compress(deep("llama"), **options)
    _, result = compress(deep("llama"), depth=True, **options)
    assert result.keep_linears <= 0.15


def test_a_plan_reaches_what_the_run_reaches() -> None:
    recipe = Recipe(keep=0.15, of="linears", form="width", depth=True)
    plan = planning.plan(recipe, deep("llama"), torch.float32)
    assert sum(choice.parameters for choice in plan.choices) <= 0.15 * sum(
        c.target.size for c in plan.choices
    )
    assert not plan.exact


def test_a_block_with_a_ruled_matrix_stays(compress: Compress) -> None:
    model, result = compress(
        deep("llama"), depth=True, keep=0.35, of="linears", overrides=[Override("up_proj", dense=True)]
    )
    assert sum(row.after for row in result.modules) == result.after.linears
    assert len(models.block_names(model)) == LAYERS


def test_a_shallow_model_in_another_dtype(compress: Compress) -> None:
    model, result = compress(
        deep("llama"), depth=True, form="width", keep=0.3, of="linears", dtype="bfloat16"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert result.dtype == "bfloat16"


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_factored_embeddings_stay_tied_above_fewer_blocks(
    form: str, compress: Compress, tmp_path: Path
) -> None:
    model, result = compress(deep("llama"), depth=True, form=form, keep=0.3, of="linears", include=["*"])
    assert any(row.form == "dropped" for row in result.modules)
    assert model.lm_head.codes.weight is model.model.embed_tokens.codes.weight
    eckart.save(model, None, tmp_path / "out", result)
    again = reload(tmp_path / "out")
    assert again.lm_head.codes.weight is again.model.embed_tokens.codes.weight
    assert torch.equal(logits(again, tiny.tokens()), logits(model, tiny.tokens()))


def test_what_is_excluded_is_left_alone(compress: Compress) -> None:
    model, _ = compress(deep("llama"), depth=True, keep=0.5, of="linears", exclude=["self_attn.*"])
    assert len(models.block_names(model)) == LAYERS


@pytest.mark.parametrize("options", [{"method": "svd"}, {"allocation": "uniform"}, {"method": "io-svd"}])
def test_depth_needs_losses_of_one_unit(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="depth weighs blocks against ranks and widths by the loss of each"):
        Recipe(keep=0.5, depth=True, **options)
