"""Mixtures of experts in a model: lists of equal modules in its blocks, and what chooses among them."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .experts import Experts


def expert_lists(model: nn.Module, blocks: Sequence[str]) -> dict[str, nn.ModuleList]:
    """Return, by name, the lists of equal modules with nn.Linear inside of `blocks`."""
    prefixes = tuple(f"{block}." for block in blocks)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.startswith(prefixes)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
        and any(isinstance(part, nn.Linear) for part in module.modules())
    }


def routers(model: nn.Module, blocks: Sequence[str]) -> set[str]:
    """Return the names of the nn.Linear that choose: beside a list of experts, with an output for each."""
    found: set[str] = set()
    for name, experts in expert_lists(model, blocks).items():
        holder = name.rpartition(".")[0]
        if isinstance(model.get_submodule(holder), Experts):
            holder = holder.rpartition(".")[0]
        for key, module in model.get_submodule(holder).named_children():
            if isinstance(module, nn.Linear) and module.out_features == len(experts):
                found.add(f"{holder}.{key}")
    return found


def active_shares(model: Any, blocks: Sequence[str]) -> dict[str, float]:
    """Return, by the name of each list of experts, the share of them that a token goes to."""
    config = getattr(model, "config", None)
    chosen = None if config is None else getattr(config.get_text_config(), "num_experts_per_tok", None)
    lists = expert_lists(model, blocks) if chosen else {}
    return {name: min(1.0, (chosen or 1) / len(experts)) for name, experts in lists.items()}
