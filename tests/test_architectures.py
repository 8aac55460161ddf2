"""Every architecture: found by structure, compressed, saved, loaded, equal; and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import eckart
from eckart import ModelError, embeddings, fused, hub, kinds, models, skeleton, splitting
from eckart.factors import FORMS, Form, LowRank, build
from eckart.linalg import truncated_svd
from eckart.recipe import Split

from . import tiny
from .conftest import Compress, logits, reload

NAMES = list(tiny.ARCHITECTURES)
SPLITS: list[tuple[str, Split]] = [
    *((name, "none") for name in NAMES),
    *((name, "fused") for name in tiny.FUSED),
]


def aligned(model: Any) -> Any:
    """Return a copy of a loaded model in memory of its own: kernels sum unaligned files otherwise."""
    return copy.deepcopy(model)


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_compresses_loads_bit_equal_and_is_stock_again_when_dense(
    name: str, split: Split, compress: Compress, tmp_path: Path, tokenizer: Any
) -> None:
    dense = tiny.build(name)
    stock = [(part, type(module)) for part, module in dense.named_modules()]
    model, result = compress(dense, split=split)
    assert result.keep_linears <= 0.6
    assert set(models.low_rank_modules(model))
    assert any(isinstance(part, fused.SplitLinear) for part in model.modules()) == (split == "fused")
    before = logits(model, tiny.tokens())
    eckart.save(model, tokenizer, tmp_path / "out", result)
    assert result.after.bytes == hub.weight_bytes(tmp_path / "out")
    again = aligned(reload(tmp_path / "out"))
    assert torch.equal(logits(again, tiny.tokens()), before)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(aligned(reload(tmp_path / "again")), tiny.tokens()), before)

    dense = eckart.densify(again)
    assert [(part, type(module)) for part, module in dense.named_modules()] == stock
    assert torch.allclose(logits(dense, tiny.tokens()), before, atol=2e-4 * float(before.abs().max()))
    dense.save_pretrained(tmp_path / "dense")
    assert "eckart" not in (tmp_path / "dense" / "config.json").read_text()
    plain = aligned(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    assert torch.equal(logits(plain, tiny.tokens()), logits(dense, tiny.tokens()))


@pytest.mark.parametrize("name", NAMES)
def test_the_default_targets_are_all_linears_of_the_blocks(name: str) -> None:
    model = kinds.unfold(tiny.build(name))
    found = {target.name for target in models.targets(model)}
    assert found == {n for n in models.linear_names(model) if ".layers." in n or ".h." in n}
    assert not any("lm_head" in n or "embed_out" in n for n in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_full_rank_equals_the_original_to_rounding(name: str, split: Split, form: Form) -> None:
    model, cut = tiny.build(name, torch.float64), tiny.build(name, torch.float64)
    before = logits(model, tiny.tokens())
    for one in (model, cut):
        assert not splitting.unfold(one, split == "fused")
    for target in models.targets(model):
        linear = models.find(model, target.name)
        svd = truncated_svd(linear.weight.detach(), min(target.shape))
        low_rank = LowRank(svd.left * svd.values, svd.right)
        models.replace(model, target.name, build(low_rank, form, linear.bias))
        kept = max(1, len(svd.values) - 1)
        less = LowRank(low_rank.left[:, :kept], low_rank.right[:kept])
        models.replace(cut, target.name, build(less, form, linear.bias))
    tolerance = 1e-10 * float(before.abs().max())
    assert torch.allclose(logits(model, tiny.tokens()), before, atol=tolerance)
    assert not torch.allclose(logits(cut, tiny.tokens()), before, atol=tolerance)


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


class Louder(MixtralExperts):  # type: ignore[misc]
    """Looks like experts that are understood and computes something else."""

    def forward(self, *args: Any) -> Any:
        """Return twice as much."""
        return 2 * MixtralExperts.forward(self, *args)


class Unlike(torch.nn.Linear):
    """Looks like a linear map and computes something else."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map `inputs` and add one."""
        return super().forward(inputs) + 1


def test_modules_that_are_not_understood_are_refused_by_name(compress: Compress) -> None:
    mixtral = tiny.build("mixtral")
    with pytest.raises(ModelError, match=r"not understood: MixtralExperts \([\d,]+ parameters\)"):
        models.targets(mixtral)  # not unfolded
    for layer in mixtral.model.layers:
        layer.mlp.experts.__class__ = Louder
    with pytest.raises(ModelError, match=r"not understood: Louder \([\d,]+ parameters\)"):
        compress(mixtral)
    assert models.targets(mixtral, include=["q_proj"])
    neox = tiny.build("gpt-neox")
    neox.gpt_neox.layers[0].mlp.dense_h_to_4h.__class__ = Unlike
    with pytest.raises(ModelError, match=r"not understood: Unlike \([\d,]+ parameters\)"):
        compress(neox)


def test_a_refused_model_stays_as_it_was(compress: Compress) -> None:
    for name in ("gpt2", "mixtral"):
        model = tiny.build(name)
        before = [(name, type(module)) for name, module in model.named_modules()]
        values = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ModelError, match="matches none"):
            compress(model, include=["nothing_like_it"], split="fused")
        assert [(name, type(module)) for name, module in model.named_modules()] == before
        assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())


def test_a_model_without_stacks_has_all_its_linears_treated() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 2)))
    assert [target.name for target in models.targets(plain)] == ["0", "1.0"]
    with pytest.raises(ModelError, match="Sequential keeps matrices .* not understood: none found"):
        models.targets(torch.nn.Sequential(torch.nn.LayerNorm(4)))


def test_what_is_low_rank_already_is_refused(compress: Compress) -> None:
    model, _ = compress(tiny.build("llama"))
    with pytest.raises(ModelError, match="already low-rank"):
        compress(model)
