"""The stages of a run: watched, timed, with what there is to warn of."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from . import memory

Watch = Callable[[str, int, int], None]
"""Called with the name of the stage, what is done and what there is to do."""


def silent(stage: str, done: int, total: int) -> None:
    """Watch nothing."""


@dataclass(slots=True)
class Run:
    """The moving parts of one run: clock, warnings, watcher."""

    watch: Watch
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Time what is done inside, and give what to report its progress to."""
        start = time.perf_counter()
        self.watch(name, 0, 1)
        yield lambda done, total: self.watch(name, done, total)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        memory.give_back()
