"""A GGUF file goes in: a tiny one is written here with the gguf library."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eckart
from eckart import hub, models

from . import tiny
from .conftest import logits, reload

gguf = pytest.importorskip("gguf")
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Order the rows of q and k as llama.cpp does: the halves of a rotary pair side by side."""
    pairs = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2)
    rows: np.ndarray[Any, Any] = np.ascontiguousarray(pairs).reshape(weight.shape)
    return rows


@pytest.fixture
def file(tmp_path: Path, tokenizer: Any) -> Path:
    """The tiny Llama as a float32 GGUF."""
    model = tiny.build("llama")
    config = model.config
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    # Two bytes that the text lacks make room for merges: some readers take a list of one for its item.
    vocabulary[-2:] = [("th", len(vocabulary) - 2), ("he", len(vocabulary) - 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token, _ in vocabulary])
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in models.state_tensors(model).items():
        writer.add_tensor(*_renamed(name, tensor.detach().numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _renamed(name: str, value: np.ndarray[Any, Any], config: Any) -> tuple[str, np.ndarray[Any, Any]]:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[
            name
        ], value
    _, _, layer, rest = name.split(".", 3)
    part = rest.removesuffix(".weight")
    if part.endswith("q_proj"):
        value = _interleaved(value, config.num_attention_heads)
    if part.endswith("k_proj"):
        value = _interleaved(value, config.num_key_value_heads)
    return f"blk.{layer}.{_NAMES[part]}.weight", value


def test_a_gguf_loads_as_the_model_it_holds(file: Path) -> None:
    loaded = hub.load(str(file))
    assert (loaded.stored, loaded.bytes) == (torch.bfloat16, file.stat().st_size)
    assert torch.allclose(
        logits(loaded.model, tiny.tokens()), logits(tiny.build("llama"), tiny.tokens()), atol=1e-4
    )
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_a_gguf_compresses_to_a_bfloat16_folder(file: Path, text_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": 512, "gradient_tokens": 512, "seq_len": 64}
    model, result = eckart.compress(file, keep=0.6, of="linears", text=text_file, **options)
    assert result.dtype == "bfloat16"
    assert result.source_bytes == file.stat().st_size
    eckart.save(model, None, tmp_path / "out", result)
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), logits(model, tiny.tokens()))
    assert "gguf" not in (tmp_path / "out" / "config.json").read_text()


def test_a_gguf_needs_no_weights_for_its_plan(file: Path) -> None:
    model = hub.skeleton(str(file))
    assert next(model.parameters()).device.type == "meta"
    assert [t.name for t in models.targets(model)] == [t.name for t in models.targets(tiny.build("llama"))]
    assert models.targets(model, ["lm_head"])[0].head == "lm_head"
