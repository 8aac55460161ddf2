"""Stock models: the config says the widths, plain transformers loads them, eckart is not needed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import eckart
from eckart import ConfigError, ModelError, Override, RankError, Recipe, dimensions, models, planning
from eckart import stock as stock_module
from eckart.choices import Budget, Choice, dense
from eckart.methods import Shape

from . import tiny
from .conftest import Compress, logits, reload
from .test_dimensions import Setup, cost
from .test_linalg import FAST, SEEDS

NAMES = list(tiny.LINEAR)
FINE = Recipe(keep=0.75, of="linears", multiple=4, text=("unused",))

PLAIN = """
import json, sys
sys.modules["eckart"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
found = {}
for folder in sys.argv[1:]:
    expected = load_file(folder + "/expected.safetensors")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with torch.no_grad():
            logits = model(input_ids=expected["tokens"]).logits
        found[folder] = "equal" if torch.equal(logits, expected["logits"]) else "unequal"
    except Exception as error:
        found[folder] = type(error).__name__ + ": " + str(error)
try:
    import eckart
    found["eckart"] = "is there"
except ImportError:
    found["eckart"] = "is not there"
print(json.dumps(found))
"""


def without_eckart(folders: list[Path]) -> dict[str, str]:
    """Load every folder in a process that cannot import eckart, and say what came of it."""
    command = [sys.executable, "-c", PLAIN, *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    assert found.pop("eckart") == "is not there"
    return found


def keep(folder: Path, model: Any, tokenizer: Any = None, result: Any = None) -> Path:
    """Save `model` with the logits that it has to give."""
    eckart.save(model, tokenizer, folder, result)
    tokens = tiny.tokens()
    save_file({"tokens": tokens, "logits": logits(model, tokens)}, folder / "expected.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, text_file: Path, tokenizer: Any) -> dict[str, Path]:
    """A stock model of every architecture, and what must not load: a width model and a mixed one."""
    out = tmp_path_factory.mktemp("stock")
    options: dict[str, Any] = {"text": text_file, "tokens": 1024, "gradient_tokens": 512, "seq_len": 64}
    options |= {"tokenizer": tokenizer, "of": "linears", "recipe": FINE}
    made = {}
    for name in NAMES:
        model, result = eckart.compress(tiny.build(name), stock=True, **options)
        made[name] = keep(out / name, model, tokenizer, result)
    shares: dict[Shape, float] = {"width": 0.75, "mixed": 0.4}
    for form, share in shares.items():
        model, result = eckart.compress(tiny.build("llama"), form=form, **options | {"keep": share})
        made[form] = keep(out / form, model, tokenizer, result)
    return made


@pytest.fixture(scope="module")
def loaded_plainly(folders: dict[str, Path]) -> dict[str, str]:
    """What a transformers without eckart makes of each of the folders."""
    found = without_eckart(list(folders.values()))
    return {name: found[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("name", NAMES)
def test_plain_transformers_gives_the_same_logits(name: str, loaded_plainly: dict[str, str]) -> None:
    assert loaded_plainly[name] == "equal"


@pytest.mark.parametrize("name", ["width", "mixed"])
def test_what_is_not_stock_does_not_load_without_eckart(name: str, loaded_plainly: dict[str, str]) -> None:
    assert "equal" not in loaded_plainly[name]
    assert "Error" in loaded_plainly[name]
    assert "pip install eckart" in loaded_plainly[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_config_says_it_all(name: str, folders: dict[str, Path]) -> None:
    config = json.loads((folders[name] / "config.json").read_text())
    assert "quantization_config" not in config
    assert "eckart" not in json.dumps(config)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders[name]))
    report = json.loads((folders[name] / "eckart.json").read_text())
    assert models.parameter_count(fresh) == report["after"]["model"]
    assert models.parameter_count(fresh) < models.parameter_count(tiny.build(name))
    shapes = {key: tuple(tensor.shape) for key, tensor in models.state_tensors(fresh).items()}
    again = reload(folders[name])
    assert not models.low_rank_modules(again)
    assert shapes == {key: tuple(tensor.shape) for key, tensor in models.state_tensors(again).items()}
    assert again.generate(tiny.tokens(4), max_new_tokens=4, do_sample=False, pad_token_id=1).shape == (2, 8)


def forms(result: Any) -> dict[str, set[int]]:
    """Widths by the last part of the name, of what got narrower."""
    found: dict[str, set[int]] = {}
    for row in result.modules:
        found.setdefault(row.name.rsplit(".", 1)[-1], set()).add(row.rank if row.form == "narrow" else 0)
    return found


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_all_blocks_have_the_same_widths(name: str, compress: Compress) -> None:
    model, result = compress(tiny.build(name), stock=True, recipe=FINE, keep=0.7, of="linears")
    assert all(len(widths) == 1 for widths in forms(result).values())
    assert {row.form for row in result.modules} <= {"dense", "narrow"}
    assert 0.6 < result.keep_linears <= 0.7
    assert result.after.model == models.parameter_count(model)


def test_widths_differ_between_blocks_where_they_may(compress: Compress) -> None:
    _, free = compress(tiny.build("llama"), form="width", recipe=FINE, keep=0.7, of="linears")
    assert any(len(widths) > 1 for widths in forms(free).values())


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes | options)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("multiple", [None, 32, 64])
def test_widths_are_multiples(multiple: int | None, compress: Compress, tmp_path: Path) -> None:
    recipe = Recipe(keep=0.7, of="linears", multiple=multiple, text=("unused",))
    model, result = compress(llama(intermediate_size=192), stock=True, recipe=recipe, keep=0.7, of="linears")
    width = model.config.intermediate_size
    assert 0 < width < 192
    assert width % (multiple or 32) == 0
    assert result.keep_linears <= 0.7
    eckart.save(model, None, tmp_path / "out", result)
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), logits(model, tiny.tokens()))


def test_a_multiple_beyond_the_width_leaves_nothing_to_choose(compress: Compress) -> None:
    recipe = Recipe(keep=0.7, of="linears", multiple=64, text=("unused",))
    with pytest.raises(RankError, match=r"keep 0.7 of the linears cannot be reached: .* least is keep 1.000"):
        compress(tiny.build("olmo2"), stock=True, recipe=recipe, keep=0.7, exclude=["self_attn.*"])
    _, result = compress(tiny.build("llama"), stock=True, keep=1.0, of="linears")
    assert {row.form for row in result.modules} == {"dense"}


# heads


def without_heads(model: Any, kept: int) -> tuple[list[Choice], list[dimensions.Dimension]]:
    """Leave out key-value groups of every attention of `model`, in place, and say so."""
    targets = models.targets(model)
    found = [d for d in dimensions.verified(model, dimensions.find(model, targets)) if d.kind == "attention"]
    choices = []
    for target in targets:
        dimension = next((d for d in found if target.name in d.members), None)
        narrow = dimension and Choice(target, "narrow", kept, dimension.units)
        choices.append(narrow or dense(target))
    for dimension in found:
        for name, module in dimensions.narrowed(model, dimension, torch.arange(kept)).items():
            models.replace(model, name, module)
    return choices, found


@pytest.mark.parametrize(("groups", "kept"), [(2, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_fewer_heads_are_said_in_the_config(groups: int, kept: int, bias: bool, tmp_path: Path) -> None:
    model = llama(attention_bias=bias, mlp_bias=bias, num_key_value_heads=groups)
    choices, found = without_heads(model, kept)
    expected = logits(model, tiny.tokens())
    made = stock_module.build(model, choices, found, [])
    heads = model.config.num_attention_heads * kept // groups
    assert (made.config.num_attention_heads, made.config.num_key_value_heads) == (heads, kept)
    assert made.config.head_dim == 8
    assert not models.low_rank_modules(made)
    assert torch.allclose(logits(made, tiny.tokens()), expected, atol=1e-5 * float(expected.abs().max()))
    eckart.save(made, None, tmp_path / "out")
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), logits(made, tiny.tokens()))


def test_heads_that_a_config_refuses_are_refused_before_the_model_is_made() -> None:
    model = llama(num_key_value_heads=4)
    choices, found = without_heads(model, 3)  # transformers wants 32 to be a multiple of the heads
    with pytest.raises(ModelError, match="has no entry"):
        stock_module.build(model, choices, found, [])


def test_heads_that_a_config_refuses_are_not_chosen(compress: Compress, tmp_path: Path) -> None:
    model = llama(num_key_value_heads=4, intermediate_size=64)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(1e-3)
    recipe = Recipe(keep=0.93, of="linears", multiple=64, text=("unused",))
    made, result = compress(model, stock=True, recipe=recipe, keep=0.93, of="linears")
    assert made.config.num_key_value_heads in (1, 2)
    eckart.save(made, None, tmp_path / "out", result)
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), logits(made, tiny.tokens()))


# what is chosen


def rows(setup: Setup, choices: list[Choice]) -> tuple[int, int, int]:
    """MLP width, groups and dropped blocks of a choice."""
    narrow = {choice.units: choice.rank for choice in choices if choice.form == "narrow"}
    gone = sum(choice.form == "dropped" for choice in choices) * 2 // len(choices)
    return narrow.get(48, 48), narrow.get(2, 2), gone


@given(seed=SEEDS, share=st.floats(0.05, 1.1))
@FAST
def test_no_other_uniform_choice_has_a_smaller_loss(seed: int, share: float) -> None:
    setup = stock_setup(seed)
    limit = int(share * setup.size)
    (block,) = setup.blocks
    options = {}
    for gone in (0, 1):
        inside = [d for d in setup.dimensions if not (gone and d.name.startswith(f"{block}."))]
        for groups in (1, 2):
            for width in (*range(8, 48, 8), 48):
                left = {"mlp": width, "attention": groups}
                size = sum(
                    sum(t.size for t in setup.targets if t.name in d.members) // d.units * left[d.kind]
                    for d in inside
                )
                loss = sum(float(setup.losses[d.name][left[d.kind]]) for d in inside)
                options[width, groups, gone] = size, loss + gone * setup.blocks[block]
    fitting = [loss for size, loss in options.values() if size <= limit]
    recipe = Recipe(keep=0.5, stock=True, depth=True, multiple=8)

    def choose() -> list[Choice]:
        return stock_module.choose(
            recipe, Budget(limit, "the budget"), setup.model, setup.targets, setup.dimensions,
            setup.losses, setup.blocks,
        )  # fmt: skip

    if not fitting:
        least = min(size for size, _ in options.values())
        with pytest.raises(RankError, match=f"the budget cannot be reached: .* the least is {least};"):
            choose()
        return
    choices = choose()
    assert [choice.target for choice in choices] == setup.targets
    size, loss = options[rows(setup, choices)]
    assert cost(choices) == size <= limit
    assert loss == pytest.approx(min(fitting), rel=1e-9, abs=1e-12)


_SETUP: dict[int, Setup] = {}


def stock_setup(seed: int) -> Setup:
    """A setup with new losses on a model that is made once."""
    return _SETUP.setdefault(seed % 7, Setup(seed % 7))


# what is refused


def test_one_mlp_left_out_is_refused(compress: Compress) -> None:
    message = "stock: 1 of 2 blocks of LlamaForCausalLM have an MLP to make narrower, and a config has one"
    with pytest.raises(ModelError, match=message):
        compress(tiny.build("llama"), stock=True, exclude=["layers.0.mlp.*"])


def test_one_mlp_of_many_left_out_is_refused_for_what_it_is(compress: Compress) -> None:
    with pytest.raises(ModelError, match="stock: 10 of 11 blocks of LlamaForCausalLM have an MLP"):
        compress(llama(num_hidden_layers=11), stock=True, exclude=["layers.1.mlp.*"])


def test_a_config_that_has_no_word_for_the_width_is_refused(compress: Compress) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": tiny.VOCABULARY}
    bloom = AutoModelForCausalLM.from_config(transformers.BloomConfig(**sizes)).eval()
    before = bloom.config.to_dict()
    message = "the config of BloomForCausalLM has no entry for the width of its MLPs: leave out --stock"
    with pytest.raises(ModelError, match=message):
        compress(bloom, stock=True)
    assert bloom.config.to_dict() == before


def test_a_vocabulary_as_large_as_the_mlp_is_wide(compress: Compress) -> None:
    model, _ = compress(llama(intermediate_size=tiny.VOCABULARY), stock=True, keep=0.8, of="linears")
    assert model.config.vocab_size == tiny.VOCABULARY
    assert model.config.intermediate_size % 32 == 0


def test_rules_for_single_matrices_are_refused() -> None:
    with pytest.raises(ConfigError, match="overrides"):
        Recipe(keep=0.5, stock=True, overrides=(Override("layers.0.mlp.up_proj", dense=True),))


# models of other dtypes, recipes without text


def test_a_bfloat16_model_stays_one(compress: Compress, tmp_path: Path) -> None:
    dense = tiny.build("llama")
    models.cast(dense, torch.bfloat16)
    model, result = compress(dense, stock=True, recipe=FINE, keep=0.7, of="linears")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    eckart.save(model, None, tmp_path / "out", result)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == models.state_tensors(model).keys()
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), logits(model, tiny.tokens()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_output_may_have_another_dtype(dtype: str, compress: Compress) -> None:
    model, result = compress(
        tiny.build("llama"), stock=True, recipe=FINE, keep=0.7, of="linears", dtype=dtype
    )
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
    assert result.dtype == dtype


def test_weights_alone_are_enough(tmp_path: Path) -> None:
    recipe = Recipe(keep=0.7, of="linears", method="svd", stock=True, multiple=4)
    model, result = eckart.compress(tiny.build("llama"), recipe=recipe)
    assert result.calibration_tokens == 0
    assert result.keep_linears <= 0.7
    eckart.save(model, None, tmp_path / "out", result)
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), logits(model, tiny.tokens()))


def test_a_size_holds_on_disk(compress: Compress, tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "dense")
    size = int((tmp_path / "dense" / "model.safetensors").stat().st_size * 0.85)
    model, result = compress(tiny.build("llama"), stock=True, recipe=FINE, size=size)
    eckart.save(model, None, tmp_path / "out", result)
    assert size * 0.9 < (tmp_path / "out" / "model.safetensors").stat().st_size <= size
    assert result.after.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_plan_needs_no_weights() -> None:
    config = tiny.build("llama").config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    recipe = Recipe(keep=0.7, of="linears", stock=True, multiple=8)
    plan = planning.plan(recipe, skeleton, torch.float32)
    assert {choice.form for choice in plan.choices} == {"dense", "narrow"}
    assert cost(plan.choices) <= 0.7 * sum(choice.target.size for choice in plan.choices)
    assert not plan.exact
