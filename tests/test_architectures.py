"""Every architecture: found by structure, compressed, saved, loaded, equal; and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import eckart
from eckart import ModelError, embeddings, hub, models, skeleton
from eckart.factors import FORMS, Form, LowRank, build
from eckart.linalg import truncated_svd

from . import tiny
from .conftest import Compress, logits, reload

NAMES = list(tiny.ARCHITECTURES)


@pytest.mark.parametrize("name", NAMES)
def test_compresses_saves_and_loads_bit_equal(
    name: str, compress: Compress, tmp_path: Path, tokenizer: Any
) -> None:
    model, result = compress(tiny.build(name))
    assert result.keep_linears <= 0.6
    assert set(models.low_rank_modules(model))
    before = logits(model, tiny.tokens())
    eckart.save(model, tokenizer, tmp_path / "out", result)
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), before)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_targets_are_all_linears_of_the_blocks(name: str) -> None:
    model = tiny.build(name)
    found = {target.name for target in models.targets(model)}
    assert found == {n for n in models.linear_names(model) if ".layers." in n}
    assert not any("lm_head" in n or "embed_out" in n for n in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_full_rank_equals_the_original_to_rounding(name: str, form: Form) -> None:
    model, cut = tiny.build(name, torch.float64), tiny.build(name, torch.float64)
    before = logits(model, tiny.tokens())
    for target in models.targets(model):
        linear = models.find(model, target.name)
        svd = truncated_svd(linear.weight.detach(), min(target.shape))
        low_rank = LowRank(svd.left * svd.values, svd.right)
        models.replace(model, target.name, build(low_rank, form, linear.bias))
        less = LowRank(low_rank.left[:, :-1], low_rank.right[:-1])
        models.replace(cut, target.name, build(less, form, linear.bias))
    tolerance = 1e-10 * float(before.abs().max())
    assert torch.allclose(logits(model, tiny.tokens()), before, atol=tolerance)
    assert not torch.allclose(logits(cut, tiny.tokens()), before, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_densify_gives_a_stock_model_with_the_same_function(
    name: str, compress: Compress, tmp_path: Path
) -> None:
    model, _ = compress(tiny.build(name))
    before = logits(model, tiny.tokens())
    dense = eckart.densify(model)
    assert not models.low_rank_modules(dense)
    assert torch.allclose(logits(dense, tiny.tokens()), before, atol=2e-4 * float(before.abs().max()))
    dense.save_pretrained(tmp_path)
    assert "eckart" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tiny.tokens()), logits(dense, tiny.tokens()))


def test_grouped_query_attention_keeps_its_shapes(compress: Compress) -> None:
    model, _ = compress(tiny.build("llama"), form="factored")
    attention = model.model.layers[0].self_attn
    assert (attention.k_proj.out_features, attention.q_proj.out_features) == (16, 32)


def test_tied_embeddings_stay_tied_and_are_stored_once(compressed_folder: Path) -> None:
    model = reload(compressed_folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for file in compressed_folder.glob("*.safetensors") for name in skeleton.read_shapes(file)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_the_head_can_be_chosen_when_it_is_not_tied(
    compress: Compress, tmp_path: Path, tokenizer: Any
) -> None:
    model, _ = compress(tiny.build("llama-bias-untied"), include=["lm_head", "*.mlp.*"])
    assert "lm_head" in models.low_rank_modules(model)
    eckart.save(model, tokenizer, tmp_path / "out")
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), logits(model, tiny.tokens()))


@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd", "svd-llm", "eckart"])
@pytest.mark.parametrize("chosen", ["embed_tokens", "lm_head", "*"])
def test_a_tied_table_is_factored_once_for_both(
    method: str, chosen: str, compress: Compress, tmp_path: Path, tokenizer: Any
) -> None:
    dense = tiny.build("llama")
    form = {"form": "pivoted"} if method == "eckart" else {}  # mixed would leave the table dense here
    model, result = compress(dense, include=[chosen], method=method, keep=0.7, of="linears", **form)
    assert model.lm_head.codes.weight is model.model.embed_tokens.codes.weight
    assert model.lm_head.up.weight is model.model.embed_tokens.up.weight
    assert result.after.model == models.parameter_count(model)
    before = logits(model, tiny.tokens())
    eckart.save(model, tokenizer, tmp_path / "out", result)
    assert result.after.bytes == hub.weight_bytes(tmp_path / "out")
    again = reload(tmp_path / "out")
    assert torch.equal(logits(again, tiny.tokens()), before)
    assert again.lm_head.codes.weight is again.model.embed_tokens.codes.weight
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(reload(tmp_path / "again"), tiny.tokens()), before)
    stock = eckart.densify(again)
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert torch.allclose(logits(stock, tiny.tokens()), before, atol=2e-4 * float(before.abs().max()))
    stock.save_pretrained(tmp_path / "stock")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert torch.equal(logits(plain, tiny.tokens()), logits(stock, tiny.tokens()))


def test_embeddings_and_head_of_their_own(compress: Compress, tmp_path: Path, tokenizer: Any) -> None:
    model, _ = compress(tiny.build("opt"), include=["embed_tokens"], keep=0.8, of="linears")
    assert set(models.low_rank_modules(model)) == {"model.decoder.embed_tokens", "lm_head"}
    own = {"include": ["embed_tokens", "lm_head"], "allocation": "uniform"}
    model, result = compress(tiny.build("phi"), keep=0.8, of="linears", **own)
    assert [row.form for row in result.modules] == ["factored", "pivoted"]
    eckart.save(model, tokenizer, tmp_path / "out", result)
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), logits(model, tiny.tokens()))


def test_a_tied_table_at_full_rank_is_exact(llama: Any) -> None:
    before = logits(llama.double(), tiny.tokens())
    target = models.targets(llama, ["lm_head"])[0]
    svd = truncated_svd(models.weight(llama, target), min(target.shape))
    table = embeddings.build_embedding(LowRank(svd.left * svd.values, svd.right))
    models.replace(llama, target.name, table)
    models.replace(llama, "lm_head", embeddings.tied_head(table))
    models.tie(llama)
    assert torch.allclose(logits(llama, tiny.tokens()), before, atol=1e-10 * float(before.abs().max()))


def test_weights_shared_otherwise_are_refused() -> None:
    model = tiny.build("llama-bias-untied")
    layers = model.model.layers
    layers[0].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"0.mlp.up_proj shares its weight with .*1.mlp.up_proj"):
        models.targets(model)


def test_include_and_exclude_are_globs(llama: Any) -> None:
    found = [t.name for t in models.targets(llama, ["q_proj", "model.layers.1.*"], ["*.mlp.*"])]
    assert found == [
        "model.layers.0.self_attn.q_proj",
        *(f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"),
    ]


def test_a_pattern_that_matches_nothing_suggests(llama: Any) -> None:
    with pytest.raises(ModelError, match=r"'qproj' matches none .* did you mean q_proj"):
        models.targets(llama, ["qproj"])
    with pytest.raises(ModelError, match="names end in embed_tokens, q_proj, k_proj"):
        models.targets(llama, [], ["zzzzzzzz"])
    with pytest.raises(ModelError, match="no matrix left to treat"):
        models.targets(llama, ["q_proj"], ["*"])


def _config_model(kind: str, **options: Any) -> Any:
    auto = options.pop("auto", AutoModelForCausalLM)
    return auto.from_config(getattr(transformers, kind)(**options))


def test_modules_that_are_not_understood_are_refused_by_name() -> None:
    small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    gpt2 = _config_model("GPT2Config", **small)
    with pytest.raises(ModelError, match=r"not understood: Conv1D \([\d,]+ parameters\)"):
        models.targets(gpt2)
    mixtral = _config_model(
        "MixtralConfig", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"not understood: MixtralExperts"):
        models.targets(mixtral)
    assert models.targets(mixtral, include=["q_proj"])


def test_a_model_without_stacks_has_all_its_linears_treated() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 2)))
    assert [target.name for target in models.targets(plain)] == ["0", "1.0"]
    with pytest.raises(ModelError, match="Sequential keeps matrices .* not understood: none found"):
        models.targets(torch.nn.Sequential(torch.nn.LayerNorm(4)))


def test_what_is_low_rank_already_is_refused(compress: Compress) -> None:
    model, _ = compress(tiny.build("llama"))
    with pytest.raises(ModelError, match="already low-rank"):
        compress(model)
