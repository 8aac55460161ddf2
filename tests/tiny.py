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
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
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
    "gpt2": ("GPT2Config", _COMMON),
    "bloom": ("BloomConfig", _COMMON),
    "falcon": ("FalconConfig", _COMMON | {"bias": True, "multi_query": False}),
    "falcon-multi-query": ("FalconConfig", _COMMON),
    "falcon-new-decoder": ("FalconConfig", _COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mixtral": ("MixtralConfig", _GROUPED | _EXPERTS),
    "qwen2-moe": ("Qwen2MoeConfig", _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen3-moe": ("Qwen3MoeConfig", _GROUPED | _EXPERTS | {"head_dim": 16}),
    "gpt-oss": ("GptOssConfig", _GROUPED | _EXPERTS | {"head_dim": 16}),
    "granite-moe": ("GraniteMoeConfig", _GROUPED | _EXPERTS),
    "olmoe": ("OlmoeConfig", _GROUPED | _EXPERTS),
    "deepseek-v3": (
        "DeepseekV3Config",
        _GROUPED
        | _EXPERTS
        | _LATENT
        | {
            "v_head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
}
LINEAR = (
    "llama", "llama-bias-untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "stablelm",
    "olmo2", "gpt-neox", "opt",
)  # fmt: skip
"""Those whose matrices are nn.Linear as they come."""
FUSED = ("phi3", "gpt-neox", "gpt2", "bloom", "falcon", "falcon-multi-query", "falcon-new-decoder", "mixtral")


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random model in evaluation mode, with weights large enough that logits differ."""
    kind, options = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**options | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if dtype is torch.float64:  # the kernels of experts have no such product
        model.config._experts_implementation = "eager"
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
