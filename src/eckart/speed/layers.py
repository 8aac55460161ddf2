"""How long a linear map takes on a device: dense, as two factors, and pivoted, in turn.

A loop over one small matrix would find it in the cache of the processor, where no model finds its own. Every
form therefore has as many copies as fill `WORKING_SET`, which take turns.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import factors, ranks
from ..errors import ModelError
from ..factors import FORMS, MODULES, FactoredLinear, Form, PivotedLinear
from ..lean import LeanFactored, LeanPivoted
from ..stages import Watch
from .options import LayerOptions
from .spread import Quotient, Spread, quotient
from .timing import Clock, in_turn, per_call

WORKING_SET = 128_000_000
"""Bytes of the copies of the smallest form."""
_BLOCK_SECONDS = 0.02
_MOST_CALLS = 10_000
_WRONG = 0.05
"""Relative error beyond any rounding, that of bfloat16 included."""
Shape = tuple[int, int]


def _folded(module: PivotedLinear) -> LeanPivoted:
    lean = LeanPivoted.of(module)
    lean.reorder(torch.arange(module.out_features, device=module.order.device))
    return lean


FUSED: dict[str, tuple[Form, Callable[[Any], FactoredLinear | PivotedLinear]]] = {
    "factored, fused": ("factored", LeanFactored.of),
    "pivoted, fused": ("pivoted", LeanPivoted.of),
    "pivoted, folded": ("pivoted", _folded),
}
"""What eckart.fuse makes of a form; folded: with outputs in the order in which they are made."""


@dataclass(frozen=True, slots=True)
class FormTime:
    """What a low-rank form of a map takes.

    Args:
        form: which it is, fused or not.
        rank: the largest within `keep`.
        bytes, flops: its share of those of the dense map.
        seconds: of one call.
        ratio: of its time to that of the dense map.
    """

    form: Form
    rank: int
    bytes: float
    flops: float
    seconds: Spread
    ratio: Quotient


@dataclass(frozen=True, slots=True)
class LayerTime:
    """What a map takes for so many tokens at once.

    Args:
        shape: (m, n).
        count: how many maps of the model have it; 0: none was asked for it.
        tokens: at once.
        calls: of each form, one after another, in every round.
        dense: seconds of a call.
        forms: of those that are smaller at this `keep`, by name: a form, or one of FUSED.
    """

    shape: Shape
    count: int
    tokens: int
    calls: int
    dense: Spread
    forms: Mapping[str, FormTime]

    def share(self, form: str) -> float:
        """Return what `form` should take of the dense time: its bytes for one token, its FLOPs for more.

        One token uses every weight once, so that reading it takes the time; more use each several times.
        """
        found = self.forms[form]
        return found.bytes if self.tokens == 1 else found.flops

    def excess(self, form: str) -> float:
        """Return the time of `form` in units of what it should take; 1 is as fast as its size allows."""
        return self.forms[form].ratio.value / self.share(form)


def measure(
    shapes: Mapping[Shape, int],
    options: LayerOptions,
    place: torch.device,
    dtype: torch.dtype,
    *,
    clock: Clock = time.perf_counter,
    watch: Watch | None = None,
) -> list[LayerTime]:
    """Time a map of each of `shapes` on `place`, with random weights and no bias.

    Args:
        shapes: how many maps of the model have each.
        options: keep, tokens and rounds.
        place: device.
        dtype: of weights and inputs.
        clock: what tells the seconds.
        watch: (stage, rounds done, rounds in all).

    Raises:
        ModelError: a form computes something else than its map on this device.
    """
    sizes = [(shape, tokens) for shape in shapes for tokens in dict.fromkeys(options.tokens)]
    each = options.rounds.warmup + options.rounds.runs
    found: list[LayerTime] = []
    for shape, several in itertools.groupby(sizes, key=lambda size: size[0]):
        generator = torch.Generator().manual_seed(0)
        forms = made(shape, options.keep, place, dtype, generator, fused=options.fused)
        banks = copies(forms)
        for _, tokens in several:
            inputs = torch.randn(tokens, shape[1], generator=generator).to(place, dtype)
            check(forms, inputs)
            done = len(found) * each
            tick = partial(_tick, watch, done, len(sizes) * each)
            calls, seconds = _timed(banks, inputs, options, clock, tick)
            found.append(_time(shape, shapes[shape], tokens, calls, forms, seconds))
    return found


def _tick(watch: Watch | None, before: int, total: int, done: int, _: int) -> None:
    if watch is not None:
        watch("time layers", before + done, total)


def made(
    shape: Shape,
    keep: float,
    place: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    fused: bool = False,
) -> dict[str, Any]:
    """Return a dense map of `shape` and its forms at `keep`, with random weights; also `fused` ones."""
    outputs, inputs = shape
    with torch.device("meta"):
        found: dict[str, Any] = {"dense": nn.Linear(inputs, outputs, bias=False)}
        for form in FORMS:
            rank = ranks.uniform(ranks.Keep(keep), form, shape)
            if rank is not None:
                found[form] = MODULES[form](inputs, outputs, rank)
    found = {name: _filled(module, place, dtype, generator) for name, module in found.items()}
    if fused:
        for name, (form, make) in FUSED.items():
            if form in found:
                found[name] = make(copy.deepcopy(found[form]))
    return found


@torch.no_grad()
def _filled(
    module: nn.Module, place: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> nn.Module:
    module = module.to(dtype).to_empty(device=place)
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1]))
    for order in module.buffers():
        order.copy_(torch.randperm(len(order), generator=generator))
    return module.eval()


def copies(forms: Mapping[str, nn.Module], working_set: int = WORKING_SET) -> dict[str, list[nn.Module]]:
    """Return as many copies of each of `forms` as fill `working_set` bytes with the smallest of them."""
    count = math.ceil(working_set / min(_bytes(module) for module in forms.values()))
    return {
        name: [module, *(copy.deepcopy(module) for _ in range(count - 1))] for name, module in forms.items()
    }


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


@torch.no_grad()
def check(forms: Mapping[str, Any], inputs: Tensor) -> None:
    """Raise ModelError unless each of `forms` maps `inputs` to what its matrix does, but for rounding."""
    for name, module in forms.items():
        weight = module.weight if isinstance(module, nn.Linear) else module.map().dense()
        expected = inputs.cpu().double() @ weight.detach().cpu().double().T
        error = (module(inputs).cpu().double() - expected).norm() / expected.norm()
        if not error < _WRONG:
            raise ModelError(
                f"{name} of {tuple(weight.shape)} on {inputs.device} in {inputs.dtype}: outputs are "
                f"{float(error):.3g} of what the matrix gives away from it; try another dtype"
            )


def _timed(
    banks: Mapping[str, list[nn.Module]],
    inputs: Tensor,
    options: LayerOptions,
    clock: Clock,
    tick: Callable[[int, int], None] | None,
) -> tuple[int, dict[str, Spread]]:
    endless = {name: itertools.cycle(bank) for name, bank in banks.items()}
    _block(endless["dense"], inputs, 1, clock)
    once = _block(endless["dense"], inputs, 1, clock)
    calls = min(_MOST_CALLS, math.ceil(_BLOCK_SECONDS / once)) if once > 0 else _MOST_CALLS
    tasks = {name: partial(_block, turns, inputs, calls, clock) for name, turns in endless.items()}
    seconds = in_turn(tasks, options.rounds, tick)
    return calls, {name: Spread(tuple(values)) for name, values in seconds.items()}


def _block(turns: Iterator[nn.Module], inputs: Tensor, calls: int, clock: Clock) -> float:
    """Return the seconds of a call, of `calls` in a row; the next block begins where this one ends."""
    return per_call(list(itertools.islice(turns, calls)), inputs, clock)


def _time(
    shape: Shape,
    count: int,
    tokens: int,
    calls: int,
    forms: Mapping[str, Any],
    seconds: Mapping[str, Spread],
) -> LayerTime:
    dense = seconds["dense"]
    low_rank: dict[str, FormTime] = {}
    for name in (*FORMS, *FUSED):
        if name in forms:
            form, rank = forms[name].kind, forms[name].rank
            low_rank[name] = FormTime(
                form=form,
                rank=rank,
                bytes=_bytes(forms[name]) / _bytes(forms["dense"]),
                flops=factors.parameters(form, shape, rank) / (shape[0] * shape[1]),
                seconds=seconds[name],
                ratio=quotient(seconds[name], dense),
            )
    return LayerTime(shape, count, tokens, calls, dense, low_rank)
