"""The loss of any model on batches, and how far its outputs are from those of the dense model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count as count_up

import torch
from torch import Tensor, nn

from . import batches
from .batches import Batch, Side
from .errors import ConfigError
from .objectives import Objective

_REMEMBERED = 1 << 26
"""Numbers of the dense model's outputs that are kept to compare with, at most (256 MB)."""
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Batches:
    """What a model is called with, one batch after another, and how its loss is measured.

    sides: the sequences in the batches, which may be padded.
    gradients: how many of the batches, evenly spread, gradients are taken on; default: all.
    references: the dense model's real outputs on the first of the batches, float32 on the CPU.
    """

    calls: tuple[Batch, ...]
    objective: Objective
    sides: tuple[Side, ...] = ()
    gradients: int | None = None
    references: tuple[Outputs, ...] = ()

    def __len__(self) -> int:
        return len(self.calls)

    def comparable(self) -> tuple[Batch, ...]:
        """Return the batches that the loss is measured on: of a distance, those that have references."""
        return (
            self.calls[: len(self.references)] if self.objective.compares and self.references else self.calls
        )

    def first(self, count: int) -> "Batches":
        """Return the first `count` batches."""
        return replace(self, calls=self.calls[:count], references=self.references[:count])


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """The loss of a model on batches, in nats per `unit`; `meaning` says what loss it is.

    `standard_error` is from the spread between batches, None with a single one. `terms` is what the loss is
    a mean of, `predicted` the same. `error` is |y - y0| / |y0| over the outputs on the first `compared`
    batches, y0 those of the dense model; None for that model itself.
    """

    loss: float
    standard_error: float | None
    unit: str
    terms: int
    batches: int
    error: float | None
    compared: int
    dtype: str
    device: str
    meaning: str

    @property
    def predicted(self) -> int:
        """What the loss is a mean of."""
        return self.terms


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter of `model`."""
    found = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(found, torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter of `model`."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def fitted(model: nn.Module, batch: Batch) -> Batch:
    """Return `batch` on the device of `model`, its floating-point tensors in its dtype."""
    return batches.cast(batches.moved(batch, device_of(model)), dtype_of(model))


@torch.no_grad()
def remember(model: nn.Module, found: Batches) -> Batches:
    """Return `found` with what `model`, the dense one, gives on as many of the batches as may be kept."""
    kept: list[Outputs] = []
    held = 0
    for batch in found.calls:
        own = fitted(model, batch)
        rows = tuple(row.cpu() for row in found.objective.rows(batches.call(model, own), own))
        held += sum(row.numel() for row in rows)
        if kept and held > _REMEMBERED:
            break
        kept.append(rows)
    return replace(found, references=tuple(kept))


@torch.no_grad()
def measured(
    model: nn.Module, found: Batches, progress: Callable[[int, int], None] | None = None
) -> MeasuredLoss:
    """Return the loss of `model` on the batches `found`, and its distance from their references.

    Raises:
        NotFinite: the loss is NaN or infinite.
        ConfigError: the batches have no term of a loss.
    """
    totals, terms = [], []
    apart, whole = 0.0, 0.0
    for place, batch in zip(count_up(), found.comparable()):
        own = fitted(model, batch)
        outputs = batches.call(model, own)
        reference = found.references[place] if place < len(found.references) else None
        summed = found.objective.summed(outputs, own, reference)
        totals.append(float(summed.total))
        terms.append(summed.terms)
        for row, other in zip(found.objective.rows(outputs, own), reference or ()):
            row, wanted = batches.as_far_as_both(row, other.to(row.device))
            apart += float((row - wanted).double().square().sum())
            whole += float(wanted.double().square().sum())
        if progress:
            progress(place + 1, len(found.comparable()))
    if not sum(terms):
        raise ConfigError("no batch has a label to measure the loss on: give batches with labels")
    return MeasuredLoss(
        loss=sum(totals) / sum(terms),
        standard_error=_spread(totals, terms),
        unit=found.objective.unit,
        terms=sum(terms),
        batches=len(terms),
        error=(apart / whole) ** 0.5 if whole else None,
        compared=len(found.references),
        dtype=str(dtype_of(model)).removeprefix("torch."),
        device=str(device_of(model)),
        meaning=found.objective.meaning,
    )


def _spread(totals: list[float], terms: list[int]) -> float | None:
    """Return the standard error of the ratio of the sums."""
    size = len(totals)
    if size < 2:
        return None
    loss = sum(totals) / sum(terms)
    squares = sum((total - loss * count) ** 2 for total, count in zip(totals, terms, strict=True))
    return float((squares * size / (size - 1)) ** 0.5 / sum(terms))


@torch.no_grad()
def batch_losses(model: nn.Module, found: Batches) -> Tensor:
    """Return the mean loss of each batch (k,), float64, on the CPU."""
    losses = []
    for place, batch in enumerate(found.comparable()):
        own = fitted(model, batch)
        reference = found.references[place] if place < len(found.references) else None
        summed = found.objective.summed(batches.call(model, own), own, reference)
        losses.append(float(summed.total) / max(1, summed.terms))
    return torch.tensor(losses, dtype=torch.float64)
