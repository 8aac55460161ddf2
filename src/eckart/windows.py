"""What a run needs: windows of text, or batches, to calibrate on, to try choices on, to measure on."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import text
from .errors import ModelError
from .losses import Batches
from .recipe import Recipe

_TRIAL_TOKENS = 4_096
Rows = Tensor | Batches
"""Token ids (k, seq_len) of a causal language model, or batches of any model with their loss."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Rows for each of these, None where there is nothing for it.

    calibration: for the statistics.
    trial: of the same text, to choose between ways of compressing; not among `calibration` where the
        text is long enough.
    held_out: to measure on; never part of the others.
    foreign: to measure on, of another kind.
    own_text: whether `held_out` is the end of what was calibrated on.
    """

    calibration: Rows | None
    trial: Rows | None
    held_out: Rows | None
    own_text: bool
    foreign: Rows | None = None

    @property
    def is_text(self) -> bool:
        """Tell whether it is windows of a causal language model, and no batches."""
        return not any(isinstance(rows, Batches) for rows in (self.calibration, self.held_out))

    def with_rows(self, **rows: Rows) -> "Windows":
        """Return the same with other rows."""
        return replace(self, **rows)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class TextWindows(Windows):
    """Windows of token ids (k, seq_len)."""

    calibration: Tensor | None
    trial: Tensor | None
    held_out: Tensor | None
    own_text: bool
    foreign: Tensor | None = None


def read(recipe: Recipe, tokenizer: Any, warnings: list[str]) -> TextWindows:
    """Read the sources that `recipe` names and cut them into windows; say in `warnings` what is short.

    Raises:
        ModelError: there is text and no tokenizer.
        ConfigError: a source cannot be read, or is too short.
    """
    if tokenizer is None and (recipe.text or recipe.eval_text or recipe.foreign_text):
        raise ModelError("text needs a tokenizer: pass tokenizer=")
    foreign = text.shares(
        recipe.foreign_text, tokenizer, recipe.eval_tokens, recipe.seq_len, recipe.bos, "the foreign text"
    )
    if not recipe.text and not recipe.eval_text:
        return TextWindows(None, None, None, False, foreign)
    bos = text.begin_token(tokenizer, recipe.bos)
    texts = text.load(recipe.text or recipe.eval_text, recipe.eval_text, tokenizer)
    held_out = text.windows(
        texts.evaluation[: recipe.eval_tokens], recipe.seq_len, bos, "the text to measure on"
    )
    if not recipe.text:
        return TextWindows(None, None, held_out, False, foreign)
    rows = text.windows(texts.calibration, recipe.seq_len, bos, "the text to calibrate on")
    wanted = max(1, recipe.tokens // rows.shape[1])
    if len(rows) < wanted:
        warnings.append(
            f"the text has {rows.numel():,} tokens to calibrate on, fewer than tokens = {recipe.tokens:,}"
        )
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
    chosen, spare = shuffled[:wanted].sort().values, shuffled[wanted:]
    count = max(1, _TRIAL_TOKENS // rows.shape[1])
    trial = torch.cat([spare, chosen])[:count]
    return TextWindows(rows[chosen], rows[trial], held_out, texts.held_out, foreign)
