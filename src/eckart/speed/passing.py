"""How long a pass through the treated maps of a model takes: one after another, nothing between them."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .options import Rounds
from .timing import Clock, in_turn, synchronise

ROUNDS = Rounds(runs=11, warmup=2)


@torch.no_grad()
def seconds(
    modules: Sequence[nn.Module],
    tokens: int,
    progress: Callable[[int, int], None],
    *,
    rounds: Rounds = ROUNDS,
    clock: Clock = time.perf_counter,
) -> float:
    """Return the seconds of a pass of `tokens` through each of `modules` in order, the median of `rounds`.

    Args:
        modules: linear maps with `in_features`.
        tokens: at once.
        progress: (rounds done, rounds in all).
        rounds: how often.
        clock: what tells the seconds.
    """
    inputs: dict[int, torch.Tensor] = {}
    pairs: list[tuple[Any, torch.Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        own: Any = module
        width, like = own.in_features, next(own.parameters())
        if width not in inputs:
            inputs[width] = torch.randn(tokens, width, generator=generator).to(like)
        pairs.append((own, inputs[width]))

    def once() -> float:
        place = pairs[0][1].device
        synchronise(place)
        start = clock()
        for module, own in pairs:
            module(own)
        synchronise(place)
        return clock() - start

    return statistics.median(in_turn({"pass": once}, rounds, progress)["pass"])
