"""The channels between the linear maps of an MLP in another order: the same function, exactly.

Some maps write the channels, one reads them. Their order is free where nothing else knows it, which is
tried on the module that they are in.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .factors import FactoredLinear, NarrowLinear, PartialLinear, PivotedLinear, Replacement
from .quant.storage import Rows
from .quant.stored import StoredLinear

_MAPS = (nn.Linear, Replacement)
_PROBE = (1, 5)
_SAME = 0.02
_EFFECT = 1e-6


@dataclass(frozen=True, slots=True)
class Channels:
    """`count` channels inside of a module: the maps in it that write them, and the one that reads them."""

    writers: tuple[str, ...]
    reader: str
    count: int

    @property
    def ends(self) -> tuple[tuple[str, int], ...]:
        """The maps, each with its side of the channels: 0 for rows, 1 for columns."""
        return (*((name, 0) for name in self.writers), (self.reader, 1))


def find(model: nn.Module) -> dict[str, Channels]:
    """Return, by the name of their module, what has the shapes of channels and can be moved.

    One or two maps alike, and one the other way round. Left out is what cannot be stored in another order
    without loss: a weight that other modules have too, adapters, corrections, storages whose scales go along
    the channels, and channels for which something else of the module has a parameter each.
    """
    homes: dict[str, list[str]] = {}
    for name in _maps(model):
        homes.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    owners = Counter(
        id(parameter)
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in module.parameters(recurse=False)
    )
    found = {home: _of(model.get_submodule(home), names) for home, names in homes.items()}
    return {
        home: one for home, one in found.items() if one and _movable(model.get_submodule(home), one, owners)
    }


def _maps(model: nn.Module) -> list[str]:
    """Return the names of the linear maps, but not of the parts that one is made of."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, _MAPS) and not (names and name.startswith(f"{names[-1]}.")):
            names.append(name)
    return names


def _of(home: nn.Module, names: Sequence[str]) -> Channels | None:
    shapes = {name: _shape(home.get_submodule(name)) for name in names}
    for reader in reversed(names):
        others = [name for name in names if name != reader]
        outputs, inputs = shapes[reader]
        same = all(shapes[name] == (inputs, outputs) for name in others)
        if same and len(others) in (1, 2) and inputs != outputs:
            return Channels(tuple(others), reader, inputs)
    return None


def _shape(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features


def _movable(home: nn.Module, channels: Channels, owners: Mapping[int, int]) -> bool:
    members = {name: home.get_submodule(name) for name, _ in channels.ends}
    inside = {id(own) for module in members.values() for own in module.parameters()}
    return (
        all(_has_end(members[name], dim) for name, dim in channels.ends)
        and all(owners[own] == 1 for own in inside)
        and all(channels.count not in own.shape for own in home.parameters() if id(own) not in inside)
    )


def _has_end(module: nn.Module, dim: int) -> bool:
    if isinstance(module, PivotedLinear) and dim == 0:
        return True
    if isinstance(module, PartialLinear) and dim == _side(module):
        return True
    leaf = _leaf(module, dim)
    if isinstance(leaf, StoredLinear):
        return isinstance(leaf.storage.scales, Rows)
    return type(leaf) in (nn.Linear, NarrowLinear)


def _side(module: PartialLinear) -> int:
    return 0 if module.side == "rows" else 1


def _leaf(module: nn.Module, dim: int) -> nn.Module:
    """Return the part of `module` whose rows (0) or columns (1) are those of the map."""
    if isinstance(module, FactoredLinear):
        return module.up if dim == 0 else module.down
    if isinstance(module, PivotedLinear):
        return module.pivot
    return module.inner if isinstance(module, PartialLinear) else module


@torch.no_grad()
def move(home: nn.Module, channels: Channels, places: Tensor) -> None:
    """Put channel `places[i]` at i, in place, in all maps: `places (count,)` is a permutation."""
    for name, dim in channels.ends:
        _move(home.get_submodule(name), dim, places)


def _move(module: nn.Module, dim: int, places: Tensor) -> None:
    if isinstance(module, PivotedLinear) and dim == 0:
        module.order.copy_(module.order[places.to(module.order.device)])
        return
    if isinstance(module, PartialLinear) and dim == _side(module):
        new = torch.argsort(places).to(module.places)
        module.places.copy_(new[module.places.to(torch.int64)])
        return
    leaf: Any = _leaf(module, dim)
    tensors = leaf.tensors().values() if isinstance(leaf, StoredLinear) else [leaf.weight]
    for tensor in tensors:
        if dim < tensor.ndim:  # the scales of rows have no columns
            _permute(tensor, dim, places)
    if dim == 0 and leaf.bias is not None:
        _permute(leaf.bias, 0, places)


def _permute(tensor: Tensor, dim: int, places: Tensor) -> None:
    tensor.copy_(tensor.index_select(dim, places.to(tensor.device)))


@torch.no_grad()
def free(home: nn.Module, channels: Channels, places: Tensor) -> bool:
    """Move `channels` to `places` if what `home` computes stays what it is; else leave them. Tell which.

    `home` is run alone, on random numbers; moving only the maps that write must change what it computes, or
    the trial would say nothing.
    """
    back = torch.argsort(places)
    reader = home.get_submodule(channels.reader)
    with _evaluated(home):
        whole = _outputs(home, channels)
        if whole is None:
            return False
        move(home, channels, places)
        found = _outputs(home, channels)
        _move(reader, 1, back)
        wrong = _outputs(home, channels)
        _move(reader, 1, places)
    if found is not None and wrong is not None and _agree(found, wrong, whole):
        return True
    move(home, channels, back)
    return False


def _agree(found: Tensor, wrong: Tensor, whole: Tensor) -> bool:
    effect = float((wrong - whole).norm())
    return effect > _EFFECT * float(whole.norm()) and float((found - whole).norm()) < _SAME * effect


def _outputs(home: nn.Module, channels: Channels) -> Tensor | None:
    """Return all that `home` gives for random numbers as one vector, None if it does not take them."""
    first: Any = home.get_submodule(channels.writers[0])
    floats = [part for part in home.parameters() if part.is_floating_point()]
    like = floats[0] if floats else next(home.buffers()).new_empty(0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(*_PROBE, first.in_features, generator=generator, device="cpu").to(like)
    try:
        made = home(inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None
    parts = [made] if isinstance(made, Tensor) else made if isinstance(made, tuple) else []
    values = [part.double().flatten() for part in parts if isinstance(part, Tensor)]
    return torch.cat(values) if values else None


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode
