"""Which tensors of a base and of a fine-tuned model belong to each other: compared before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .checkpoints import Checkpoint

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Pairs:
    """What is compared with what.

    linears: name of each nn.Linear -> its weight's name, the same in both.
    others: name of the tensor in the tuned model -> its name in the base.
    modules: names of the modules that hold the others -> all tensors of that module.
    tied: names of a tensor that the tuned model stores once -> the names under which it is used as well.
    """

    linears: Mapping[str, str]
    others: Mapping[str, str]
    modules: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, str]


def pair(base: Checkpoint, tuned: Checkpoint, skeleton: Any, tuned_config: Any) -> Pairs:
    """Return the pairs of tensors of `base` and `tuned`, given the base's model without weights.

    Raises:
        ModelError: names, shapes, vocabularies or kinds of numbers differ; the message lists all of it.
    """
    first: dict[int, str] = {}
    own = {
        name: first.setdefault(id(tensor), name)
        for name, tensor in skeleton.state_dict(keep_vars=True).items()
    }
    unnamed = [name for name in own.values() if name not in base.shapes]
    if unnamed:
        raise ModelError(
            f"{base.source} does not hold every tensor of a {type(skeleton).__name__} ({unnamed[0]} is "
            "missing): the folder is incomplete, or of another kind than its config.json says"
        )
    both_tied = bool(getattr(tuned_config.get_text_config(), "tie_word_embeddings", False))
    names = {name: own.get(name, name) for name in tuned.shapes}
    # A copy that a file holds of a tied tensor is not a second one.
    copies = {name for name, canonical in names.items() if both_tied and canonical != name}
    names = {name: canonical for name, canonical in names.items() if name not in copies}
    _refuse(base, tuned, names, own, skeleton, tuned_config)
    return _pairs(names, own, skeleton)


def _pairs(names: Mapping[str, str], own: Mapping[str, str], skeleton: nn.Module) -> Pairs:
    # Plain and narrow nn.Linear alike; a weight that is tied to the embeddings goes with them.
    linears = {
        name: f"{name}.weight"
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and names.get(f"{name}.weight") == f"{name}.weight"
    }
    others = {name: canonical for name, canonical in names.items() if name not in set(linears.values())}
    holders = {name.rpartition(".")[0] for name in others} - set(linears)
    modules = {
        name: tuple(f"{name}.{key}" for key in module.state_dict())
        for name, module in skeleton.named_modules(remove_duplicate=False)
        if name in holders
    }
    tied = {canonical: name for name, canonical in own.items() if canonical != name and name not in names}
    return Pairs(linears, others, modules, tied)


def _refuse(
    base: Checkpoint,
    tuned: Checkpoint,
    names: Mapping[str, str],
    own: Mapping[str, str],
    skeleton: Any,
    tuned_config: Any,
) -> None:
    wrong = []
    sizes = [config.get_text_config().vocab_size for config in (skeleton.config, tuned_config)]
    if sizes[0] != sizes[1]:
        wrong.append(
            f"vocabularies of {sizes[0]:,} and {sizes[1]:,} tokens (an adapter cannot add tokens: "
            f"resize_token_embeddings({max(sizes)}) the smaller model, save it, and give that)"
        )
    canonical = {own.get(name, name) for name in base.shapes}
    wrong += _some("only in the base", sorted(canonical - set(names.values())))
    wrong += _some(
        "only in the tuned", sorted(name for name, pair in names.items() if pair not in base.shapes)
    )
    shared = {name: other for name, other in names.items() if other in base.shapes}
    wrong += _some("of different shapes", [
        f"{name} {_by(base.shapes[other])} and {_by(tuned.shapes[name])}"
        for name, other in shared.items() if base.shapes[other] != tuned.shapes[name]
    ])  # fmt: skip
    wrong += _some("not floating-point", [
        f"{name} {kind}" for name, other in shared.items()
        for kind in (base.dtypes[other], tuned.dtypes[name])
        if name in own and not (isinstance(kind, torch.dtype) and kind.is_floating_point)
    ])  # fmt: skip
    if wrong:
        raise ModelError(f"{base.source} and {tuned.source} do not fit: {'; '.join(wrong)}")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _some(what: str, found: list[str]) -> list[str]:
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{what}: {', '.join(found[:_SHOWN])}{more}"]
