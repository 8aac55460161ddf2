"""The windows of text that a run needs: to calibrate on, to try choices on, to measure on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import text
from .errors import ModelError
from .recipe import Recipe

_TRIAL_TOKENS = 4_096


@dataclass(frozen=True, slots=True)
class Windows:
    """Token ids (k, seq_len) each, None where there is no text for it.

    calibration: for the statistics.
    trial: of the same text, to choose between ways of compressing; not among `calibration` where the
        text is long enough.
    held_out: to measure on; never part of the others.
    foreign: to measure on, of another kind.
    own_text: whether `held_out` is the end of the text that was calibrated on.
    """

    calibration: Tensor | None
    trial: Tensor | None
    held_out: Tensor | None
    own_text: bool
    foreign: Tensor | None = None


def read(recipe: Recipe, tokenizer: Any, warnings: list[str]) -> Windows:
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
        return Windows(None, None, None, False, foreign)
    bos = text.begin_token(tokenizer, recipe.bos)
    texts = text.load(recipe.text or recipe.eval_text, recipe.eval_text, tokenizer)
    held_out = text.windows(
        texts.evaluation[: recipe.eval_tokens], recipe.seq_len, bos, "the text to measure on"
    )
    if not recipe.text:
        return Windows(None, None, held_out, False, foreign)
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
    return Windows(rows[chosen], rows[trial], held_out, texts.held_out, foreign)
