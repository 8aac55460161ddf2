"""The loss of any model: summed over what it is a loss of, and its gradients at the model's outputs.

Second moments of gradients are curvature when the loss is a negative log-likelihood in nats, summed over
its terms: so every objective says how many terms it has. What a loss is per is one of these terms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import batches
from .batches import IGNORED, Batch, Example, Side
from .errors import ConfigError, NotFinite

Loss = Callable[[Any, Any], Tensor]
"""(outputs, batch) -> losses of the terms of the batch, of any shape, or their sum: never their mean."""
Labels = Literal["text", "sampled"]
_SCORES = ("logits", "start_logits", "end_logits", "logits_per_image", "logits_per_text")
_STATES = ("last_hidden_state", "image_embeds", "text_embeds", "pooler_output")
_AGREES = 1e-3


@dataclass(frozen=True, slots=True)
class Summed:
    """The loss of a batch, summed (a scalar), and how many terms it has."""

    total: Tensor
    terms: int


class Objective(Protocol):
    """How the loss of a model is measured, and where its gradients come from.

    unit: what a term of the loss is.
    meaning: what the loss is, in words.
    """

    @property
    def unit(self) -> str:
        """What a term of the loss is."""

    @property
    def meaning(self) -> str:
        """What the loss is, in words."""

    @property
    def compares(self) -> bool:
        """Whether the loss is a distance from what the dense model gave."""

    def rows(self, outputs: Any, batch: Batch) -> list[Tensor]:
        """Return the outputs (rows, values) in float32 that two models are compared by."""

    def summed(self, outputs: Any, batch: Batch, reference: Sequence[Tensor] | None) -> Summed:
        """Return the loss of `batch`; `reference` is what the dense model gave (`rows`)."""

    def to_differentiate(
        self, outputs: Any, batch: Batch, labels: Labels, generator: torch.Generator
    ) -> Summed:
        """Return the loss whose gradients the statistics are of."""


def checked(found: Summed) -> Summed:
    """Return `found`.

    Raises:
        NotFinite: it is NaN or infinite.
    """
    if not bool(torch.isfinite(found.total)):
        raise NotFinite(
            "the loss of a batch is NaN or infinite: load the model in a wider dtype, or look at its inputs"
        )
    return found


@dataclass(frozen=True, slots=True)
class Given:
    """The loss is a function of the caller: it returns losses of the terms, or their sum.

    A sum is per token of the batch (the real positions of its sequences), or per sample without sequences.
    """

    loss: Loss
    sides: tuple[Side, ...]
    unit: str
    meaning: str = "the one that was given"
    compares: bool = False

    def rows(self, outputs: Any, batch: Batch) -> list[Tensor]:
        """Return the real rows of what the model says."""
        return real_rows(outputs, batch, self.sides)

    def summed(self, outputs: Any, batch: Batch, reference: Sequence[Tensor] | None) -> Summed:
        """Return what the function returns, summed."""
        found = self.loss(outputs, batch.whole if isinstance(batch, Example) else batch)
        if not isinstance(found, Tensor):
            raise ConfigError(f"loss returned a {type(found).__name__}: it must return a tensor of losses")
        terms = found.numel() if found.ndim else batches.tokens(batch, self.sides)
        return checked(Summed(found.float().sum(), terms))

    def to_differentiate(
        self, outputs: Any, batch: Batch, labels: Labels, generator: torch.Generator
    ) -> Summed:
        """Return the same: labels cannot be drawn for a loss that is not known."""
        if labels == "sampled":
            raise ConfigError("labels 'sampled' are drawn from logits: leave out loss, or labels")
        return self.summed(outputs, batch, None)


@dataclass(frozen=True, slots=True)
class Own:
    """The loss is the model's own, `outputs.loss`, times the number of terms that it is a mean of.

    `shifted`: the first label of each row predicts nothing (next-token losses). `summed_up`: it is a sum
    over its terms, no mean.
    """

    sides: tuple[Side, ...]
    unit: str
    shifted: bool = False
    meaning: str = "the model's own"
    compares: bool = False
    summed_up: bool = False

    def rows(self, outputs: Any, batch: Batch) -> list[Tensor]:
        """Return the real rows of what the model says."""
        return real_rows(outputs, batch, self.sides)

    def summed(self, outputs: Any, batch: Batch, reference: Sequence[Tensor] | None) -> Summed:
        """Return the mean times its terms."""
        terms = terms_of(batch, self.shifted)
        if not terms:
            return Summed(outputs_of(outputs)[0].sum() * 0, 0)
        return checked(Summed(outputs.loss.float() * (1 if self.summed_up else terms), terms))

    def to_differentiate(
        self, outputs: Any, batch: Batch, labels: Labels, generator: torch.Generator
    ) -> Summed:
        """Return the loss, or that on labels drawn from the model where there are some."""
        if labels == "text":
            return self.summed(outputs, batch, None)
        logits, wanted = getattr(outputs, "logits", None), batches.arguments(batch).get("labels")
        if not isinstance(logits, Tensor) or not isinstance(wanted, Tensor) or wanted.is_floating_point():
            raise ConfigError(
                "labels 'sampled' are drawn from logits at labels that are classes: leave it out"
            )
        if self.shifted:
            logits, wanted = logits[:, :-1], wanted[:, 1:]
        if wanted.shape != logits.shape[:-1]:
            raise ConfigError(
                f"labels 'sampled': labels {list(wanted.shape)} have no logits {list(logits.shape)} each"
            )
        return sampled(logits[wanted != IGNORED], generator)


@dataclass(frozen=True, slots=True)
class Likeness:
    """The loss is how far the outputs are from those of the dense model: there is no other.

    Scores (logits) are the classes' distributions: the loss is the cross entropy with the dense model's,
    which is above its entropy by the divergence. Others (hidden states, embeddings) are the mean of a normal
    distribution of variance 1: the loss is half the squared distance. Gradients are those on labels drawn
    from either (true Fisher information), whose second moments are the curvature of that loss.

    A term is a row of the outputs: a real position, or a sample.
    """

    sides: tuple[Side, ...]
    unit: str
    scores: bool
    compares: bool = True

    @property
    def meaning(self) -> str:
        """What the loss is, in words."""
        if self.scores:
            return "the cross entropy with the dense model's predictions"
        return "half the squared distance of the outputs from the dense model's"

    def rows(self, outputs: Any, batch: Batch) -> list[Tensor]:
        """Return the real rows of what the model says."""
        return real_rows(outputs, batch, self.sides)

    def summed(self, outputs: Any, batch: Batch, reference: Sequence[Tensor] | None) -> Summed:
        """Return the distance from `reference`, the dense model's rows; without it, from the outputs."""
        rows = real_rows(outputs, batch, self.sides)
        others = [row.detach() for row in rows] if reference is None else reference
        total, terms = rows[0].new_zeros(()), 0
        for row, other in zip(rows, others, strict=True):
            wanted = other.to(row.device)
            if self.scores:
                total = total - (wanted.softmax(-1) * row.log_softmax(-1)).sum()
            else:
                total = total + (row - wanted).square().sum() / 2
            terms += len(row)
        return checked(Summed(total, terms))

    def to_differentiate(
        self, outputs: Any, batch: Batch, labels: Labels, generator: torch.Generator
    ) -> Summed:
        """Return the loss on labels drawn from the model."""
        rows = real_rows(outputs, batch, self.sides)
        if self.scores:
            parts = [sampled(row, generator) for row in rows]
            return Summed(torch.stack([part.total for part in parts]).sum(), sum(map(len, rows)))
        noise = [torch.randn(row.shape, generator=generator).to(row) for row in rows]
        total = sum(
            ((row * part).sum() for row, part in zip(rows, noise, strict=True)), rows[0].new_zeros(())
        )
        return checked(Summed(total, sum(map(len, rows))))


