"""Losses of next tokens, with logits only where something is learned: a vocabulary is wide."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .examples import IGNORED

Batch = dict[str, Tensor]


@contextlib.contextmanager
def head_at(model: Any, positions: Tensor) -> Iterator[None]:
    """Let the head of `model` see the states at `positions` (b, s) alone, as rows (n, d).

    By a hook on the module that get_output_embeddings gives, so for any causal model. Where a model hands
    its head something else than (b, s, d) nothing is changed.
    """
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        yield
        return

    def chosen(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not given or given[0].shape[:-1] != positions.shape:
            return None
        return (given[0][positions], *given[1:])

    handle = head.register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        handle.remove()


def before(labels: Tensor) -> Tensor:
    """Return where (b, s) the logits of learned tokens stand: one place before each."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1))


def at(logits: Tensor, positions: Tensor) -> Tensor:
    """Return the logits (n, V) at `positions` (b, s), of the whole (b, s, V) or what `head_at` left of it."""
    return logits if logits.dim() == 2 else logits[positions]


def learned_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss (n,) of each learned token in float32, row by row.

    Args:
        logits: (b, s, V), or (n, V) under `head_at(model, before(labels))`.
        labels: (b, s), IGNORED where nothing is learned.
    """
    targets = labels[:, 1:]
    return F.cross_entropy(at(logits, before(labels)).float(), targets[targets != IGNORED], reduction="none")


def run(model: Any, batch: Batch) -> Tensor:
    """Return the losses (n,) of the learned tokens of `batch` under `model`."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    with head_at(model, before(batch["labels"])):
        logits = model(**given, use_cache=False).logits
    return learned_losses(logits, batch["labels"])


def sums(losses: Tensor, labels: Tensor) -> Tensor:
    """Return the sum (b,) of the losses (n,) of each row."""
    targets = labels[:, 1:]
    learned = targets != IGNORED
    spread = torch.zeros_like(targets, dtype=losses.dtype).masked_scatter(learned, losses)
    return spread.sum(1)
