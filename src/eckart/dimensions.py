"""Hidden dimensions of a model that can be made narrower: found by structure, verified by behaviour.

A dimension is written by some linears of a module and read by the last one: the channels of an MLP,
the key-value groups of an attention. No name of a model or of a matrix is looked at.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import models
from .experts import Expert
from .factors import NarrowLinear, PartialLinear
from .fused import SplitLinear
from .models import Target

Kind = Literal["mlp", "attention"]
_SAME = 0.02
_EFFECT = 1e-6


@dataclass(frozen=True, slots=True)
class Dimension:
    """A hidden dimension of `units` equal parts, each of which can be left out.

    writers: linears whose rows belong to the units, with how many times all units stand one after
        another in those rows (a fused gate and up: 2).
    reader: the linear whose columns belong to the units.
    """

    name: str
    kind: Kind
    writers: tuple[tuple[str, int], ...]
    reader: str
    units: int

    @property
    def members(self) -> tuple[str, ...]:
        """The names of all its linears."""
        return (*(name for name, _ in self.writers), self.reader)


def head_count(config: Any, name: str = "num_attention_heads") -> int:
    """Return how many heads every attention has by a config of transformers; 0 where it tells no number.

    Stages of one model may have numbers of their own.
    """
    if config is None:
        return 0
    told = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(told, name, None)
    return found if isinstance(found, int) else 0


def find(model: nn.Module, targets: Sequence[Target]) -> list[Dimension]:
    """Return the dimensions of which every linear is among `targets`, by the shapes alone.

    `holds` tells whether one of them is what its shapes suggest.
    """
    found = [
        _mlp(name, group) or _attention(model, name, group) for name, group in homes(model, targets).items()
    ]
    return [dimension for dimension in found if dimension is not None]


def homes(model: nn.Module, targets: Sequence[Target]) -> dict[str, list[Target]]:
    """Return, by name, the modules of which every linear is among `targets`, with these."""
    groups: dict[str, list[Target]] = {}
    siblings = Counter(_home(model, name) for name in models.linear_names(model))
    for target in targets:
        if not target.embedding:
            groups.setdefault(_home(model, target.name), []).append(target)
    return {name: group for name, group in groups.items() if len(group) == siblings[name]}


def _home(model: nn.Module, name: str) -> str:
    """Return what the linear `name` is in; for a part of a fused one, what that is in."""
    home = name.rpartition(".")[0]
    return home.rpartition(".")[0] if isinstance(model.get_submodule(home), SplitLinear) else home


def _mlp(name: str, group: Sequence[Target]) -> Dimension | None:
    """One linear reads what one or two others write, or one that is twice as tall."""
    for reader in reversed(group):
        outputs, inputs = reader.shape
        others = [target for target in group if target is not reader]
        copies = [target.shape[0] // inputs for target in others]
        whole = all(target.shape == (count * inputs, outputs) for target, count in zip(others, copies))
        if whole and copies in ([1], [2], [1, 1]) and inputs != outputs:
            writers = tuple((target.name, count) for target, count in zip(others, copies, strict=True))
            return Dimension(name, "mlp", writers, reader.name, inputs)
    return None


def _attention(model: Any, name: str, group: Sequence[Target]) -> Dimension | None:
    """Queries, keys and values (or one matrix of all three) and the output that reads the heads."""
    if not isinstance(model, PreTrainedModel):
        return None
    heads = head_count(model.config) or 1
    units = head_count(model.config, "num_key_value_heads") or heads
    reader, writers = heads_of(group) or (group[-1], [])
    sides = [reader.shape[1], *(target.shape[0] for target in writers)]
    if units < 2 or len(writers) not in (1, 3) or any(side % units for side in sides):
        return None
    return Dimension(name, "attention", tuple((target.name, 1) for target in writers), reader.name, units)


def heads_of(group: Sequence[Target]) -> tuple[Target, list[Target]] | None:
    """Return what reads the heads of an attention, the last that can, and the others, which write them."""
    for reader in reversed(group):
        writers = [target for target in group if target is not reader]
        if writers and all(target.shape[1] == reader.shape[0] for target in writers):
            return reader, writers
    return None


def indices(size: int, units: int, copies: int, kept: Tensor) -> Tensor:
    """Return which of `size` rows or columns belong to the units `kept`, ascending.

    They stand as (copies, units, block).
    """
    places = torch.arange(size, device=kept.device).view(copies, units, -1)
    return places[:, kept].flatten()


@torch.no_grad()
def narrowed(model: nn.Module, dimension: Dimension, kept: Tensor) -> dict[str, NarrowLinear]:
    """Return the linears of `dimension` with the units `kept` alone (ascending), nothing re-fitted."""
    made = {}
    for name, copies in dimension.writers:
        linear = models.find(model, name)
        rows = indices(linear.out_features, dimension.units, copies, kept)
        made[name] = NarrowLinear.slice(linear, rows, None, copies)
    linear = models.find(model, dimension.reader)
    columns = indices(linear.in_features, dimension.units, 1, kept)
    made[dimension.reader] = NarrowLinear.slice(linear, None, columns)
    return made


def verified(
    model: Any, dimensions: Sequence[Dimension], tried: Callable[[Any, Dimension], bool] | None = None
) -> list[Dimension]:
    """Return the `dimensions` that are what their shapes suggest; one of each build is tried.

    Leaving units out must do exactly what zeroing the columns that read them does: then nothing in
    between mixes the units (a norm would), and nothing else reads them.

    Args:
        model: of which all or a part is in memory.
        dimensions: to try.
        tried: what tells of one whether it `holds`; default: that, on the whole model.
    """
    known: dict[object, bool] = {}
    kept = []
    for dimension in dimensions:
        build = build_of(model, dimension)
        if build not in known:
            known[build] = (tried or holds)(model, dimension)
        if known[build]:
            kept.append(dimension)
    return kept


def build_of(model: nn.Module, dimension: Dimension) -> object:
    """Return what dimensions have in common that need to be tried only once."""
    inner = tuple((name.removeprefix(dimension.name), models.find(model, name).weight.shape)
                  for name in dimension.members)  # fmt: skip
    return type(model.get_submodule(dimension.name)), dimension.units, inner


@torch.no_grad()
def holds(model: Any, dimension: Dimension, outputs: Callable[[], Tensor] | None = None) -> bool:
    """Tell whether leaving out the lighter half of the units equals not reading their columns.

    `outputs` returns what to look at; default: the logits of the model. An expert is looked at alone.
    """
    holder = model.get_submodule(dimension.name)
    if isinstance(holder, Expert):  # the tokens of a probe may all go to others
        outputs = holder.probe()
    outputs = outputs or partial(models.probe_logits, model, models.probe(model))
    reader = models.find(model, dimension.reader)
    writer = models.find(model, dimension.writers[0][0])
    copies = dimension.writers[0][1]
    sizes = writer.weight.detach().float().square().sum(1).view(copies, dimension.units, -1).sum((0, 2))
    kept = sizes.argsort(descending=True)[: (dimension.units + 1) // 2].sort().values
    columns = indices(reader.in_features, dimension.units, 1, kept)
    whole = outputs()
    with swapped(model, {dimension.reader: PartialLinear.slice(reader, "columns", columns)}):
        expected = outputs()
    try:
        with swapped(model, narrowed(model, dimension, kept)):
            found = outputs()
    except (RuntimeError, ValueError):  # a shape that is written down somewhere
        return False
    return agrees(found, expected, whole)


def agrees(found: Tensor, expected: Tensor, whole: Tensor) -> bool:
    """Tell whether two changes of a model did the same to its logits `whole`, and did something."""
    effect = float((expected - whole).norm())
    return effect > _EFFECT * float(whole.norm()) and float((found - expected).norm()) < _SAME * effect


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `modules` into `model` while the context is open."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            models.replace(model, name, module)
        yield
    finally:
        for name, module in before.items():
            models.replace(model, name, module)
