"""Tiny random models of the architectures that must work, from their transformers configs."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCABULARY = 258
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED = _COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED | {"tie_word_embeddings": True}),
    "llama-bias-untied": ("LlamaConfig", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 32}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi": ("PhiConfig", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
    "stablelm": ("StableLmConfig", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "gpt-neox": ("GPTNeoXConfig", _COMMON | {"intermediate_size": 64}),
    "opt": ("OPTConfig", _COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random model in evaluation mode, with weights large enough that logits differ."""
    kind, options = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**options | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            elif parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def tokens(count: int = 24) -> torch.Tensor:
    """Return two rows of token ids."""
    return torch.randint(2, VOCABULARY, (2, count), generator=torch.Generator().manual_seed(3))
