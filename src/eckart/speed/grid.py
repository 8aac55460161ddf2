"""Measure a table of times: every shape, form and rank in turn, each with weights that no cache holds."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import environment
from ..factors import MODULES
from ..stages import Watch
from .options import Rounds
from .spread import Spread
from .times import Kind, Row, Shape, Where, grid
from .timing import Clock, in_turn, per_call

STAGE = "time maps"
WORKING_SET = 128_000_000
"""Bytes that the weights of a form are taken from in turn, so that none is in a cache when it is used."""
_BLOCK_SECONDS = 0.01
_MOST_CALLS = 1_000
_TRIALS = 3
ROUNDS = Rounds(runs=15, warmup=2)


def here(place: torch.device, dtype: torch.dtype) -> Where:
    """Return what times on `place` depend on now."""
    machine = environment.describe()["machine"]
    on_cpu = place.type == "cpu"
    return Where(
        device=place.type,
        processor=machine["processor_model" if on_cpu else "accelerator_model"],
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if on_cpu else None,
        torch=torch.__version__,
    )


def measure(
    wanted: Sequence[tuple[Shape, Kind]],
    tokens: int,
    place: torch.device,
    dtype: torch.dtype,
    *,
    rounds: Rounds = ROUNDS,
    clock: Clock = time.perf_counter,
    watch: Watch | None = None,
) -> list[Row]:
    """Return the rows of `wanted`: medians of rounds in which all that a shape may become takes turns.

    Args:
        wanted: shapes (m, n) and kinds; every kind is measured at the ranks of its grid.
        tokens: at once.
        place, dtype: of weights and inputs.
        rounds: how often.
        clock: what tells the seconds.
        watch: (stage, rounds done, rounds in all).
    """
    kinds: dict[Shape, list[Kind]] = {}
    for shape, kind in wanted:
        kinds.setdefault(shape, []).append(kind)
    each, found = rounds.warmup + rounds.runs, []
    for place_of, (shape, own) in enumerate(kinds.items()):
        tick = partial(_tick, watch, place_of * each, len(kinds) * each)
        found += _shape(shape, own, tokens, place, dtype, rounds, clock, tick)
    return found


def _tick(watch: Watch | None, before: int, total: int, done: int, _: int) -> None:
    if watch is not None:
        watch(STAGE, before + done, total)


def _shape(
    shape: Shape,
    kinds: Sequence[Kind],
    tokens: int,
    place: torch.device,
    dtype: torch.dtype,
    rounds: Rounds,
    clock: Clock,
    tick: Callable[[int, int], None],
) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    largest = max(WORKING_SET // dtype.itemsize, 2 * shape[0] * shape[1])
    pool = (torch.randn(largest, generator=generator) / math.sqrt(shape[1])).to(place, dtype)
    keys = {f"{own} {rank}": (own, rank) for own in kinds for rank in grid(own, shape)}
    # Each begins elsewhere in the pool: the weights of one must not be in the cache for the next.
    starts = [place_of * len(pool) // len(keys) for place_of in range(len(keys))]
    tasks = {
        name: _task(own, shape, rank, tokens, pool, start, clock)
        for (name, (own, rank)), start in zip(keys.items(), starts, strict=True)
    }
    seconds = in_turn(tasks, rounds, tick)
    rows = []
    for name, (kind, rank) in keys.items():
        spread = Spread(tuple(seconds[name]))
        lower, upper = spread.quartiles
        rows.append(Row(shape, kind, rank, tokens, spread.median, lower, upper, rounds.runs))
    return rows


def _task(
    kind: Kind, shape: Shape, rank: int, tokens: int, pool: Tensor, start: int, clock: Clock
) -> Callable[[], float]:
    """Return what measures the seconds of a call, of as many calls as a block of time has room for."""
    inputs = pool[: tokens * shape[1]] if tokens * shape[1] <= len(pool) else pool.new_ones(tokens * shape[1])
    columns = rank if kind == "columns" else shape[1]
    inputs = inputs[: tokens * columns].view(tokens, columns)
    size = sum(weight.numel() for weight in made(kind, shape, rank, pool, 0).parameters())

    def copy(index: int) -> nn.Module:
        return made(kind, shape, rank, pool, (start + index * size) % (len(pool) - size + 1))

    fits = max(1, len(pool) // size)
    first = [copy(index) for index in range(min(fits, _TRIALS))]
    # The quickest: one that was interrupted would leave too few calls, whose weights stay in the cache.
    once = min(per_call([module], inputs, clock) for module in first for _ in range(2))
    calls = min(_MOST_CALLS, max(1, math.ceil(_BLOCK_SECONDS / once))) if once > 0 else 1
    turns = itertools.cycle([*first, *map(copy, range(len(first), min(fits, calls)))])
    return lambda: per_call(_next(turns, calls), inputs, clock)


def _next(turns: Iterator[nn.Module], calls: int) -> list[nn.Module]:
    return list(itertools.islice(turns, calls))


@torch.no_grad()
def made(kind: Kind, shape: Shape, rank: int, pool: Tensor, start: int) -> nn.Module:
    """Return a map of `kind` whose weights are views of `pool` from `start` on."""
    outputs, inputs = shape
    with torch.device("meta"):
        module: Any
        if kind == "factored" or kind == "pivoted":
            module = MODULES[kind](inputs, outputs, rank)
        else:
            sizes = {"rows": (inputs, rank), "columns": (rank, outputs)}.get(kind, (inputs, outputs))
            module = nn.Linear(*sizes, bias=False)
    module = module.to(pool.dtype).to_empty(device=pool.device)
    generator = torch.Generator().manual_seed(rank)
    for order in module.buffers():
        order.copy_(torch.randperm(len(order), generator=generator))
    views: dict[str, Tensor] = {}
    for name, weight in module.named_parameters():
        views[name] = pool[start : start + weight.numel()].view(weight.shape)
        start += weight.numel()
    module.load_state_dict(views, strict=False, assign=True)
    return module.eval()  # type: ignore[no-any-return]
