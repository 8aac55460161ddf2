"""Which linear maps of a model an adapter goes on: found by structure, inside compressed modules as well."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from .. import models, stores
from ..errors import ModelError


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear map by name: nn.Linear, those inside compressed modules, quantised ones.

    Factors that several modules share, right factors and those of tied embeddings, are left out: an
    adapter on one of them would be missing in the others where the adapter is loaded by others than eckart.
    """
    uses = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    compressed = models.low_rank_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not (uses[id(module.weight)] > 1 and models.owner(name, compressed))
    }


def names(model: Any, targets: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """Return the names of the linear maps to adapt, in the order of the model.

    Args:
        model: a causal language model, compressed or not.
        targets: globs on names, whole or from a dot on; a compressed module stands for the linear maps
            inside it, so `q_proj` does what it says on a factored q_proj. Default: all in the blocks.
        exclude: globs on what to leave out.

    Raises:
        ModelError: the model is stored in few bits, a pattern matches nothing (with what is close to it),
            the blocks have no linear maps, or nothing is left.
    """
    if stores.stored(model):
        raise ModelError(
            "the model is stored in few bits, which adapters cannot be put on: tune the model that it was "
            "stored from (--method qlora trains on four bits), and store the result"
        )
    found = list(linears(model))
    compressed = models.low_rank_modules(model)
    owners = {name: models.owner(name, compressed) or name for name in found}
    for patterns in (targets, exclude):
        models.check_patterns(list(dict.fromkeys([*found, *owners.values()])), patterns)
    blocks = models.block_names(model)

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(models.match_one(one, patterns) is not None for one in (name, owners[name]))

    chosen = [name for name in found if (matches(name, targets) if targets else models.owner(name, blocks))]
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has no linear map in its blocks: name what it has with --targets"
        )
    left = [name for name in chosen if not matches(name, exclude)]
    if not left:
        raise ModelError(f"no linear map left to adapt: exclude {list(exclude)} removes all {len(chosen)}")
    return left


def shapes(model: nn.Module, chosen: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return (m, n) of each of `chosen`, whatever its weights are stored as."""
    found = linears(model)
    return {name: (found[name].out_features, found[name].in_features) for name in chosen}
