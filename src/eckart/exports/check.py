"""An exported model against PyTorch: prefill, decoding in pieces, divergence, greedy text."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .. import models
from ..divergence import chances, divergence
from ..errors import ModelError, NotFinite
from ..speed.decoding import cache_word
from .session import Session, choose

_PROMPTS = (5, 12, 24)
_WRITTEN = 24
_ONE_BY_ONE = 8
_LONGEST_WINDOW = 512
"""Sliding windows up to this are passed by one of the texts."""


@dataclass(frozen=True, slots=True)
class Check:
    """How far an exported model is from PyTorch in float32, on texts that it wrote behind random tokens.

    Each text is fed as a prompt, a piece of several tokens, and single tokens, all through the cache.

    Args:
        tokens: compared.
        largest: the largest difference of a logit, relative to the largest logit.
        mean: the mean absolute difference of a logit, relative to the largest logit.
        divergence: mean KL(PyTorch || engine) per token, in nats.
        agreement: share of the tokens where both rank the same one first.
        greedy: tokens of greedy text that are PyTorch's, up to the first that is not, and how many were made.
        gap: the largest lead, relative to the largest logit, that PyTorch's token had where greedy text left
            it; 0 where it never did.
    """

    tokens: int
    largest: float
    mean: float
    divergence: float
    agreement: float
    greedy: tuple[int, int]
    gap: float

    def judge(self, tolerance: float | None, what: str) -> None:
        """Raise ModelError if a float export is further from PyTorch than rounding explains.

        Args:
            tolerance: of `largest` and `gap`; None lets all pass.
            what: the export, for the message.
        """
        if tolerance is None:
            return
        if self.largest > tolerance:
            raise ModelError(
                f"{what}: a logit differs by {self.largest:.1e} of the largest one from PyTorch's, "
                f"{tolerance:.0e} is let pass: the engine computes something else, nothing was written"
            )
        if self.gap > tolerance:
            raise ModelError(
                f"{what}: greedy text leaves PyTorch's after {self.greedy[0]} of {self.greedy[1]} tokens, "
                f"where the choice was clear by {self.gap:.1e} of the largest logit: nothing was written"
            )


@dataclass(frozen=True, slots=True)
class Reference:
    """What PyTorch does: texts (n,) with the logits (n, vocabulary) of each position, and greedy texts.

    Args:
        texts: with how many tokens of each are its prompt.
        logits: one row for each token.
        greedy: the likeliest tokens behind each prompt, and the logits that they were chosen by.
    """

    texts: tuple[tuple[Tensor, int], ...]
    logits: tuple[Tensor, ...]
    greedy: tuple[tuple[Tensor, Tensor], ...]


@torch.no_grad()
def reference(model: Any) -> Reference:
    """Return what `model` does on a few texts of its own, always the same for the same model.

    Raises:
        NotFinite: a logit is NaN or infinite.
    """
    texts, greedy = [], []
    generator = torch.Generator().manual_seed(0)
    for length in _lengths(model.config.get_text_config()):
        prompt = torch.randint(models.vocabulary(model), (length,), generator=generator)
        written, _ = _continued(model, prompt, 1.0, generator)
        texts.append((torch.cat([prompt, written]), length))
        greedy.append(_continued(model, prompt, 0.0, generator))
    logits = tuple(model(input_ids=text[None], use_cache=False).logits[0].float() for text, _ in texts)
    if not all(bool(torch.isfinite(each).all()) for each in logits):
        raise NotFinite(
            f"{type(model).__name__} gives logits that are NaN or infinite: nothing to compare with"
        )
    return Reference(tuple(texts), logits, tuple(greedy))


def _lengths(config: Any) -> list[int]:
    """Return lengths of prompts, one of them longer than the sliding window, if that is short."""
    window = getattr(config, "sliding_window", None) or 0
    longest = (getattr(config, "max_position_embeddings", None) or 1 << 20) - _WRITTEN
    lengths = [*_PROMPTS[:-1], window + 8 if _PROMPTS[-1] < window <= _LONGEST_WINDOW else _PROMPTS[-1]]
    return [max(1, min(length, longest)) for length in lengths]


def _continued(
    model: Any, prompt: Tensor, temperature: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return tokens (k,) behind `prompt`, and the logits (k, vocabulary) that they were chosen by."""
    word, cache = cache_word(model), DynamicCache(config=model.config)
    fed, tokens, rows = prompt, [], []
    for _ in range(_WRITTEN):
        made = model(input_ids=fed[None], use_cache=True, **{word: cache})
        rows.append(made.logits[0, -1].float())
        fed = torch.tensor([choose(rows[-1], temperature, None, None, generator)])
        tokens.append(fed)
    return torch.cat(tokens), torch.stack(rows)


@torch.no_grad()
def compare(session: Session, expected: Reference) -> Check:
    """Return how far `session` is from what PyTorch does.

    Raises:
        NotFinite: a logit of the engine is NaN or infinite.
    """
    pairs = [
        (_fed(session, text, prompt), wanted)
        for (text, prompt), wanted in zip(expected.texts, expected.logits, strict=True)
    ]
    found, wanted = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if not bool(torch.isfinite(found).all()):
        raise NotFinite(f"{session.target} gives logits that are NaN or infinite: nothing was written")
    scale, apart = float(wanted.abs().max()), (found - wanted).abs()
    same, gap = _greedy(session, expected)
    labels = found.new_zeros(len(found), dtype=torch.int64)
    return Check(
        tokens=len(found),
        largest=float(apart.max()) / scale,
        mean=float(apart.double().mean()) / scale,
        divergence=float(divergence(found, chances(wanted), labels)),
        agreement=float((found.argmax(-1) == wanted.argmax(-1)).double().mean()),
        greedy=(same, _WRITTEN * len(expected.greedy)),
        gap=gap / scale,
    )


def _fed(session: Session, text: Tensor, prompt: int) -> Tensor:
    """Return the logits of every token of `text`: its prompt, a piece, then one by one."""
    session.reset()
    pieces = [text[:prompt], text[prompt:-_ONE_BY_ONE], *torch.split(text[-_ONE_BY_ONE:], 1)]
    return torch.cat([session.feed(piece, every=True) for piece in pieces])


def _greedy(session: Session, expected: Reference) -> tuple[int, float]:
    """Return how many greedy tokens are PyTorch's, and by how much it preferred those that were left."""
    same, gap = 0, 0.0
    for (text, prompt), (tokens, logits) in zip(expected.texts, expected.greedy, strict=True):
        made = session.generate(text[:prompt], len(tokens), stops=())
        differ = (made != tokens).nonzero()
        place = int(differ[0]) if len(differ) else len(tokens)
        same += place
        if place < len(tokens):
            gap = max(gap, float(logits[place, tokens[place]] - logits[place, made[place]]))
    return same, gap
