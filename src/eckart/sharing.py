"""Which matrices of several blocks may share a basis, or be one."""

from collections.abc import Mapping, Sequence

from torch import nn

from . import models
from .dimensions import Dimension, find
from .errors import ModelError
from .groups import Sharing
from .models import Target


def bases(
    model: nn.Module, found: Sequence[Target], dimensions: Sequence[Dimension], layers: int
) -> list[tuple[str, ...]]:
    """Return groups of matrices of the same name and shape in `layers` consecutive blocks, to share a basis.

    Wang et al. 2024, arXiv:2410.03765.

    Those that read a hidden dimension of their own (the outputs of attentions and of MLPs) are left out:
    their inputs have nothing in common.

    Raises:
        ModelError: no matrix has a twin.
    """
    names = models.block_names(model)
    readers = {dimension.reader for dimension in dimensions}
    shapes = {target.name: target.shape for target in found if target.name not in readers}
    groups: list[tuple[str, ...]] = []
    for start in range(0, len(names), layers):
        chunk = names[start : start + layers]
        first = [name for name in shapes if models.owner(name, chunk[:1])]
        for name in first:
            twins = [name.replace(chunk[0], block, 1) for block in chunk]
            if len(twins) > 1 and all(shapes.get(twin) == shapes[name] for twin in twins):
                groups.append(tuple(twins))
    if not groups:
        raise ModelError(
            f"no two of the {len(names)} blocks have matrices that could share a basis: use form factored"
        )
    return groups


def twins(model: nn.Module, sharing: Sharing, exclude: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Return groups of matrices, one of each block, that are to be one: `sharing` says which.

    What belongs to the feed-forward is found by its shapes (eckart.dimensions); `attention` is the rest.

    Raises:
        ConfigError: a block that there is not.
        ModelError: a matrix has no twin of its shape, or there is none to share.
    """
    names = models.block_names(model)
    found = models.targets(model, exclude=exclude)
    dense = models.targets(model)
    forward = {
        name for dimension in find(model, dense) if dimension.kind == "mlp" for name in dimension.members
    }
    shapes = {target.name: target.shape for target in found}
    kept = {
        name for name in shapes if sharing.what == "blocks" or (name in forward) == (sharing.what == "mlp")
    }
    groups = []
    for places in sharing.blocks(len(names)):
        chunk = [names[place] for place in places]
        for name in [name for name in shapes if name in kept and models.owner(name, chunk)]:
            own = str(models.owner(name, chunk))
            group = [f"{block}.{name.removeprefix(f'{own}.')}" for block in chunk]
            _check_twins(group, shapes)
            if own == chunk[0]:
                groups.append(tuple(group))
    if not groups:
        raise ModelError(
            f"the blocks of {type(model).__name__} have nothing to share of their {sharing.what}: what "
            "'blocks' takes every matrix"
        )
    return groups


def _check_twins(group: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> None:
    sizes = {name: "{} x {}".format(*shapes[name]) if name in shapes else "not there" for name in group}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} is {size}" for name, size in sizes.items())
        raise ModelError(
            f"matrices that share must have one shape: {listed}; take blocks that are alike, or leave the "
            "matrix out with --exclude"
        )
