"""Fused projections split into their parts: rows found by structure, and verified by behaviour."""

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import dimensions, kinds, models
from .dimensions import Dimension
from .fused import Layout, SplitLinear
from .models import Target

_SAME = 1e-4
_ROWS = 16
Change = Callable[[Tensor], Tensor]
Probe = Callable[[], object]


def unfold(model: Any, fused: bool, run: Probe | None = None) -> list[str]:
    """Make nn.Linear of every known kind of matrix in `model`, in place, and parts of `fused` projections.

    `eckart.kinds.fold` undoes both where nothing was made smaller.

    Returns:
        What there is to warn of: projections that stay whole.
    """
    kinds.unfold(model)
    whole = split(model, run) if fused else []
    if not whole:
        return []
    return [
        f"{len(whole)} fused projections stay whole, since no order of their parts could be verified: "
        f"{', '.join(whole[:3])}{' ...' if len(whole) > 3 else ''}"
    ]


def alike(model: Any, other: nn.Module) -> None:
    """Unfold `model`, in place, and split its fused projections as those of `other` are split."""
    kinds.unfold(model)
    for name, part in other.named_modules():
        if isinstance(part, SplitLinear):
            whole = model.get_submodule(name)
            if type(whole) is nn.Linear:
                models.replace(model, name, SplitLinear.of(whole, part.layout))


def split(model: Any, run: Probe | None = None) -> list[str]:
    """Split the fused projections in the blocks of `model`, in place; return the names of those that stay.

    Queries, keys and values: without values nothing is read behind the attention, and a query changes what
    is read at its own position alone; the rest are keys. Gate and up: what is read behind them doubles with
    up. Rows that pass under no order of the parts stay together. On the meta device nothing can be tried,
    and the first order that fits is taken: the shapes are the same in all.

    Args:
        model: with plain nn.Linear (eckart.kinds.unfold).
        run: runs the model on something, always the same; default: a few token ids.
    """
    known: dict[object, Layout | None] = {}
    whole = []
    for dimension in _fused(model):
        name = dimension.writers[0][0]
        build = dimensions.build_of(model, dimension)
        if build not in known:
            known[build] = _layout(model, dimension, run)
        layout = known[build]
        if layout is None:
            whole.append(name)
        else:
            models.replace(model, name, SplitLinear.of(models.find(model, name), layout))
    return whole


def _linears(model: nn.Module) -> list[Target]:
    blocks = models.all_blocks(model)
    names = [name for name in models.linear_names(model) if not blocks or models.owner(name, blocks)]
    linears = ((name, models.find(model, name)) for name in names)
    return [Target(name, (linear.out_features, linear.in_features)) for name, linear in linears]


def _fused(model: nn.Module) -> Iterator[Dimension]:
    """Yield the MLPs and attentions with one matrix that may be two, or three."""
    linears = _linears(model)
    mlps = {found.name: found for found in dimensions.find(model, linears) if found.kind == "mlp"}
    for name, group in dimensions.homes(model, linears).items():
        heads = dimensions.heads_of(group)
        if name in mlps:
            if [copies for _, copies in mlps[name].writers] == [2]:
                yield mlps[name]
        elif heads is not None and len(heads[1]) == 1:
            yield Dimension(name, "attention", ((heads[1][0].name, 1),), heads[0].name, 1)


def _layout(model: Any, dimension: Dimension, run: Probe | None) -> Layout | None:
    fused, reader = (models.find(model, name) for name in (dimension.writers[0][0], dimension.reader))
    candidates = _halves(fused) if dimension.kind == "mlp" else _thirds(model, fused, reader)
    if fused.weight.device.type == "meta":
        return next(candidates, None)
    if dimension.kind == "mlp":
        own = _own_run(model.get_submodule(dimension.name), fused)
        return next((found for found in candidates if _doubles(fused, reader, found, own)), None)
    run = run or (lambda: models.probe_logits(model, models.probe(model)))
    return next((found for found in candidates if _attends(fused, reader, found, run)), None)


