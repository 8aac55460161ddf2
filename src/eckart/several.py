"""The distance of several outputs of a model at once: class maps, boxes, depths, masks, spectrograms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import batches
from .batches import Batch, Key
from .errors import ConfigError
from .objectives import Labels, Summed, checked, outputs_of, sampled


@dataclass(frozen=True, slots=True)
class Parts:
    """The outputs of a model that its task is about.

    Args:
        scores: names of outputs that are scores of classes, each with the axis of the classes.
        values: names of outputs that are numbers, or tuples of tensors of numbers. Those that a model does
            not have are left out.
        chances: names of outputs that are probabilities of classes (scores after a softmax), with the axis.
        ragged: how long the outputs are depends on their values; they are compared as far as both go.
        options: the argument that says how many of the scores belong to each question, of one sample; the
            output is all scores, one after another.
        cut: the attribute of the config that says where scores end that have those of durations after them.
        drawn: the last of these states is compared instead, in a model that draws its outputs at random.
    """

    scores: tuple[tuple[str, int], ...] = ()
    values: tuple[str, ...] = ()
    chances: tuple[tuple[str, int], ...] = ()
    ragged: bool = False
    options: str | None = None
    cut: str | None = None
    drawn: str | None = None


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
    cut: int | None = None
    unit: str = "sample"
    meaning: str = (
        "the distance of the outputs from the dense model's: cross entropy of scores, half the relative "
        "squared error of values"
    )
    compares: bool = True

    def rows(self, outputs: Any, batch: Batch) -> list[Tensor]:
        """Return the outputs in float32: scores (rows, classes), values (values, 1); ragged ones in shape."""
        return [row for row, _ in self._rows(outputs, batch)]

    def _rows(self, outputs: Any, batch: Batch) -> list[tuple[Tensor, int | None]]:
        """Return the rows, each with the axis of the classes where it holds scores."""
        return [(self._shaped(tensor.float(), axis), axis) for tensor, axis in self._found(outputs, batch)]

    def _shaped(self, tensor: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            shaped = tensor.masked_fill(tensor == -torch.inf, 0)[..., None]
        else:
            shaped = tensor.movedim(axis, -1)
        return shaped if self.parts.ragged else shaped.reshape(-1, shaped.shape[-1])

    def _found(self, outputs: Any, batch: Batch) -> list[tuple[Tensor, int | None]]:
        if self.parts.options is not None:
            return _by_question(outputs_of(outputs)[0], batches.arguments(batch)[self.parts.options])
        named = outputs if isinstance(outputs, Mapping) else {}
        found: list[tuple[Tensor, int | None]] = []
        for name, axis in self.parts.scores:
            pieces = [piece for scores in _tensors(named.get(name)) for piece in self._pieces(scores)]
            found += [(piece, axis) for piece in pieces]
        for name, axis in self.parts.chances:
            found += [(_logarithm(tensor), axis) for tensor in _tensors(named.get(name))]
        for name in self.parts.values:
            found += [(tensor, None) for tensor in _tensors(named.get(name))]
        if self.parts.drawn is not None and not found:
            found += [(tensor, None) for tensor in _tensors(named.get(self.parts.drawn))[-1:]]
        return found or [(tensor, None) for tensor in outputs_of(outputs)]

    def _pieces(self, scores: Tensor) -> list[Tensor]:
        """Return the scores of classes, and those of durations behind them where there are some."""
        if self.cut is None or scores.shape[-1] <= self.cut:
            return [scores]
        return [scores[..., : self.cut], scores[..., self.cut :]]

    def summed(self, outputs: Any, batch: Batch, reference: Sequence[Tensor] | None) -> Summed:
        """Return the distance from `reference`, the dense model's rows; without it, from the outputs.

        Raises:
            ConfigError: the outputs are of another shape than the dense model's.
        """
        total: Tensor = torch.zeros(())
        rows = self._rows(outputs, batch)
        others = [row.detach() for row, _ in rows] if reference is None else reference
        for (row, axis), other in zip(rows, others, strict=True):
            wanted = other.to(row.device)
            if wanted.shape != row.shape and not (self.parts.ragged and row.ndim == wanted.ndim):
                raise ConfigError(
                    f"an output has {list(row.shape)} rows and values where the dense model has "
                    f"{list(wanted.shape)}: a shape that depends on values has no distance; in Python, pass "
                    "loss="
                )
            row, wanted = batches.as_far_as_both(row, wanted)
            total = total.to(row) + (_apart(row, wanted) if axis is None else _crossed(row, wanted))
        samples = batches.samples(batch)
        return checked(Summed(total * samples, samples))

    def to_differentiate(
        self, outputs: Any, batch: Batch, labels: Labels, generator: torch.Generator
    ) -> Summed:
        """Return the loss on labels drawn from the model, whose gradients have the loss's curvature."""
        samples = batches.samples(batch)
        total: Tensor = torch.zeros(())
        for shaped, axis in self._rows(outputs, batch):
            row = shaped.flatten(0, -2)
            drawn = _drawn(row, generator) if axis is None else sampled(row, generator).total
            # Of n terms with the weight samples / n each, the root: gradients are squared.
            total = total.to(drawn) + drawn * (samples / max(1, len(row))) ** 0.5
        return checked(Summed(total, samples))


