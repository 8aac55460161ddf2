"""Stock models: one width for all blocks, so that a config of the same architecture can say it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from . import kinds, models, rebuild
from .choices import Budget, Choice, dense, narrow
from .dimensions import Dimension, Kind, narrowed
from .errors import ModelError
from .factors import Side
from .models import Target
from .ranks import legal_widths
from .recipe import Recipe

Widths = dict[str, int]
"""Units to keep of the dimensions of each kind; the kinds that are not named stay whole."""


def choose(
    recipe: Recipe,
    budget: Budget,
    model: Any,
    targets: Sequence[Target],
    dimensions: Sequence[Dimension],
    losses: Mapping[str, Tensor] | None = None,
    blocks: Mapping[str, float] | None = None,
) -> list[Choice]:
    """Return what becomes of every target: the same widths in all blocks, of the least estimated loss.

    Every number of key-value groups and of blocks to drop is tried with the widest MLP that fits.

    Raises:
        RankError: the budget cannot be reached.
        ModelError: the blocks do not all have an MLP of one width among the targets, or the config has
            no entry for it.
    """
    check(model, dimensions)
    groups = _sayable_groups(model, dimensions)
    best: tuple[float, list[Choice]] | None = None
    least = None
    for candidates in _candidates(recipe, dimensions, groups, blocks or {}):
        for widths, dropped in candidates:
            choices = _choices(targets, dimensions, widths, dropped)
            used = budget.spent(choices)
            if budget.limit is None or used <= budget.limit:
                loss = _loss(dimensions, widths, dropped, losses or {}, blocks or {})
                best = (loss, choices) if best is None or loss < best[0] else best
                break
            least = used if least is None else min(used, least)
    if best is None:
        raise budget.unreachable(least or 0)
    return best[1]


def check(model: Any, dimensions: Sequence[Dimension]) -> None:
    """Raise ModelError unless the MLP of every block, all of one width, is among `dimensions`."""
    names = models.block_names(model)
    found = [dimension for dimension in dimensions if dimension.kind == "mlp"]
    inside = {models.owner(mlp.reader, names) for mlp in found}
    if len(inside) < len(names) or len({mlp.units for mlp in found}) > 1:
        raise ModelError(
            f"stock: {len(inside)} of {len(names)} blocks of {type(model).__name__} have an MLP to make "
            "narrower, and a config has one width for all: leave out --stock, or what excludes matrices"
        )
    if not sayable(model, dimensions, "mlp"):
        raise ModelError(_cannot_say(model))


def _candidates(
    recipe: Recipe, dimensions: Sequence[Dimension], groups: Sequence[int], blocks: Mapping[str, float]
) -> Iterator[list[tuple[Widths, list[str]]]]:
    """Yield for every number of groups and of dropped blocks the MLP widths, the widest first."""
    units = {dimension.kind: dimension.units for dimension in dimensions}
    cheapest = sorted(blocks, key=lambda name: blocks[name])
    for count in range(len(cheapest) + 1):
        for kept in groups:
            attention = {"attention": kept} if kept else {}
            legal = [units["mlp"], *reversed(legal_widths(units["mlp"], recipe.step()))]
            yield [({"mlp": width} | attention, cheapest[:count]) for width in legal]


def _choices(
    targets: Sequence[Target], dimensions: Sequence[Dimension], widths: Widths, dropped: Sequence[str]
) -> list[Choice]:
    members = {name: dimension for dimension in dimensions for name in dimension.members}
    choices = []
    for target in targets:
        dimension = members.get(target.name)
        if models.owner(target.name, dropped):
            choices.append(Choice(target, "dropped", 0))
        elif dimension is None:
            choices.append(dense(target))
        else:
            width = widths.get(dimension.kind, dimension.units)
            side: Side = "columns" if target.name == dimension.reader else "rows"
            choices.append(narrow(target, width, dimension.units, side))
    return choices


def _loss(
    dimensions: Sequence[Dimension],
    widths: Widths,
    dropped: Sequence[str],
    losses: Mapping[str, Tensor],
    blocks: Mapping[str, float],
) -> float:
    total = sum(blocks[name] for name in dropped)
    for dimension in dimensions:
        if dimension.name in losses and not models.owner(dimension.name, dropped):
            total += float(losses[dimension.name][widths.get(dimension.kind, dimension.units)])
    return total


def build(
    model: Any, choices: Sequence[Choice], dimensions: Sequence[Dimension], dropped: Sequence[str]
) -> Any:
    """Return the ordinary model that is `model`, with its narrow linears, without the blocks `dropped`.

    It is rebuilt of the stock modules, narrower, and unfolded as `model` was.

    Raises:
        ModelError: no entry of the config says how wide it is, or it computes something else.
    """
    members = {name: dimension.kind for dimension in dimensions for name in dimension.members}
    narrow = [choice for choice in choices if choice.form == "narrow"]
    widths: Widths = {members[choice.target.name]: choice.rank for choice in narrow}
    kinds.fold(model, narrower=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in rebuild.state(model, dropped).items()}
    config = restated(model, rebuild.shallower(model, dropped), shapes, dimensions, widths)
    if config is None:
        raise ModelError(_cannot_say(model))
    return kinds.unfold(rebuild.build(model, config, dropped))


def _cannot_say(model: Any) -> str:
    return f"the config of {type(model).__name__} has no entry for the width of its MLPs: leave out --stock"


def restated(
    model: Any,
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    dimensions: Sequence[Dimension],
    widths: Widths,
) -> Any | None:
    """Return `config` with `widths` in it, so that it makes a model of these `shapes`; None if it cannot."""
    units = {dimension.kind: dimension.units for dimension in dimensions}
    config = copy.deepcopy(config)
    if widths.get("attention", 0) != units.get("attention", 0) and "attention" in widths:
        _fewer_heads(config.get_text_config(), widths["attention"], units["attention"])
    candidates = [config]
    if "mlp" in widths and widths["mlp"] != units["mlp"]:
        candidates = list(_with_entry(config, units["mlp"], widths["mlp"]))
    return next((found for found in candidates if rebuild.fits(type(model), found, shapes)), None)


def _sayable_groups(model: Any, dimensions: Sequence[Dimension]) -> list[int]:
    """Return the numbers of key-value groups that the config can say, falling; [0]: no choice."""
    units = {dimension.units for dimension in dimensions if dimension.kind == "attention"}
    everywhere = sum(d.kind == "attention" for d in dimensions) == sum(d.kind == "mlp" for d in dimensions)
    if len(units) != 1 or not everywhere:
        return [0]
    (whole,) = units
    return [whole, *(n for n in range(whole - 1, 0, -1) if sayable(model, dimensions, "attention", n))]


def sayable(model: Any, dimensions: Sequence[Dimension], kind: Kind, width: int = 1) -> bool:
    """Tell whether the config of `model` can say that the dimensions of `kind` are one unit wide."""
    inside = [dimension for dimension in dimensions if dimension.kind == kind]
    if not inside:
        return False
    small = kinds.on_meta(model)
    for dimension in inside:
        for name, module in narrowed(small, dimension, torch.arange(width)).items():
            models.replace(small, name, module)
    kinds.fold(small, narrower=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    return restated(model, model.config, shapes, dimensions, {kind: width}) is not None


def _fewer_heads(config: Any, kept: int, units: int) -> None:
    heads = config.num_attention_heads
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // heads
    config.num_attention_heads = heads * kept // units
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = kept


def _with_entry(config: Any, value: int, new: int) -> Iterator[Any]:
    """Yield copies of `config`, each with one entry that may be the width set to `new`."""
    values = vars(config.get_text_config())
    same = [key for key, found in values.items() if found == value and not isinstance(found, bool)]
    lists = [key for key, found in values.items() if type(found) is list and found == [value] * len(found)]
    unset = [key for key, found in values.items() if found is None and not key.startswith("_")]
    for key in [*same, *lists, *unset]:
        copied = copy.deepcopy(config)
        inner = copied.get_text_config()
        try:
            setattr(inner, key, [new] * len(values[key]) if key in lists else new)
        except StrictDataclassError:  # an entry of another type
            continue
        yield copied