def _halves(fused: nn.Linear) -> Iterator[Layout]:
    half = fused.out_features // 2
    for names in permutations(("gate_rows", "up_rows")):
        yield Layout(tuple((name, half) for name in names), False)
        yield Layout(tuple((name, 1) for name in names), True)


def _thirds(model: Any, fused: nn.Linear, reader: nn.Linear) -> Iterator[Layout]:
    """Yield the ways in which the rows of queries, keys and values may stand: all, or group by group."""
    heads = dimensions.head_count(getattr(model, "config", None)) or 1
    size = reader.in_features // heads
    rest = fused.out_features - reader.in_features
    if reader.in_features % heads or rest <= 0 or rest % (2 * size) or heads % (rest // (2 * size)):
        return
    groups = rest // (2 * size)
    rows = {"q_rows": heads * size, "k_rows": groups * size, "v_rows": groups * size}
    for names in permutations(rows):
        yield Layout(tuple((name, rows[name]) for name in names), False)
        if groups > 1:
            yield Layout(tuple((name, rows[name] // groups) for name in names), True)


class _Read(Exception):
    """What was to be read was read."""


@torch.no_grad()
def _reads(fused: nn.Module, reader: nn.Module, run: Probe, change: Change) -> Tensor | None:
    """Return what `reader` gets when `change` is made to what `fused` gives; None where it gets nothing."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> NoReturn:
        seen.append(args[0])
        raise _Read

    handles = [
        fused.register_forward_hook(lambda module, args, output: change(output)),
        reader.register_forward_pre_hook(stop),
    ]
    try:
        run()
    except _Read:
        pass
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it wants more, or something else
        return None
    finally:
        for handle in handles:
            handle.remove()
    return seen[0] if seen else None


def _own_run(holder: nn.Module, fused: nn.Linear) -> Probe:
    """Return what runs an MLP on random numbers: an expert gets none of few tokens of text."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, _ROWS, fused.in_features, generator=generator).to(fused.weight)
    return lambda: holder(inputs)


def _times(factor: float, rows: Tensor, positions: slice = slice(None)) -> Change:
    def change(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[..., positions, rows.to(output.device)] *= factor
        return changed

    return change


def _rows(layout: Layout, size: int) -> dict[str, Tensor]:
    cut = layout.cut(torch.arange(size))
    return {name: rows for (name, _), rows in zip(layout.parts, cut, strict=True)}


def _close(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and float((found - expected).norm()) <= _SAME * float(expected.norm())


def _doubles(fused: nn.Linear, reader: nn.Linear, layout: Layout, run: Probe) -> bool:
    """Tell whether what is read doubles with the rows of `up`, and is something."""
    before = _reads(fused, reader, run, lambda output: output)
    up = _rows(layout, fused.out_features)["up_rows"]
    if before is None or not float(before.norm()):
        return False
    return _close(_reads(fused, reader, run, _times(2, up)), 2 * before)


def _attends(fused: nn.Linear, reader: nn.Linear, layout: Layout, run: Probe) -> bool:
    """Tell whether the rows of values and of queries, and so those of keys, are what `layout` says."""
    rows, first = _rows(layout, fused.out_features), slice(0, 1)
    before = _reads(fused, reader, run, lambda output: output)
    silent = _reads(fused, reader, run, _times(0, rows["v_rows"]))
    if before is None or silent is None or float(silent.abs().max()) > _SAME * float(before.abs().max()):
        return False
    query, key = (_reads(fused, reader, run, _times(-3, rows[n], first)) for n in ("q_rows", "k_rows"))
    later = before[..., 1:, :]
    if query is None or key is None or not float(later.norm()):
        return False
    return _close(query[..., 1:, :], later) and not _close(key[..., 1:, :], later)
