"""More or fewer tokens: what resize_token_embeddings does to a compressed model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eckart
from eckart import ModelError, models
from eckart.embeddings import FactoredEmbedding, FactoredHead
from eckart.factors import FactoredLinear, PivotedLinear

from . import others, tiny
from .conftest import Compress, logits, reload

WIDER, NARROWER = tiny.VOCABULARY + 7, tiny.VOCABULARY - 8
TREATED: dict[str, dict[str, Any]] = {
    "blocks": {},
    "tied": {"include": ["embed_tokens"], "keep": 0.8},
    "untied-factored": {"include": ["embed_tokens", "lm_head"], "keep": 0.8, "form": "factored"},
    "untied-pivoted": {"include": ["embed_tokens", "lm_head"], "keep": 0.8, "form": "pivoted"},
    "head-only": {"include": ["lm_head"], "keep": 0.8, "form": "pivoted"},
}


def made(kind: str, compress: Compress) -> Any:
    name = "phi" if kind.startswith(("untied", "head")) else "llama"
    options = {"of": "linears", "keep": 0.6, "allocation": "uniform", "dtype": "float32"} | TREATED[kind]
    model, _ = compress(tiny.build(name), **options)
    return model


def old_tokens() -> torch.Tensor:
    return tiny.tokens() % NARROWER


@pytest.mark.parametrize("kind", TREATED)
def test_old_tokens_stay_and_new_ones_are_the_mean(kind: str, compress: Compress, tmp_path: Path) -> None:
    model = made(kind, compress)
    before = logits(model, old_tokens())
    table = model.get_input_embeddings()
    ids = torch.arange(tiny.VOCABULARY)
    mean = table(ids).detach().double().mean(0)
    model.resize_token_embeddings(WIDER)
    after = logits(model, old_tokens())
    assert after.shape[-1] == WIDER == model.config.vocab_size == models.vocabulary(model)
    assert torch.equal(model.get_input_embeddings()(ids), table(ids))
    exact = 1e-5 * float(before.abs().max())
    assert torch.allclose(after[..., : tiny.VOCABULARY], before, atol=exact)
    new = model.get_input_embeddings()(torch.tensor([WIDER - 1]))[0].detach()
    spread = 0.05 if kind in ("blocks", "head-only") else 1e-5  # transformers draws around the mean
    assert float((new - mean).norm()) < spread * float(mean.norm()) + spread
    if kind != "blocks":
        wanted = before.mean(-1)
        assert torch.allclose(after[..., -1], wanted, atol=1e-4 * float(before.abs().max()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path), old_tokens()), after)
    assert reload(tmp_path).config.vocab_size == WIDER


@pytest.mark.parametrize("kind", TREATED)
def test_fewer_tokens(kind: str, compress: Compress, tmp_path: Path) -> None:
    model = made(kind, compress)
    before = logits(model, old_tokens())
    model.resize_token_embeddings(NARROWER)
    after = logits(model, old_tokens())
    assert torch.allclose(after, before[..., :NARROWER], atol=1e-4 * float(before.abs().max()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path), old_tokens()), after)


def test_tied_factors_stay_tied_and_train(compress: Compress, tmp_path: Path) -> None:
    model = made("tied", compress)
    assert isinstance(model.get_input_embeddings(), FactoredEmbedding)
    model.resize_token_embeddings(WIDER)
    table, head = model.get_input_embeddings(), model.lm_head
    assert isinstance(head, FactoredHead)
    assert head.codes.weight is table.codes.weight
    assert models.parameter_count(model) == sum(p.numel() for p in model.parameters())
    ids = torch.full((1, 4), WIDER - 1)
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = table.codes.weight.grad
    assert isinstance(gradient, torch.Tensor)
    assert float(gradient[WIDER - 1].abs().max()) > 0
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    again.resize_token_embeddings(WIDER + 5)  # a loaded model knows how, too
    assert logits(again, old_tokens()).shape[-1] == WIDER + 5
    stock = eckart.densify(again)
    assert stock.resize_token_embeddings(WIDER + 6).num_embeddings == WIDER + 6
    assert type(stock.get_input_embeddings()) is nn.Embedding
    assert stock.lm_head.weight is stock.model.embed_tokens.weight


def test_heads_of_other_forms_are_what_they_were(compress: Compress) -> None:
    for kind, form in (("untied-factored", FactoredLinear), ("untied-pivoted", PivotedLinear)):
        model = made(kind, compress)
        rank, bias = model.lm_head.rank, model.lm_head.dense_bias()
        model.resize_token_embeddings(WIDER)
        assert isinstance(model.lm_head, form)
        assert (model.lm_head.rank, model.lm_head.out_features) == (rank, WIDER)
        grown = model.lm_head.dense_bias()
        assert grown is not None
        assert torch.allclose(grown[: len(bias)], bias, atol=1e-6)
        assert float((grown[-1] - bias.mean()).abs()) < 1e-5
        assert float(bias.abs().max()) > 0.01


def test_a_multiple_and_a_copy(compress: Compress) -> None:
    model = made("tied", compress)
    twin = copy.deepcopy(model)
    twin.resize_token_embeddings(WIDER, pad_to_multiple_of=64)
    assert twin.get_input_embeddings().num_embeddings == 320
    assert model.get_input_embeddings().num_embeddings == tiny.VOCABULARY
    assert model.config.vocab_size == tiny.VOCABULARY


def test_what_cannot_be_resized_says_what_to_do(compress: Compress) -> None:
    stored, _ = compress(tiny.build("llama"), keep=0.8, storage="int8")
    with pytest.raises(ModelError, match="stored in few bits: .* eckart.densify it, resize, and compress"):
        stored.resize_token_embeddings(WIDER)
    model = made("tied", compress)
    with pytest.raises(ModelError, match="mean_resizing=False"):
        model.resize_token_embeddings(WIDER, mean_resizing=False)
    with pytest.raises(ModelError, match="3 tokens are fewer than the rank"):
        model.resize_token_embeddings(3)
    options: dict[str, Any] = {"include": ["word_embeddings"], "keep": 0.8, "of": "linears"}
    bert, _ = eckart.compress(others.build("bert"), batches=others.batches("bert"), **options)
    with pytest.raises(ModelError, match="BertForMaskedLM resizes more than its embeddings"):
        bert.resize_token_embeddings(others.VOCABULARY + 1)


def test_other_models_with_plain_tables_resize_as_ever(tmp_path: Path) -> None:
    for name in ("bert", "t5"):
        model, _ = eckart.compress(others.build(name), batches=others.batches(name), keep=0.6, of="linears")
        model.resize_token_embeddings(others.VOCABULARY + 3)
        model.save_pretrained(tmp_path / name)
        again = type(model).from_pretrained(tmp_path / name)
        assert again.get_input_embeddings().num_embeddings == others.VOCABULARY + 3
