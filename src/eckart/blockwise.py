"""Block refinement: match the output of every transformer block by gradient descent, first block first."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import calibrate, measure, models
from .chain import Chain, chain, matching
from .healing import Healing
from .shared import common


def costs(dense: Any, windows: Tensor, watch: Callable[[int, int], None] | None = None) -> dict[str, Tensor]:
    """Return E[g g^T] (d, d) of the gradients at the outputs of the blocks of `dense`, by block."""
    names = models.block_names(dense)
    found = calibrate.calibrate(
        dense, windows, names, ("gradient",),
        gradient_windows=len(windows), generator=torch.Generator(), watch=watch,
    )  # fmt: skip
    return {name: found.stats.moment("gradient", name).mean() for name in names}


def refine(
    student: Any,
    dense: Any,
    windows: Tensor,
    held_out: Tensor,
    healing: Healing,
    *,
    metrics: dict[str, Tensor],
    trained: Sequence[str],
    watch: Callable[[int, int], None] | None = None,
) -> int:
    """Train each block of `student`, in place, to give what the dense block gave; return how many are better.

    A block gets what the blocks before it now give, so their error is there to be mended. The error of its
    output is e^T C e with C from `metrics`. A block that is not better on `held_out`, by more than the
    standard error of the difference, stays as it was.

    Args:
        student, dense: with the same blocks.
        windows: (k, seq_len) to fit to.
        held_out: (h, seq_len) to decide on.
        healing: block_epochs, block_rate, seed.
        metrics: by name of a block.
        trained: names of the parameters that may change.
        watch: called with (blocks done, blocks).

    Raises:
        ModelError: the blocks do not correspond, or are no chain.
    """
    windows, held_out = windows.to(student.device), held_out.to(student.device)
    own, original = chain(student, windows[0]), chain(dense, windows[0])
    matching(own, original)
    generator = torch.Generator().manual_seed(healing.seed)
    rows = torch.cat([windows, held_out])
    with torch.no_grad():
        mine, theirs = [own.entry(row) for row in rows], [original.entry(row) for row in rows]
    better = 0
    repeated = common(student)
    # What blocks have in common is none of theirs.
    everyones = {*repeated, *repeated.values()}
    for index, name in enumerate(own.names):
        with torch.no_grad():
            theirs = [original.run(index, hidden) for hidden in theirs]
        inside = [key for key in trained if models.owner(key, [name]) and key not in everyones]
        better += _fit(own, index, mine, theirs, len(windows), metrics[name], inside, healing, generator)
        with torch.no_grad():
            mine = [own.run(index, hidden) for hidden in mine]
        if watch:
            watch(index + 1, len(own.names))
    return better


def _error(own: Chain, index: int, hidden: Tensor, wanted: Tensor, metric: Tensor) -> Tensor:
    error = (own.run(index, hidden) - wanted).float()
    return ((error @ metric.to(error)) * error).sum(-1).mean()


def _fit(
    own: Chain,
    index: int,
    mine: Sequence[Tensor],
    theirs: Sequence[Tensor],
    count: int,
    metric: Tensor,
    inside: Sequence[str],
    healing: Healing,
    generator: torch.Generator,
) -> bool:
    """Train one block on the first `count` of its inputs; keep it if the others say that it is better."""
    parameters = {name: own.model.get_parameter(name) for name in inside}
    if not parameters:
        return False

    @torch.no_grad()
    def judged() -> Tensor:
        pairs = zip(mine[count:], theirs[count:], strict=True)
        return torch.stack([_error(own, index, *pair, metric) for pair in pairs]).double().cpu()

    before, kept = judged(), {name: value.detach().clone() for name, value in parameters.items()}
    scale = 1 / max(float(before.mean()), torch.finfo(torch.float32).tiny)
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=healing.block_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    steps = healing.block_epochs * count
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(healing.block_epochs):
        for place in torch.randperm(count, generator=generator).tolist():
            loss = scale * _error(own, index, mine[place], theirs[place], metric)
            # An expert that no token of this window goes to learns nothing from it.
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for value, gradient in zip(parameters.values(), gradients, strict=True):
                value.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters.values(), healing.clip)
            optimizer.step()
            schedule.step()
    if measure.lower(judged(), before):
        return True
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(kept[name])
    return False
