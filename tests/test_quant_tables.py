"""Factored embeddings in few bits: rounding in their metric, tied heads, folders, training."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import eckart
from eckart import StoreError, hub, models, stores
from eckart.embeddings import FactoredEmbedding, FactoredHead, build_embedding
from eckart.factors import LowRank
from eckart.quant import storage, straight, tables
from eckart.quant.stored import StoredEmbedding, StoredHead, StoredLinear, StoredReturn

from . import conftest, tiny
from .conftest import Compress, reload


def logits(model: Any) -> Tensor:
    return conftest.logits(model, tiny.tokens())


def moment(size: int) -> Tensor:
    samples = torch.randn(3 * size, size) @ (torch.eye(size) + torch.randn(size, size) / 4)
    return samples.T @ samples / len(samples)


def table(count: int, dim: int, rank: int) -> FactoredEmbedding:
    scales = torch.logspace(0, -1, rank)
    return build_embedding(LowRank(torch.randn(dim, rank) * scales, torch.randn(rank, count))).float()


def dense(codes: Tensor, up: Tensor) -> Tensor:
    return codes.double() @ up.double().T


@given(st.integers(40, 90), st.integers(12, 30), st.integers(4, 12), st.sampled_from(["int8", "nf4", "int3"]))
@hypothesis_settings(max_examples=15, deadline=None, derandomize=True)
def test_the_error_in_the_metric_is_below_that_of_rounding_both_to_nearest(
    count: int, dim: int, rank: int, name: str
) -> None:
    torch.manual_seed(count + dim)
    own, kind = table(count, dim, rank), storage.get(name)
    rows, tokens = moment(dim), torch.rand(count) + 0.01
    codes, up = tables.quantise(own, kind, rows, tokens)
    assert codes.codes.shape == (count, rank)
    assert up.codes.shape == (dim, rank)
    whole = dense(own.codes.weight.detach(), own.up.weight.detach())

    def loss(found: Tensor) -> float:
        error = found - whole
        return float((tokens[:, None] * (error @ rows.double()) * error).sum())

    plain = [part.weight.detach() for part in (own.codes, own.up)]
    nearest = loss(dense(*(kind.grid(part).rounded(part) for part in plain)))
    assert loss(dense(codes.values(), up.values())) < nearest


def test_without_a_metric_the_error_is_small() -> None:
    torch.manual_seed(0)
    own = table(70, 20, 6)
    codes, up = tables.quantise(own, storage.get("int8"), None, None)
    whole = dense(own.codes.weight.detach(), own.up.weight.detach())
    assert (dense(codes.values(), up.values()) - whole).norm() < 0.02 * whole.norm()


@pytest.fixture
def factored(compress: Compress) -> Any:
    """A tiny Llama of which the embeddings are factored, in float."""
    model, _ = compress(tiny.build("llama"), include="embed_tokens", rank=12, method="svd-llm")
    assert isinstance(model.model.embed_tokens, FactoredEmbedding)
    return model


def stored(model: Any, kind: str, text_file: Path, tokenizer: Any) -> tuple[Any, Any]:
    options: dict[str, Any] = {"tokens": 1024, "gradient_tokens": 512, "seq_len": 64}
    return eckart.quantise(
        model, "float", embeddings=kind, text=text_file, tokenizer=tokenizer, **options
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["int8", "nf4-dq", "int4"])
def test_a_factored_model_is_stored_later(
    kind: str, factored: Any, text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    before, count, flops = (
        logits(factored),
        models.parameter_count(factored),
        models.flops_per_token(factored),
    )
    model, result = stored(factored, kind, text_file, tokenizer)
    assert models.parameter_count(model) == count == result.after.model
    assert models.flops_per_token(model) == flops
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding.codes, StoredEmbedding)
    assert isinstance(embedding.up, StoredLinear)
    assert isinstance(head, FactoredHead)
    assert isinstance(head.codes, StoredHead)
    assert isinstance(head.up, StoredReturn)
    assert head.codes.table is embedding.codes
    assert head.up.table is embedding.up
    if kind == "int8":
        assert (logits(model) - before).norm() < 0.05 * before.norm()
    eckart.save(model, None, tmp_path / "one", result)
    assert hub.weight_bytes(tmp_path / "one") == result.after.bytes
    again = reload(tmp_path / "one")
    assert torch.equal(logits(again), logits(model))
    eckart.save(again, None, tmp_path / "two")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not [key for key in first if key.startswith("lm_head.") and first[key].numel()]


@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "opt"])
def test_compressed_and_stored_at_once(name: str, compress: Compress, tmp_path: Path) -> None:
    chosen = ("embed_tokens", "q_proj")
    model, result = compress(tiny.build(name), include=chosen, rank=12, method="io-svd", storage="int8")
    assert isinstance(model.get_input_embeddings(), FactoredEmbedding)
    eckart.save(model, None, tmp_path / "out", result)
    assert hub.weight_bytes(tmp_path / "out") == result.after.bytes
    assert torch.equal(logits(reload(tmp_path / "out")), logits(model))


def test_copies_and_casts_read_their_own_table(factored: Any, text_file: Path, tokenizer: Any) -> None:
    model, _ = stored(factored, "int8", text_file, tokenizer)
    twin = copy.deepcopy(model)
    assert twin.lm_head.up.table is twin.model.embed_tokens.up
    with torch.no_grad():
        twin.model.embed_tokens.up.codes.zero_()
    assert not logits(twin).any()
    assert logits(model).any()
    half = models.cast(copy.deepcopy(model), torch.bfloat16)
    change = logits(half).float() - logits(model)
    assert change.norm() < 0.1 * logits(model).norm()


def test_densified_it_is_a_stock_model(
    factored: Any, text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model, _ = stored(factored, "nf4", text_file, tokenizer)
    expected = logits(model)
    plain = eckart.densify(copy.deepcopy(model))
    assert not stores.stored(plain)
    assert not models.low_rank_modules(plain)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.allclose(logits(plain), expected, atol=1e-4 * float(expected.abs().max()))
    plain.save_pretrained(tmp_path / "plain")
    assert torch.allclose(logits(reload(tmp_path / "plain")), logits(plain))


def test_training_reaches_the_table_through_the_head(factored: Any, text_file: Path, tokenizer: Any) -> None:
    model, _ = stored(factored, "nf4", text_file, tokenizer)
    before = logits(model)
    hidden = torch.randn(3, model.config.hidden_size)
    scores = model.lm_head(hidden)
    with straight.through(model):
        model.requires_grad_(True)
        assert torch.allclose(logits(model), before, atol=1e-4)
        model.lm_head(hidden).square().sum().backward()
        up, codes = model.model.embed_tokens.up, model.model.embed_tokens.codes
        for part in (up, codes):
            assert part.weight.grad is not None
            assert part.weight.grad.any()
        with torch.no_grad():
            up.weight.mul_(-1)
    # The levels of nf4 are not symmetric, so that the sign of the scores changes and little else.
    assert (model.lm_head(hidden) + scores).norm() < 0.2 * scores.norm()
    assert model.lm_head.up.table is model.model.embed_tokens.up


def test_a_head_that_is_declared_for_another_table_is_refused(
    factored: Any, text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model, _ = stored(factored, "int8", text_file, tokenizer)
    eckart.save(model, None, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["storage"]["lm_head.up"] = {"table": "model.layers.0.mlp.up_proj"}
    path.write_text(json.dumps(config))
    with pytest.raises(StoreError, match="head of the stored table .* the folder is damaged or mixed"):
        reload(tmp_path / "out")
