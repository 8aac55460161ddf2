"""Adapters that plain PEFT makes on tiny models, none of whose tensors are what they start as."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from eckart import hub, models, plugin, windows
from eckart.adapt.reading import reading as read_text
from eckart.factors import Form

from . import tiny, wards

RANK = 4
QUIET = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT says of tied embeddings that merging may be wrong, and of biases that shapes are.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape:UserWarning"),
]


@dataclass(frozen=True)
class Variant:
    """An adapter of PEFT: on which tiny model, with which configuration."""

    architecture: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    kind: Callable[..., Any] = peft.LoraConfig

    def config(self) -> Any:
        return self.kind(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **self.options})


def lora(architecture: str = "llama", **options: Any) -> Variant:
    return Variant(architecture, {"r": RANK, "lora_alpha": 6, **options})


VARIANTS: dict[str, Variant] = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lora(
        rank_pattern={"q_proj": 2, r".*layers\.1\..*\.up_proj": 7, "^model.layers.0.mlp.down_proj": 1},
        alpha_pattern={"v_proj": 3},
    ),
    "dora": lora(use_dora=True),
    "lora bias": lora("llama-bias-untied", lora_bias=True),
    "bias all": lora("llama-bias-untied", bias="all"),
    "bias lora_only": lora("llama-bias-untied", bias="lora_only", target_modules=["q_proj", "up_proj"]),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "untied head": lora("llama-bias-untied", target_modules=["lm_head", "embed_tokens"]),
    "whole head": lora(modules_to_save=["lm_head"]),
    "tied embeddings": lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "tied whole": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "whole norms": lora(modules_to_save=["input_layernorm", "norm"]),
    "one layer": lora(layers_to_transform=[1], target_modules=["q_proj", "down_proj"]),
    "fused": lora("phi3"),
    "adalora": Variant(
        options={"init_r": 6, "target_r": 3, "lora_alpha": 10, "total_step": 100}, kind=peft.AdaLoraConfig
    ),
}


@torch.no_grad()
def wrap(model: Any, config: Any, name: str = "default") -> Any:
    """Put an adapter on a copy of `model` and move all of its tensors."""
    made = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
    generator = torch.Generator().manual_seed(11)
    for key, parameter in made.named_parameters():
        if parameter.requires_grad:
            change = torch.randn(parameter.shape, generator=generator)
            # Factors get large enough to be seen, what starts from the base stays near it.
            parameter.add_(change * (0.15 if "lora_" in key and "magnitude" not in key else 0.05))
    return made.eval()


def save(made: Any, folder: Path) -> Path:
    """Save an adapter as PEFT does, without asking the hub about the base."""
    made.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load(model: Any, folder: Path) -> Any:
    """Load an adapter on a copy of `model`, as a user of PEFT does."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def base(variant: Variant) -> Any:
    """Return the model that `variant` is for."""
    return tiny.build(variant.architecture)


def differ(own: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference relative to the largest entry."""
    return float((own - other).abs().max() / other.abs().max())


def compressed(folder: Path, dense: Any, tokenizer: Any, rank: int = 8, form: Form = "factored") -> Path:
    """Write `dense` with all matrices of its blocks at `rank`, as eckart stores it."""
    model = wards.cut(dense, rank, form)
    plugin.mark(model)
    folder.mkdir(parents=True, exist_ok=True)
    hub.write(folder, model, tokenizer)
    return folder


def reading(text: Path, tokenizer: Any, tokens: int, eval_tokens: int, seq_len: int) -> windows.TextWindows:
    """Return the windows of `text` that a run sees."""
    recipe = read_text((str(text),), tokens=tokens, eval_tokens=eval_tokens, seq_len=seq_len)
    assert recipe is not None
    return windows.read(recipe, tokenizer, [])


@torch.no_grad()
def inputs(model: Any, names: list[str], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the nn.Linear `names` read on `rows`, (tokens, n) each in float64."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        models.find(model, name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].flatten(0, 1).double()})
        )
        for name in names
    ]
    model(input_ids=rows)
    for handle in handles:
        handle.remove()
    return seen
