"""Make a compressed model run as fast as its sizes allow, in memory: the same function, and the way back.

The folder that it came from stays what it is, and what is saved of a fused model is an ordinary folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import channels, common_pivots, models
from .channels import Channels
from .errors import ModelError
from .factors import FactoredLinear, PivotedLinear
from .joint import JointLinear
from .lean import Lean, LeanPivoted, lean


@dataclass(frozen=True, slots=True)
class Gathers:
    """What became of the pivoted maps of a model.

    Args:
        folded: names of those whose outputs are made in the order that they have.
        left: of those whose outputs are put in order, each by one selection.
    """

    folded: tuple[str, ...]
    left: tuple[str, ...]


def fuse(model: Any, *, joint_pivots: bool = False, bound: float = common_pivots.BOUND) -> Any:
    """Make the low-rank maps of `model` run fast, in place, and return it.

    Products run with nothing around them. What a pivoted map would have to
    put in order is left in the order in which it is made wherever that is exact: the channels of an MLP then
    stand in that order in all its maps. Of two maps that write the channels (gate and up) the second one is
    still put in order, by one selection, unless both have one order: `joint_pivots` gives them that. It takes
    about twice as long as choosing pivots did, and maps are the same but for rounding; without it, parameters
    are only permuted.

    Gradients, hooks, adapters, autocast, torch.compile, saving and loading work as before.

    Args:
        model: compressed; on a dense one nothing changes.
        joint_pivots: choose the pivots of two maps that write the same channels together.
        bound: of the |multipliers| that these may have; beyond, the two keep their own.

    Raises:
        ModelError: `model` is no module, or its weights are not in memory.
        ConfigError: bound <= 1.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"got a {type(model).__name__}: give a model, as eckart.load returns it")
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ModelError(
            "some weights are not in memory (on the device meta): load the model as a whole first"
        )
    unfuse(model)
    moved = {home: _fold(model, home, one, joint_pivots, bound) for home, one in channels.find(model).items()}
    for name, module in _plain(model).items():
        models.replace(model, name, lean(module))
    for home, found in moved.items():
        if found is not None:
            first: Any = model.get_submodule(home).get_submodule(found[2])
            first.moved = found[:2]
    return model


def _plain(model: nn.Module) -> dict[str, FactoredLinear | PivotedLinear | JointLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear | PivotedLinear | JointLinear) and not isinstance(module, Lean)
    }


def _fold(
    model: nn.Module, name: str, found: Channels, joint_pivots: bool, bound: float
) -> tuple[Channels, torch.Tensor, str] | None:
    """Put the channels into the order in which the first pivoted map makes them; return what was moved.

    None where nothing was.
    """
    home = model.get_submodule(name)
    writers = {name: home.get_submodule(name) for name in found.writers}
    pivoted = {name: module for name, module in writers.items() if isinstance(module, PivotedLinear)}
    if not pivoted:
        return None
    several = list(pivoted.values())
    if joint_pivots and len(several) > 1 and all(map(_is_float, several)) and not _in_one_order(several):
        common_pivots.align(several, bound)
    places = torch.argsort(several[0].order.to(torch.int64))
    return (found, places, next(iter(pivoted))) if channels.free(home, found, places) else None


def _is_float(module: PivotedLinear) -> bool:
    return all(type(part) is nn.Linear for part in module.children())


def _in_one_order(modules: list[PivotedLinear]) -> bool:
    return all(torch.equal(module.order, modules[0].order) for module in modules)


def unfuse(model: Any) -> Any:
    """Undo `fuse`, in place, and return `model`: plain modules, and every channel where it was.

    Permuted parameters come back bit for bit. Pivots that were chosen together stay.
    """
    moved: list[tuple[str, Channels, torch.Tensor]] = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, Lean):
            continue
        if isinstance(module, LeanPivoted) and module.moved is not None:
            moved.append((name.rpartition(".")[0], *module.moved))
        models.replace(model, name, module.plain())
    now = channels.find(model) if moved else {}
    for home, before, places in moved:
        if now.get(home) == before:  # a map that was made narrower since has other channels
            channels.move(model.get_submodule(home), before, torch.argsort(places))
    return model


def is_fused(model: nn.Module) -> bool:
    """Tell whether `fuse` changed `model`, and `unfuse` did not since."""
    return any(isinstance(module, Lean) for module in model.modules())


@contextmanager
def unfused(model: Any) -> Iterator[Any]:
    """Have `model` as it was before `fuse` while the context is open."""
    fused = is_fused(model)
    try:
        yield unfuse(model)
    finally:
        if fused:
            fuse(model)


def gathers(model: nn.Module) -> Gathers:
    """Return which pivoted maps of `model` make their outputs in order, and which do not."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, PivotedLinear)}
    straight = {name for name, module in found.items() if isinstance(module, LeanPivoted) and module.straight}
    return Gathers(
        tuple(name for name in found if name in straight), tuple(n for n in found if n not in straight)
    )
