"""What held-out examples say of a model: loss per token, and which label word it would write."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import measure
from ..errors import NotFinite
from . import losses
from .batches import Collator, evaluating, rows
from .examples import IGNORED, Example

Around = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Judged:
    """Nats per learned token over `tokens` of them; the share of label words that were right, if scored."""

    loss: float
    tokens: int
    accuracy: float | None = None


@torch.no_grad()
def judge(
    model: Any,
    examples: Sequence[Example],
    pad: int,
    *,
    batch: int = 8,
    word_ids: Sequence[tuple[int, ...]] = (),
    around: Around = nullcontext,
    watch: measure.Progress | None = None,
) -> Judged:
    """Measure `model` on `examples`, exactly: every learned token counts once, wherever it stands.

    Args:
        model: a causal language model, with adapters or without; in evaluation mode while it is measured.
        examples: held out.
        pad: id to pad with.
        batch: examples at a time.
        word_ids: tokens of each label word, to score; each is scored by the sum of the log probabilities of
            its tokens after the text.
        around: context to compute in.
        watch: called with (done, total).

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    order = sorted(examples, key=lambda example: len(example.ids))
    collate = Collator(pad)
    total, tokens, right = 0.0, 0, 0
    with evaluating(model):
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            made = {key: value.to(model.device) for key, value in collate(rows(part)).items()}
            with around(), losses.head_at(model, losses.before(made["labels"])):
                logits = model(input_ids=made["input_ids"], use_cache=False).logits
            total += float(losses.learned_losses(logits, made["labels"]).double().sum())
            tokens += sum(example.learned for example in part)
            if word_ids:
                chosen = _choices(model, part, logits, made["labels"], word_ids, collate, around)
                right += sum(found == example.answer for found, example in zip(chosen, part, strict=True))
            if watch:
                watch(min(start + batch, len(order)), len(order))
    loss = total / tokens
    if loss != loss or loss == float("inf"):
        raise NotFinite(f"the loss on held-out data is {loss}: lower the rate, or train in float32")
    return Judged(loss, tokens, right / len(order) if word_ids else None)


def _choices(
    model: Any,
    examples: Sequence[Example],
    logits: Tensor,
    labels: Tensor,
    word_ids: Sequence[tuple[int, ...]],
    collate: Collator,
    around: Around,
) -> list[int]:
    """Return the index of the likeliest label word of each example."""
    if all(len(word) == 1 for word in word_ids):
        after = losses.at(logits, losses.before(labels))
        found: list[int] = after[:, [word[0] for word in word_ids]].argmax(1).tolist()
        return found
    prompts = [example.prompt for example in examples]
    scores = []
    for word in word_ids:
        made = rows([Example([*p, *word], [IGNORED] * len(p) + list(word)) for p in prompts])
        ready = {key: value.to(logits.device) for key, value in collate(made).items()}
        with around():
            own = losses.run(model, ready)
        scores.append(-losses.sums(own, ready["labels"]))
    best: list[int] = torch.stack(scores, 1).argmax(1).tolist()
    return best
