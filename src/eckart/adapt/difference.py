"""The difference of two models, tensor by tensor: how large, and how low-rank."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NotFinite
from ..spectra import rank_at, singular_values
from . import checkpoints
from .checkpoints import Checkpoint

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Changed:
    """One tensor that is in both models.

    `change` is ||B - A||_F / ||A||_F (infinite where A is zero and B is not). Of matrices that differ:
    the largest singular value of the difference, its stable rank ||.||_F^2 / ||.||_2^2, and how many
    terms hold 50, 90 and 99 % of the squared spectrum; None for others.
    """

    name: str
    shape: tuple[int, ...]
    change: float
    norm: float
    spectral: float | None = None
    stable_rank: float | None = None
    ranks: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """All tensors: those in both, by name, those in one of them only, those of other shapes."""

    first: str
    second: str
    tensors: list[Changed]
    only_first: list[str]
    only_second: list[str]
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @property
    def equal(self) -> bool:
        """Whether the two hold the same numbers."""
        others = self.only_first or self.only_second or self.reshaped
        return not others and all(one.norm == 0 for one in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values; an infinite change is None."""
        values = asdict(self)
        for row in values["tensors"]:
            row["change"] = row["change"] if row["change"] < float("inf") else None
        return values

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from ..render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from .cards import difference_table

        return difference_table(self)


def diff(
    first: str | Path,
    second: str | Path,
    *,
    trust_remote_code: bool = False,
    watch: Progress | None = None,
) -> Difference:
    """Compare two models tensor by tensor, one pair of tensors in memory at a time.

    Compressed folders and GGUF files are loaded and compared as the dense maps that they are.

    Raises:
        ModelError: a model cannot be read.
        StoreError: a file is damaged.
        NotFinite: a tensor is NaN or infinite.
    """
    own, other = (
        checkpoints.open_checkpoint(source, trust_remote_code=trust_remote_code) for source in (first, second)
    )
    common = [name for name in own.shapes if name in other.shapes]
    same = [name for name in common if own.shapes[name] == other.shapes[name]]
    return Difference(
        first=str(first),
        second=str(second),
        tensors=_changes(own, other, same, watch),
        only_first=sorted(set(own.shapes) - set(other.shapes)),
        only_second=sorted(set(other.shapes) - set(own.shapes)),
        reshaped=[(name, own.shapes[name], other.shapes[name]) for name in common if name not in set(same)],
    )


def _changes(
    own: Checkpoint, other: Checkpoint, names: Sequence[str], watch: Progress | None
) -> list[Changed]:
    found = []
    for done, name in enumerate(names, 1):
        found.append(changed(name, own.read(name), other.read(name)))
        if watch:
            watch(done, len(names))
    return found


def subtract(name: str, before: Tensor, after: Tensor) -> Tensor:
    """Return `after - before` in float64.

    Raises:
        NotFinite: an entry is NaN or infinite.
    """
    difference = after.to(torch.float64) - before.to(torch.float64)
    if not bool(torch.isfinite(difference).all()):
        raise NotFinite(f"{name} is NaN or infinite in one of the two models: repair or leave it out")
    return difference


def relative(difference: Tensor, before: Tensor) -> float:
    """Return ||difference||_F / ||before||_F, infinite where something comes of nothing."""
    lost, whole = float(difference.norm()), float(before.to(torch.float64).norm())
    return lost / whole if whole else (float("inf") if lost else 0.0)


def changed(name: str, before: Tensor, after: Tensor) -> Changed:
    """Return how `after` differs from `before`, tensors of one shape."""
    difference = subtract(name, before, after)
    norm, change = float(difference.norm()), relative(difference, before)
    shape = tuple(before.shape)
    if norm == 0 or difference.ndim != 2:
        return Changed(name, shape, change, norm)
    values = singular_values(difference)
    ranks = (rank_at(values, 0.5), rank_at(values, 0.9), rank_at(values, 0.99))
    largest = float(values[0])
    return Changed(name, shape, change, norm, largest, (norm / largest) ** 2, ranks)
