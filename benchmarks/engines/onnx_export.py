"""A folder as one ONNX file with a flat KV cache, for onnxruntime and OpenVINO.

Inputs: input_ids (1, n), keep (k,): the positions whose logits are wanted, past_key_i and past_value_i
(1, heads, p, size). Outputs: logits (1, k, vocabulary), present_key_i and present_value_i.
"""

from pathlib import Path
from typing import Any

import torch
from harness import Options, Session, kept_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache


class Flat(nn.Module):
    """A causal model whose cache is a list of tensors: keys and values in turn."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, keep: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
        made = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        present = (part for layer in made.past_key_values.layers for part in (layer.keys, layer.values))
        return (made.logits, *present)


def load(folder: Path) -> Any:
    # onnxruntime and OpenVINO both decode faster from eager attention than from decomposed SDPA.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def no_past(config: Any, length: int = 0) -> list[Tensor]:
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    return [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]


def cache_names(layers: int) -> list[str]:
    return [f"{part}_{index}" for index in range(layers) for part in ("key", "value")]


def export(folder: Path, options: Options) -> Path:
    """Return the ONNX file of `folder`, made once."""
    target = kept_file(folder, options, "float32.onnx")
    if target.is_file():
        return target
    model = load(folder)
    names = cache_names(model.config.num_hidden_layers)
    past = no_past(model.config, length=5)
    free = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        Flat(model),
        (torch.ones(1, 3, dtype=torch.int64), torch.arange(2), past),
        dynamo=True,
        dynamic_shapes=({1: free}, {0: free}, [{2: free} for _ in past]),
        input_names=["input_ids", "keep", *(f"past_{name}" for name in names)],
        output_names=["logits", *(f"present_{name}" for name in names)],
        verbose=False,
    )
    assert program is not None
    scratch = target.parent / "partial"
    scratch.mkdir(exist_ok=True)
    program.save(scratch / target.name, external_data=True)
    for path in sorted(scratch.iterdir(), reverse=True):  # the graph last: it says that all is there
        path.replace(target.parent / path.name)
    scratch.rmdir()
    return target


@torch.no_grad()
def difference(folder: Path, session: Session, window: Tensor) -> dict[str, float]:
    """Compare with PyTorch in float32 on a window (n,), fed in three pieces to go through the cache."""
    expected = load(folder)(input_ids=window[None]).logits[0]
    session.reset()
    half = len(window) // 2
    pieces = (window[:half], window[half:-1], window[-1:])
    found = torch.cat([session.feed(piece, every=True) for piece in pieces])
    return {
        "largest_logit_difference": float((found - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "same_first_choice": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }
