"""Which projections read the same input, and whether that can pass a common right factor once: tried out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .dimensions import swapped
from .experts import Expert
from .factors import Form
from .fused import SplitLinear
from .joint import JointLinear, first_argument
from .models import Target

_SAME = 0.02
_NO_HOLDERS = (SplitLinear, Expert)


@dataclass(frozen=True, slots=True)
class Reading:
    """Projections inside one module that read the same tensor.

    members: their names, in the order of the model.
    once: the module can be handed the joint product instead of its input: it runs once for all of them.
        Else each computes it for itself, and only storage is shared.
    forms: those that the stack of them may have.
    """

    members: tuple[str, ...]
    once: bool
    forms: tuple[Form, ...] = ("factored",)

    @property
    def name(self) -> str:
        """Return what its decomposition is called."""
        return key(self.members)

    def form(self, wanted: Form | None) -> Form | None:
        """Return the form that the stack has where its projections by themselves would have `wanted`."""
        return wanted if wanted is None or wanted in self.forms else "factored"


def key(members: Sequence[str]) -> str:
    """Return what the decomposition of the stack of `members` is called."""
    return "+".join(members)


@torch.no_grad()
def find(model: nn.Module, targets: Sequence[Target], outputs: Callable[[], Tensor]) -> list[Reading]:
    """Return the readings among `targets`, by the tensors that they are handed when the model runs.

    Queries, keys and values, gate and up, keys and values of a cross-attention, in any number and of any
    heights; no name is looked at. Parts of a matrix that is one already, and experts, are left out.

    Args:
        model: with plain nn.Linear.
        targets: the treated matrices.
        outputs: runs the model on a little input and returns what comes out.
    """
    found: list[Reading] = []
    known: dict[object, bool] = {}
    for holder, members, first in _groups(model, targets, outputs):
        biased = {models.find(model, name).bias is not None for name in members}
        build = _build(model, holder, members)
        if first and build not in known:
            known[build] = _runs_once(model, members, outputs)
        once = first and known[build]
        both = once and len(biased) == 1
        found.append(Reading(members, once, ("factored", "pivoted") if both else ("factored",)))
    return found


def _groups(
    model: nn.Module, targets: Sequence[Target], outputs: Callable[[], Tensor]
) -> list[tuple[str, tuple[str, ...], bool]]:
    """Return what holds projections of one tensor, their names, and whether the tensor is its first input."""
    names = [target.name for target in targets if not target.embedding and target.ranked]
    holders = {name: name.rpartition(".")[0] for name in names}
    reads: dict[str, list[Any]] = {}
    handles = []

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reads.setdefault(name, []).append(first_argument(module, args, kwargs))

    for name in dict.fromkeys([*names, *holders.values()]):
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(watch, name), with_kwargs=True))
    try:
        outputs()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        held = model.get_submodule(holders[name])
        # What runs twice may be handed two things.
        if held is not model and len(reads.get(name, [])) == 1 and not isinstance(held, _NO_HOLDERS):
            groups.setdefault((holders[name], id(reads[name][0])), []).append(name)
    return [
        (holder, tuple(members), len(reads.get(holder, [])) == 1 and id(reads[holder][0]) == tensor)
        for (holder, tensor), members in groups.items()
        if len(members) > 1
    ]


def _build(model: nn.Module, holder: str, members: Sequence[str]) -> object:
    """Return what readings have in common that need to be tried only once."""
    inner = tuple((name.removeprefix(holder), models.find(model, name).weight.shape) for name in members)
    return type(model.get_submodule(holder)), inner


def _runs_once(model: nn.Module, members: Sequence[str], outputs: Callable[[], Tensor]) -> bool:
    """Tell whether the module computes the same from z = Q x, one longer than x, with Q^T undone in each.

    Whatever else looks at its input finds another width, and other values.
    """
    whole = outputs()
    linears = [models.find(model, name) for name in members]
    width, like = linears[0].in_features, linears[0].weight
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(width + 1, width, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(random).Q.to(like.device)
    down = nn.Linear(width, width + 1, bias=False, device=like.device, dtype=like.dtype)
    down.weight.copy_(turn)
    made: dict[str, nn.Module] = {}
    for name, linear in zip(members, linears, strict=True):
        module = JointLinear(down, linear.out_features, bias=linear.bias is not None)
        assert module.up is not None
        module.up.to(device=like.device, dtype=like.dtype)
        module.up.weight.copy_(linear.weight.double() @ turn.T)
        if linear.bias is not None:
            module.up.bias.copy_(linear.bias)
        made[name] = module
    try:
        with swapped(model, made):
            found = outputs()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):  # another use, a fixed width
        return False
    return float((found - whole).norm()) < _SAME * float(whole.norm())
