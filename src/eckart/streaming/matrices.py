"""The matrices of a model one at a time, from its weight files: what is not asked for is never read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import hub, kinds, models
from ..errors import ModelError
from ..models import Target
from .shards import Shards
from .stream import release


def skeleton(source: str, *, task: str, trust_remote_code: bool = False) -> Any:
    """Return the model of `source` in float32 with everything on the meta device, its modules as stored.

    Raises:
        ModelError: it cannot be had, or is stored in a quantised form.
    """
    model = hub.skeleton(source, task=task, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.to(torch.float32).eval().requires_grad_(False)


def each(model: Any, shards: Shards, found: Sequence[Target]) -> Iterator[tuple[Target, Tensor]]:
    """Yield every target with its matrix (m, n) in float32, read from `shards` and given back afterwards.

    In memory is one parameter of the files at a time: a matrix, or the matrices of all experts of a layer
    where they are one tensor. Where files hold several parameters as one, it is those of a block.

    Args:
        model: a skeleton (see `skeleton`).
        shards: the weight files.
        found: targets of a copy of `model` that is unfolded (eckart.kinds.unfold).

    Raises:
        StoreError: a file cannot be read.
        ModelError: a weight does not come out of the files.
    """
    holders: dict[str, list[Target]] = {}
    for target in found:
        holders.setdefault(_holder(model, target.name), []).append(target)
    for name, inside in holders.items():
        yield from _of_holder(model, shards, name, inside)


def _holder(model: nn.Module, name: str) -> str:
    """Return the name of the module as stored whose parameters the matrix called `name` is of."""
    known = dict(model.named_modules())
    parts = name.split(".")
    while parts and ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts)


def _of_holder(
    model: Any, shards: Shards, name: str, inside: Sequence[Target]
) -> Iterator[tuple[Target, Tensor]]:
    holder, left = model.get_submodule(name), {target.name: target for target in inside}
    wanted = [key for key, own in holder.named_parameters(recurse=False) if own.ndim > 1]
    for key in wanted:
        with _loaded(model, shards, getattr(holder, key)):
            yield from _ready(holder, name, left)
    if left:  # the files hold it together with others, under the name of one of them
        block = models.owner(name, models.all_blocks(model)) or name.rpartition(".")[0]
        shards.load(model, [key for key in model.state_dict() if key.startswith(f"{block}.")])
        yield from _ready(holder, name, left)
        release(model.get_submodule(block))
    if left:
        raise ModelError(f"{next(iter(left))} does not come out of the weight files: load the model instead")


@contextmanager
def _loaded(model: Any, shards: Shards, parameter: nn.Parameter) -> Iterator[None]:
    """Hold one parameter of `model` in memory, under all the names that it has, while the context is open."""
    names = [name for name, own in model.named_parameters(remove_duplicate=False) if own is parameter]
    shards.load(model, names)
    if len(names) > 1:  # files have it under one of them
        model.tie_weights()
    try:
        yield
    finally:
        for name in names:
            release(model.get_submodule(name.rpartition(".")[0]), recurse=False)
        if len(names) > 1:
            model.tie_weights()


def _ready(holder: nn.Module, name: str, left: dict[str, Target]) -> Iterator[tuple[Target, Tensor]]:
    """Yield what of `left` is in memory, and take it out."""
    shown = kinds.unfold(holder)  # views; `holder` itself stays in the model as it is
    for target in list(left.values()):
        inner = target.name.removeprefix(name).lstrip(".")
        module: Any = shown.get_submodule(inner) if inner else shown
        if module.weight.device.type != "meta":
            del left[target.name]
            weight: Tensor = module.weight.detach()
            yield target, weight.T if target.embedding else weight


def unfolded(model: nn.Module) -> nn.Module:
    """Return a copy of the skeleton `model` whose matrices are all nn.Linear."""
    return kinds.unfold(kinds.on_meta(model))