def settled(parts: Parts, model: nn.Module, batch: Batch) -> tuple[Several, dict[str, bool]]:
    """Return the distance of `parts` of the outputs of `model`, and the arguments that it needs for it.

    Tried out on `batch`: of a model that draws its outputs at random, the states named in `parts.drawn` are
    compared, which are not drawn, and which it has to be asked for.

    Raises:
        ConfigError: what would be compared is zero everywhere.
    """
    cut = None if parts.cut is None else getattr(getattr(model, "config", None), parts.cut, None)
    extra = _asked(parts, model, batch)
    what = Several(Parts(drawn=parts.drawn) if extra else parts, cut)
    with torch.no_grad():
        more: dict[Key, Any] = dict(extra.items())
        asking = batches.changed(batch, more)
        rows = what.rows(batches.call(model, asking), asking)
    if not any(bool(row.any()) for row in rows):
        names = ", ".join((*(name for name, _ in (*parts.scores, *parts.chances)), *parts.values))
        raise ConfigError(
            f"{type(model).__name__} gives {names or 'outputs'} of zero everywhere on the first batch: there "
            "is nothing to compare; give other data, on which it finds something"
        )
    return what, extra


def _asked(parts: Parts, model: nn.Module, batch: Batch) -> dict[str, bool]:
    argument = f"output_{parts.drawn}"
    if parts.drawn is None or not batches.takes(model, argument):
        return {}
    with torch.no_grad():
        one, other = (Several(parts).rows(batches.call(model, batch, seed), batch) for seed in (0, 1))
    same = all(a.shape == b.shape and torch.allclose(a, b, 1e-3) for a, b in zip(one, other, strict=True))
    return {} if same else {argument: True}


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of numbers that an output is, or is made of."""
    found = output if isinstance(output, tuple | list) else [output]
    return [part for part in found if isinstance(part, Tensor) and part.is_floating_point()]


def _by_question(scores: Tensor, counts: Tensor) -> list[tuple[Tensor, int | None]]:
    return [(part[None], -1) for part in torch.split(scores, counts.flatten().tolist())]


def _logarithm(chances: Tensor) -> Tensor:
    return chances.float().clamp_min(torch.finfo(torch.float32).tiny).log()


def _crossed(row: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(row.flatten(0, -2), wanted.flatten(0, -2).softmax(-1))


def _variance(values: Tensor) -> Tensor:
    return values.square().mean().clamp_min(torch.finfo(values.dtype).tiny)


def _apart(row: Tensor, wanted: Tensor) -> Tensor:
    return (row - wanted).square().mean() / (2 * _variance(wanted))


def _drawn(row: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(row.shape, generator=generator).to(row)
    return (row * noise).sum() / _variance(row.detach()).sqrt()