def sampled(logits: Tensor, generator: torch.Generator) -> Summed:
    """Return the cross entropy of `logits` (rows, classes) with classes drawn from them.

    Raises:
        NotFinite: a logit is NaN or infinite.
    """
    logits = logits.float()
    chances = logits.detach().softmax(-1).cpu()
    if not bool(torch.isfinite(chances).all()):
        raise NotFinite("the logits on a batch are NaN or infinite: load the model in a wider dtype")
    if not len(chances):
        return Summed(logits.sum(), 0)
    drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
    return Summed(functional.cross_entropy(logits, drawn, reduction="sum"), len(logits))


def outputs_of(outputs: Any) -> list[Tensor]:
    """Return what a model says, of all that it returns: its scores, or its states, or its first tensor.

    Raises:
        ConfigError: there is no floating-point tensor in it.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        scores = [outputs[key] for key in _SCORES if isinstance(outputs.get(key), Tensor)]
        states = [outputs[key] for key in _STATES if isinstance(outputs.get(key), Tensor)]
        found = scores or states[:1] or list(outputs.values())
    else:
        found = list(outputs) if isinstance(outputs, Sequence) else []
    tensors = [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]
    tensors = [value for value in tensors if value.ndim]
    if not tensors:
        raise ConfigError(
            f"the model returns a {type(outputs).__name__} without a tensor of outputs: pass loss=, a "
            "function (outputs, batch) -> losses"
        )
    return tensors if isinstance(outputs, Mapping) and scores else tensors[:1]


def real_rows(outputs: Any, batch: Batch, sides: Sequence[Side]) -> list[Tensor]:
    """Return the rows (rows, classes) in float32 of the outputs that are not padding."""
    found = batches.masks(batch, sides)
    rows = []
    for tensor in outputs_of(outputs):
        flat = tensor.float().reshape(-1, tensor.shape[-1])
        # The last sequence is what the outputs are made of.
        mask = next((mask for mask in reversed(found.values()) if mask.shape == tensor.shape[:2]), None)
        if tensor.ndim == 3 and mask is not None:
            flat = flat[mask.flatten().to(flat.device)]
        rows.append(flat)
    return rows


def terms_of(batch: Batch, shifted: bool = False) -> int:
    """Return how many terms a loss of transformers is a mean of, by the labels of `batch`.

    Raises:
        ConfigError: it has none that are known.
    """
    given = batches.arguments(batch)
    labels = given.get("labels")
    if isinstance(labels, Tensor):
        if labels.is_floating_point():
            return labels.numel()
        counted = labels[:, 1:] if shifted else labels
        return int((counted != IGNORED).sum())
    ends = [given[key] for key in ("start_positions", "end_positions") if isinstance(given.get(key), Tensor)]
    if ends:
        return sum(len(end) for end in ends)
    if given.get("return_loss"):
        return 2 * batches.samples(batch)
    raise ConfigError(
        "the model has a loss on the batches, and what it is a mean of cannot be told without labels: pass "
        "loss=, a function (outputs, batch) -> losses of the terms, or their sum"
    )


def default(model: nn.Module, batch: Batch, sides: tuple[Side, ...]) -> Objective:
    """Return the objective of `model`: its own loss where it has one on `batch`, else likeness.

    Raises:
        ConfigError: its loss is not the mean over its labels.
    """
    with torch.no_grad():
        outputs = batches.call(model, batch)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor):
            return Own(sides, _unit_of_labels(batch), _is_shifted(outputs, batch))
        found = outputs_of(outputs)
    named = isinstance(outputs, Mapping) and any(outputs.get(key) is not None for key in _SCORES)
    scores = named and all(tensor.shape[-1] > 1 for tensor in found) and not _is_regression(model)
    per_position = found[0].ndim == 3 and bool(batches.masks(batch, sides))
    return Likeness(sides, "token" if per_position else "sample" if found[0].ndim < 3 else "row", scores)


def _is_regression(model: nn.Module) -> bool:
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    return kind in ("regression", "multi_label_classification")


def _unit_of_labels(batch: Batch) -> str:
    labels = batches.arguments(batch).get("labels")
    if isinstance(labels, Tensor):
        return "label"
    return "pair" if batches.arguments(batch).get("return_loss") else "position"


def _is_shifted(outputs: Any, batch: Batch) -> bool:
    """Tell whether the first label of each row predicts nothing, checking that the loss is that mean.

    Raises:
        ConfigError: the loss is neither the mean over all labels nor over all but the first of each row.
    """
    means = _means(outputs, batches.arguments(batch))
    for shifted, mean in enumerate(means):
        if abs(float(mean) - float(outputs.loss)) <= _AGREES * abs(float(mean)):
            return bool(shifted)
    raise ConfigError(
        f"the model's own loss is {float(outputs.loss):.4g}, and the mean over its labels is "
        f"{' or '.join(f'{float(mean):.4g}' for mean in means) or 'not known'}: pass loss=, a function "
        "(outputs, batch) -> losses of the terms, or their sum"
    )


def _means(outputs: Any, given: Mapping[Any, Any]) -> list[Tensor]:
    """Return what the loss may be: on all labels, and on all but the first of each row."""
    logits, labels = getattr(outputs, "logits", None), given.get("labels")
    if isinstance(logits, Tensor) and isinstance(labels, Tensor):
        logits = logits.detach().float()
        if labels.is_floating_point():
            flat = logits.reshape(labels.shape)
            squared, binary = functional.mse_loss, functional.binary_cross_entropy_with_logits
            errors = [squared(flat, labels), binary(flat, labels)]
            return [min(errors, key=lambda error: abs(float(error - outputs.loss)))]
        pairs = (
            [(logits, labels), (logits[:, :-1], labels[:, 1:])] if labels.ndim == 2 else [(logits, labels)]
        )
        pairs = [(rows, wanted) for rows, wanted in pairs if rows.shape[:-1] == wanted.shape]
        return [
            functional.cross_entropy(rows.flatten(0, -2), wanted.flatten(), ignore_index=IGNORED)
            for rows, wanted in pairs
        ]
    if isinstance(given.get("start_positions"), Tensor):
        ends = [(outputs[f"{end}_logits"].float(), given[f"{end}_positions"]) for end in ("start", "end")]
    elif given.get("return_loss") and getattr(outputs, "logits_per_image", None) is not None:
        both = [outputs.logits_per_image.float(), outputs.logits_per_text.float()]
        ends = [(scores, torch.arange(len(scores), device=scores.device)) for scores in both]
    else:
        return []
    return [torch.stack([functional.cross_entropy(scores, wanted) for scores, wanted in ends]).mean()]
