"""Which matrices of consecutive blocks may share a basis (Wang et al. 2024, arXiv:2410.03765)."""

from collections.abc import Sequence

from torch import nn

from . import models
from .dimensions import Dimension
from .errors import ModelError
from .models import Target


def bases(
    model: nn.Module, found: Sequence[Target], dimensions: Sequence[Dimension], layers: int
) -> list[tuple[str, ...]]:
    """Return groups of matrices of the same name and shape in `layers` consecutive blocks.

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
