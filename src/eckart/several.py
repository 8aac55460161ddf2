"""The distance of several outputs of a model at once: class maps, boxes, depths, masks, spectrograms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import batches
from .batches import Batch
from .errors import ConfigError
from .objectives import Labels, Summed, checked, outputs_of, sampled


@dataclass(frozen=True, slots=True)
class Parts:
    """The outputs of a model that its task is about.

    Args:
        scores: names of outputs that are scores of classes, each with the axis of the classes.
        values: names of outputs that are numbers. Those that a model does not have are left out.
    """

    scores: tuple[tuple[str, int], ...] = ()
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Several:
    """The loss is how far the named outputs are from those of the dense model, each in its own unit.

    Of scores it is the cross entropy with the dense model's distribution, in nats, a mean over the
    positions; of values half the squared distance in units of the mean square of the dense model's on the
    batch, a mean over the values: the negative log-likelihood of a normal distribution of that variance.
    Values of minus infinity (padding) count as zeros. The means of all outputs are added,
    and a term is a sample. Gradients are those on labels drawn from these distributions.
    """

    parts: Parts
    unit: str = "sample"
    meaning: str = (
        "the distance of the outputs from the dense model's: cross entropy of scores, half the relative "
        "squared error of values"
    )
    compares: bool = True

    def rows(self, outputs: Any, batch: Batch) -> list[Tensor]:
        """Return the outputs in float32: scores (rows, classes), values (values, 1)."""
        return [_in_rows(tensor.float(), axis) for tensor, axis in self._found(outputs)]

    def _found(self, outputs: Any) -> list[tuple[Tensor, int | None]]:
        named = outputs if isinstance(outputs, Mapping) else {}
        wanted = (*self.parts.scores, *((name, None) for name in self.parts.values))
        found: list[tuple[Tensor, int | None]] = [
            (named[name], axis)
            for name, axis in wanted
            if isinstance(named.get(name), Tensor) and named[name].is_floating_point()
        ]
        return found or [(tensor, None) for tensor in outputs_of(outputs)]

    def summed(self, outputs: Any, batch: Batch, reference: Sequence[Tensor] | None) -> Summed:
        """Return the distance from `reference`, the dense model's rows; without it, from the outputs.

        Raises:
            ConfigError: the outputs are of another shape than the dense model's.
        """
        total: Tensor = torch.zeros(())
        rows = self.rows(outputs, batch)
        others = [row.detach() for row in rows] if reference is None else reference
        for (_, axis), row, other in zip(self._found(outputs), rows, others, strict=True):
            wanted = other.to(row.device)
            if wanted.shape != row.shape:
                raise ConfigError(
                    f"an output has {list(row.shape)} rows and values where the dense model has "
                    f"{list(wanted.shape)}: a shape that depends on values has no distance; in Python, pass "
                    "loss="
                )
            apart = _apart(row, wanted) if axis is None else functional.cross_entropy(row, wanted.softmax(-1))
            total = total.to(apart) + apart
        samples = batches.samples(batch)
        return checked(Summed(total * samples, samples))

    def to_differentiate(
        self, outputs: Any, batch: Batch, labels: Labels, generator: torch.Generator
    ) -> Summed:
        """Return the loss on labels drawn from the model, whose gradients have the loss's curvature."""
        samples = batches.samples(batch)
        total: Tensor = torch.zeros(())
        for (_, axis), row in zip(self._found(outputs), self.rows(outputs, batch), strict=True):
            drawn = _drawn(row, generator) if axis is None else sampled(row, generator).total
            # Of n terms with the weight samples / n each, the root: gradients are squared.
            total = total.to(drawn) + drawn * (samples / max(1, len(row))) ** 0.5
        return checked(Summed(total, samples))


def _in_rows(tensor: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return tensor.masked_fill(tensor == -torch.inf, 0).reshape(-1, 1)
    return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])


def _variance(values: Tensor) -> Tensor:
    return values.square().mean().clamp_min(torch.finfo(values.dtype).tiny)


def _apart(row: Tensor, wanted: Tensor) -> Tensor:
    return (row - wanted).square().mean() / (2 * _variance(wanted))


def _drawn(row: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(row.shape, generator=generator).to(row)
    return (row * noise).sum() / _variance(row.detach()).sqrt()
