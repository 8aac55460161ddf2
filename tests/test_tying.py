"""Embeddings and output head: one matrix or two."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, ModelError, cli, factorize, models, tying, windows

from . import tiny
from .conftest import logits, reload

SMALL = {"tokens": 512, "gradient_tokens": 512, "seq_len": 64, "eval_tokens": 512}


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "gpt-neox"])
def test_untied_logits_are_equal_bit_for_bit_and_stock_loads_them(name: str, tmp_path: Path) -> None:
    model = tiny.build(name, tie_word_embeddings=True)
    assert tying.is_tied(model)
    before, parameters = logits(model, tiny.tokens()), models.parameter_count(model)
    table = model.get_input_embeddings().weight
    model, found = eckart.untie(model)
    assert found.done == "untied"
    assert not tying.is_tied(model)
    assert torch.equal(logits(model, tiny.tokens()), before)
    assert models.parameter_count(model) == parameters + table.numel()
    assert found.saved == -4 * table.numel()
    eckart.save(model, None, tmp_path / "untied", found)
    assert "quantization_config" not in json.loads((tmp_path / "untied" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "untied").eval()
    assert not tying.is_tied(again)
    assert torch.equal(logits(again, tiny.tokens()), before)
    with torch.no_grad():  # they are two now
        model.get_output_embeddings().weight.mul_(2)
    assert torch.equal(model.get_input_embeddings().weight, table)
    back, done = eckart.tie(again)
    assert done.done == "tied"
    assert done.error is None  # equal matrices need no fit
    assert done.saved == 4 * table.numel()
    assert tying.is_tied(back)
    assert torch.equal(logits(back, tiny.tokens()), before)
    eckart.save(back, None, tmp_path / "tied", done)
    stored = load_file(tmp_path / "tied" / "model.safetensors")
    assert sum(tensor.shape == table.shape for tensor in stored.values()) == 1
    loaded = reload(tmp_path / "tied")
    assert tying.is_tied(loaded)
    assert torch.equal(logits(loaded, tiny.tokens()), before)
    assert eckart.tie(loaded)[1].done == "nothing"
    assert eckart.untie(again)[1].done == "untied"
    assert eckart.untie(again)[1].done == "nothing"


def test_an_untied_pair_becomes_the_best_matrix_for_both(tokenizer: Any, text_file: Path) -> None:
    """In the metric of the loss it costs less than the mean of both, than either, and says what it costs."""
    dense = tiny.build("llama-bias-untied")
    table, head = (ends.weight.detach().double() for ends in tying._ends(dense))
    options: dict[str, Any] = SMALL | {"text": text_file, "tokenizer": tokenizer}
    model, found = eckart.tie(copy.deepcopy(dense), **options)
    assert tying.is_tied(model)
    recipe = eckart.Recipe(keep=1.0, text=(str(text_file),), tokens=512, gradient_tokens=512, seq_len=64)
    rows = windows.read(recipe, tokenizer, []).calibration
    stats = factorize.statistics_of(recipe, dense, ["model.embed_tokens", "lm_head"], rows).stats

    def moment(kind: Any, name: str) -> torch.Tensor:
        mean = stats.moment(kind, name).mean().double()
        damped = mean if mean.ndim == 1 else mean.diagonal()
        return mean + recipe.damp * damped.mean() * (torch.eye(len(mean)) if mean.ndim == 2 else 1)

    frequencies, rows_cost = moment("gram", "model.embed_tokens"), moment("gradient", "model.embed_tokens")
    logits_cost, inputs = moment("gradient", "lm_head").diagonal(), moment("gram", "lm_head")

    def cost(weight: torch.Tensor) -> tuple[float, float]:
        first, second = table - weight, head - weight
        looked_up = (frequencies * ((first @ rows_cost) * first).sum(1)).sum()
        return float(looked_up) / 2, float((logits_cost * ((second @ inputs) * second).sum(1)).sum()) / 2

    weight = model.get_input_embeddings().weight.detach().double()
    assert found.error == pytest.approx(cost(weight), rel=1e-3)
    for other in ((table + head) / 2, table, head):
        assert sum(cost(other)) > 1.01 * sum(cost(weight))
    assert found.dense is not None
    assert found.compressed is not None
    assert found.compressed.loss > found.dense.loss
    plain, mean = eckart.tie(copy.deepcopy(dense), method="svd", **options)
    assert torch.allclose(plain.get_input_embeddings().weight.double(), (table + head) / 2)
    assert mean.method == "svd"
    assert "embeddings and output head are one matrix now" in str(found)
    assert f"258 x 32 = {258 * 32:,} parameters" in str(found)


def test_tying_a_model_whose_blocks_share_leaves_them_shared(tmp_path: Path) -> None:
    from eckart.shared import sources

    model, result = eckart.share(tiny.build("llama"), "all", start="first")
    before = logits(model, tiny.tokens())
    model, found = eckart.untie(model)
    assert len(sources(model)) == 7
    eckart.save(model, None, tmp_path / "a", found)
    again = reload(tmp_path / "a")
    assert sources(again) == sources(model)
    assert not tying.is_tied(again)
    assert torch.equal(logits(again, tiny.tokens()), before)
    assert result.sharing.groups == "all"


def test_what_cannot_be_tied_is_refused(compressed_folder: Path) -> None:
    model = tiny.build("llama-bias-untied")
    with pytest.raises(ConfigError, match="method 'eckart' looks at data: give text"):
        eckart.tie(model)
    with pytest.raises(
        ConfigError, match="method 'asvd' has no common unit for embeddings and head: use eckart"
    ):
        eckart.tie(model, method="asvd", text=__file__, tokenizer=_Letters())
    model.set_output_embeddings(nn.Linear(32, 100, bias=False))
    with pytest.raises(
        ModelError, match="embeddings of 258 x 32 and a head of 100 x 32 cannot be one matrix"
    ):
        eckart.tie(model, method="svd")

    class Odd(nn.Linear):
        pass

    model.set_output_embeddings(Odd(32, 258, bias=False))
    with pytest.raises(ModelError, match="a Embedding and a Odd cannot be fitted: legal are an nn.Embedding"):
        eckart.tie(model, method="svd")
    model.set_output_embeddings(None)
    with pytest.raises(ModelError, match="has no output head with a matrix of its own: nothing to tie"):
        eckart.untie(model)
    factored = tiny.build("llama")
    factored, _ = eckart.compress(factored, rank=4, method="svd", include="embed_tokens")
    with pytest.raises(
        ModelError, match="the embeddings of this LlamaForCausalLM: low-rank .*densify it first"
    ):
        eckart.untie(factored)


class _Letters:
    """As much of a tokenizer as reading a text file needs."""

    bos_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(letter) % 250 for letter in text]}


def test_the_commands(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    apart = run(cli.app, ["untie", str(llama_folder), "--out", str(tmp_path / "apart"), "--json"])
    assert apart.exit_code == 0, apart.output
    assert json.loads(apart.stdout)["done"] == "untied"
    assert torch.equal(
        logits(reload(tmp_path / "apart"), tiny.tokens()), logits(reload(llama_folder), tiny.tokens())
    )
    text = ["--text", str(text_file), "--tokens", "512", "--gradient-tokens", "256", "--seq-len", "64"]
    together = run(cli.app, ["tie", str(tmp_path / "apart"), "--out", str(tmp_path / "together"), *text])
    assert together.exit_code == 0, together.output
    assert "one matrix now" in together.output
    assert "## Embeddings tied" in (tmp_path / "together" / "README.md").read_text()
    shared = [
        "share", str(llama_folder), "--groups", "0-1", "--what", "mlp", "--differences", "2", "--scales",
        "--out", str(tmp_path / "shared"), *text,
    ]  # fmt: skip
    made = run(cli.app, shared)
    assert made.exit_code == 0, made.output
    assert "feed-forward shared by groups 0-1 with differences of rank 2 and scales" in made.output
    assert "written to" in made.output
    values = json.loads((tmp_path / "shared" / "eckart.json").read_text())
    assert values["file_bytes"] == (tmp_path / "shared" / "model.safetensors").stat().st_size
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    spec = config["quantization_config"]["modules"]["model.layers.1.mlp.up_proj"]
    assert spec == {"kind": "shared", "rank": 2, "scaled": True, "source": "model.layers.0.mlp.up_proj"}
    again = run(cli.app, [*shared, "--json"])
    assert again.exit_code == 2
    assert "exists: choose another --out" in again.output
    wrong = run(cli.app, ["share", str(llama_folder), "--groups", "0", "--out", str(tmp_path / "x")])
    assert wrong.exit_code == 2
    assert "a group has two blocks at least" in wrong.output
    assert not (tmp_path / "x").exists()


def test_what_tying_saves_is_vocabulary_times_width() -> None:
    config = transformers.LlamaConfig(
        vocab_size=50_000, hidden_size=4_096, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=32, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _, found = eckart.untie(model)
    assert found.parameters[1] - found.parameters[0] == 204_800_000
    assert found.saved == -4 * 204_800_000
    assert "50,000 x 4,096 = 204,800,000 parameters, 819.2 MB in float32" in str(found)
