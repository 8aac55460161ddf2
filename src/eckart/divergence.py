"""How far one next-token distribution is from another, with the gradient written down.

Logits of a large vocabulary are the largest tensors of a training step: they are worked on in slices
of tokens, and nothing of their size is kept but the gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError

_SLICE = 128


@dataclass(frozen=True, slots=True)
class Chances:
    """Next-token distributions of t tokens, at a temperature: whole, or their k largest entries.

    Args:
        log: log-probabilities (t, v), or (t, k).
        ids: (t, k), where in the vocabulary the k entries stand; None where `log` is whole.
    """

    log: Tensor
    ids: Tensor | None = None

    def rest(self) -> Tensor:
        """Return the probability (t, 1) of all that is not among the k entries."""
        return (1 - self.log.exp().sum(-1, keepdim=True)).clamp_min(0)

    def part(self, start: int, end: int) -> "Chances":
        """Return those of some tokens."""
        return Chances(self.log[start:end], None if self.ids is None else self.ids[start:end])


def chances(logits: Tensor, temperature: float = 1.0, largest: int | None = None) -> Chances:
    """Return the distributions of `logits` (t, v) in float32, whole or the `largest` entries of each.

    Raises:
        ConfigError: temperature <= 0.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature {temperature:g}: must be above 0")
    log = (logits.float() / temperature).log_softmax(-1)
    if largest is None or largest >= log.shape[-1]:
        return Chances(log)
    found = log.topk(largest, dim=-1)
    return Chances(found.values, found.indices)


def _towards(own: Tensor, target: Chances) -> tuple[Tensor, Tensor]:
    """Return KL(target || own) per token (t,), and its gradient (t, v) at the logits of `own`.

    Of a target that is not whole, the rest counts as one entry: its share is compared with the mass that
    `own` gives to the rest, however that is spread.
    """
    chance, log = target.log.exp(), target.log
    share = own.exp()
    if target.ids is None:
        return (chance * (log - own)).sum(-1), share - chance
    theirs = own.gather(-1, target.ids)
    rest, left = target.rest(), (1 - theirs.exp().sum(-1, keepdim=True)).clamp_min(1e-9)
    lost = (chance * (log - theirs)).sum(-1) + (rest * (rest.clamp_min(1e-30) / left).log()).squeeze(-1)
    gradient = share * (1 - rest / left)
    return lost, gradient.scatter(-1, target.ids, theirs.exp() - chance)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Chances, labels: Tensor, temperature: float, mixed: float
    ) -> Tensor:
        count = logits.shape[0]
        gradient = torch.empty_like(logits)
        total = logits.new_zeros((), dtype=torch.float64)
        for start in range(0, count, _SLICE):
            end = min(start + _SLICE, count)
            raw = logits[start:end].float()
            lost, slope = _towards((raw / temperature).log_softmax(-1), target.part(start, end))
            # The square keeps the weight of the gradient at any temperature (Hinton et al. 2015, section 2).
            lost, slope = lost * temperature**2, slope * temperature
            if mixed:
                own, labelled = raw.log_softmax(-1), labels[start:end, None]
                lost = (1 - mixed) * lost - mixed * own.gather(-1, labelled).squeeze(-1)
                text = own.exp()
                text.scatter_add_(-1, labelled, text.new_full(labelled.shape, -1.0))
                slope = (1 - mixed) * slope + mixed * text
            total += lost.double().sum()
            gradient[start:end] = slope / count
        ctx.save_for_backward(gradient)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None


def divergence(
    logits: Tensor, target: Chances, labels: Tensor, temperature: float = 1.0, mixed: float = 0.0
) -> Tensor:
    """Return the mean over tokens of (1 - mixed) T^2 KL(target || own at T) + mixed (-log own[label]).

    Differentiable in `logits`, once.

    Args:
        logits: (t, v).
        target: of the model to match, at the same temperature T.
        labels: (t,) the tokens that follow in the text; looked at only when `mixed` is not 0.
        temperature: T > 0.
        mixed: the share of the text's own loss, in [0, 1].
    """
    found: Tensor = _Divergence.apply(logits, target, labels, temperature, mixed)  # type: ignore[no-untyped-call]
    return found
