"""Parameters of adapters: PEFT's own counts, the published figures, and eckart params."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from eckart import commands_params, hub
from eckart.adapt import attach, sizes, targets
from eckart.cli import app
from eckart.errors import ModelError

from . import tiny

LLAMA_7B, LLAMA_13B, LLAMA_70B, GPT3 = (one.selections() for one in sizes.PUBLISHED)


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["params", *map(str, words)])


def peft_counts(model: Any, config: Any, names: list[str]) -> dict[str, int]:
    with attach.known_warnings():
        made = peft.get_peft_model(model, config)
    found = {}
    for name in names:
        layer = made.base_model.model.get_submodule(name)
        found[name] = sum(value.numel() for value in layer.parameters() if value.requires_grad)
    assert sum(found.values()) == made.get_nb_trainable_parameters()[0]
    return found


@pytest.mark.parametrize("architecture", ["llama", "llama-bias-untied", "qwen3", "phi3", "gpt-neox", "opt"])
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_counts_are_those_of_peft(architecture: str, kind: sizes.Kind) -> None:
    model = tiny.build(architecture)
    names = targets.names(model)
    mine = sizes.per_module(model, dict.fromkeys(names, 3), kind)
    config: Any = peft.LoraConfig(r=3, target_modules=names, use_dora=kind == "dora")
    if kind == "adalora":
        config = peft.AdaLoraConfig(init_r=3, target_r=2, target_modules=names, total_step=9)
    assert mine == peft_counts(model, config, names)


def test_counts_follow_the_rank_of_each_module(llama: Any) -> None:
    names = targets.names(llama)
    ranks = {name: 1 + index % 4 for index, name in enumerate(names)}
    pattern = {name.replace(".", r"\."): rank for name, rank in ranks.items()}
    config = peft.LoraConfig(r=1, target_modules=names, rank_pattern=pattern)
    assert sizes.per_module(llama, ranks) == peft_counts(llama, config, names)


def test_rank_zero_is_no_adapter() -> None:
    assert [sizes.adapter((8, 4), 0, kind) for kind in ("lora", "dora", "adalora")] == [0, 0, 0]


def test_a_name_that_is_no_linear_map(llama: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.norm is not a linear map of this LlamaForCausalLM"):
        sizes.per_module(llama, {"model.norm": 2})


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_factors_are_as_large_as_the_matrix_at_the_break_even_rank(m: int, n: int) -> None:
    rank = sizes.break_even((m, n))
    assert rank * (m + n) == pytest.approx(m * n)
    below, above = int(rank), int(rank) + 1
    assert sizes.adapter((m, n), below) <= m * n < sizes.adapter((m, n), above)


def test_published_parameters() -> None:
    assert LLAMA_7B.parameters == 6_738_415_616
    assert LLAMA_13B.parameters == 13_015_864_320
    assert LLAMA_70B.parameters == 68_976_648_192
    assert GPT3.parameters == pytest.approx(175e9, rel=0.003)


def test_published_shapes_are_those_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=2,
        num_attention_heads=64, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        found = sizes.selections("two blocks of Llama 70B", LlamaForCausalLM(config))
    for column in found.columns:
        one = LLAMA_70B.count(column, 16)
        assert one is not None
        assert found.count(column, 16) == one * 2 // 80


def test_the_four_columns_of_7b_at_rank_8() -> None:
    found = [LLAMA_7B.count(column, 8) for column in LLAMA_7B.columns]
    assert found == [2_097_152, 4_194_304, 8_388_608, 19_988_480]


def test_the_widely_copied_table_counts_one_matrix_a_layer() -> None:
    millions = [(LLAMA_7B.count(sizes.ONE, rank) or 0) // 1_000_000 for rank in sizes.RANKS]
    assert millions == [2, 4, 16]


def test_ten_thousand_times_fewer() -> None:
    count = GPT3.count("q, v", 4)
    assert count == 18_874_368
    assert round(175e9 / count) == 9_272


@pytest.mark.parametrize("model", [LLAMA_7B, LLAMA_13B, LLAMA_70B, GPT3], ids=lambda one: one.name)
def test_ranks_within_are_the_first_and_the_last(model: sizes.Selections) -> None:
    def share(column: str, rank: int) -> float:
        return (model.count(column, rank) or 0) / model.parameters

    for column in model.columns:
        found = model.within(column)
        assert found is not None
        least, most = found
        assert share(column, least - 1) < 0.001 <= share(column, least)
        assert share(column, most) <= 0.01 < share(column, most + 1)


def test_the_verdict_counts_every_cell() -> None:
    found = sizes.verdict([LLAMA_7B], (8, 16, 64))
    assert found == {"less": 3, "within": 8, "more": 1}


def test_an_adapter_on_a_factored_map_is_counted_inside(compressed_folder: Path) -> None:
    model = hub.load(str(compressed_folder)).model
    skeleton = commands_params.skeleton(str(compressed_folder), trust_remote_code=False)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert targets.shapes(skeleton, targets.names(skeleton)) == targets.shapes(model, targets.names(model))
    assert sizes.selections("", skeleton) == sizes.selections("", model)


def test_params_of_published_models() -> None:
    found = run()
    assert found.exit_code == 0
    for said in ("19,988,480", "18,874,368", "9,272 times fewer", "910.2", "25 of the 48"):
        assert said in found.output


def test_params_of_a_model(llama_folder: Path) -> None:
    found = run(llama_folder, "--rank", 2, "--targets", "mlp.*", "--json")
    assert found.exit_code == 0
    (model,) = json.loads(found.output)["models"]
    loaded = hub.load(str(llama_folder)).model
    assert model["parameters"] == loaded.num_parameters()
    wanted = dict.fromkeys(targets.names(loaded, ["mlp.*"]), 2)
    assert model["lora"]["mlp.*"]["2"] == sum(sizes.per_module(loaded, wanted).values())


def test_params_of_a_model_whose_matrices_have_other_names(tmp_path: Path) -> None:
    tiny.build("gpt-neox").save_pretrained(tmp_path / "neox")
    found = run(tmp_path / "neox", "--rank", 2)
    assert found.exit_code == 0
    assert "no such matrices" in found.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--rank", 0), "rank 0: must be at least 1"),
        (("--targets", "mlp.*"), "targets are for a MODEL"),
        (("./nowhere",), "no model at ./nowhere"),
    ],
)
def test_params_says_what_is_wrong(words: tuple[Any, ...], says: str) -> None:
    found = run(*words)
    assert found.exit_code == 2
    assert says in found.output


def test_params_suggests_targets(llama_folder: Path) -> None:
    found = run(llama_folder, "--targets", "q_prok")
    assert found.exit_code == 2
    assert "did you mean q_proj" in found.output
