"""Several processes that share one run: torch.distributed, started by torchrun."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..stats import Moment, Stats

T = TypeVar("T")
_PATIENCE = timedelta(days=1)
"""How long one process may wait for another: decompositions are shared by cost, not to the second."""


@dataclass(frozen=True, slots=True)
class Team:
    """This process among `size` that work on one run; number 0 writes what is common.

    All of them read the same weight files and write into the same work folder.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls, place: torch.device) -> "Team":
        """Return the team that torchrun started, of one process where it did not.

        nccl connects devices, gloo everything else.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_PATIENCE)
        return cls(distributed.get_rank(), distributed.get_world_size())

    def own(self, rows: Tensor) -> Tensor:
        """Return the windows of `rows` (k, seq_len) that are this process's: every `size`-th."""
        return rows[self.rank :: self.size]

    def suffix(self) -> str:
        """Return what tells the files of this process from those of others."""
        return "" if self.size == 1 else f".{self.rank}"

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.size > 1:
            distributed.barrier()

    def gathered(self, value: T) -> list[T]:
        """Return the `value` of every process, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def add(self, stats: Stats) -> None:
        """Make `stats`, in place, those of all processes together."""
        if self.size == 1:
            return
        about = {key: (tuple(m.total.shape), m.total.dtype, m.count) for key, m in stats.moments.items()}
        everywhere = self.gathered((about, stats.leaders))
        for key in sorted({key for found, _ in everywhere for key in found}):
            shape, dtype, _ = next(found[key] for found, _ in everywhere if key in found)
            own = stats.moments.get(key)
            total = torch.zeros(shape, dtype=dtype, device=self._place(stats)) if own is None else own.total
            distributed.all_reduce(total)
            stats.moments[key] = Moment(total, sum(found[key][2] for found, _ in everywhere if key in found))
        for _, leaders in everywhere:
            stats.leaders.update(leaders)

    def _place(self, stats: Stats) -> torch.device:
        return next((moment.total.device for moment in stats.moments.values()), torch.device("cpu"))


def by_cost(costs: Sequence[float], size: int) -> list[int]:
    """Return who of `size` processes does each of the tasks: the dearest first, to the one with the least."""
    loads = [0.0] * size
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners
