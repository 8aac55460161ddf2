"""Measure several things in turn, so that what changes on the machine meanwhile hits all of them alike."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from .options import Rounds

Clock = Callable[[], float]
Measured = TypeVar("Measured")


def in_turn(
    tasks: Mapping[str, Callable[[], Measured]],
    rounds: Rounds,
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, list[Measured]]:
    """Return what each of `tasks` returned in each round that counts.

    A round does every task once; every other round does them in reverse, so that none is always the first or
    always behind the same one. Nothing of Python's garbage is collected while a task runs.

    Args:
        tasks: what measures, by name.
        rounds: how many rounds; those to warm up are thrown away.
        tick: (rounds done, rounds in all).
    """
    found: dict[str, list[Measured]] = {name: [] for name in tasks}
    gc.collect()
    for turn in range(-rounds.warmup, rounds.runs):
        names = list(tasks)
        for name in names if turn % 2 == 0 else reversed(names):
            with _uncollected():
                made = tasks[name]()
            if turn >= 0:
                found[name].append(made)
        if tick is not None:
            tick(rounds.warmup + turn + 1, rounds.warmup + rounds.runs)
    return found


@contextmanager
def _uncollected() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@torch.no_grad()
def per_call(maps: Sequence[Callable[[Tensor], Tensor]], inputs: Tensor, clock: Clock) -> float:
    """Return the seconds of a call of one of `maps` with `inputs`, all of them once in a row."""
    synchronise(inputs.device)
    start = clock()
    for one in maps:
        one(inputs)
    synchronise(inputs.device)
    return (clock() - start) / len(maps)


def synchronise(place: torch.device) -> None:
    """Wait until everything that was asked of `place` is done; a CPU does it at once."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    elif place.type == "mps":
        torch.mps.synchronize()
    elif place.type != "cpu":
        torch.accelerator.synchronize()


@contextmanager
def fixed_threads(threads: int | None) -> Iterator[int]:
    """Give torch so many threads (None: leave it) while the context is open; give how many it has then."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def load_average() -> float | None:
    """Return how many processes wanted to run in the last minute, or None where the system does not count."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
