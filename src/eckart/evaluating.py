"""Perplexity of a model on text, and how far it is from another one."""

from collections.abc import Callable
from typing import Any

import torch

from . import hub, measure, models, text
from .api import Sources, loaded, sources
from .errors import ConfigError, ModelError
from .measure import Comparison, Perplexity


def evaluate(
    model: Any,
    text: Sources,
    *,
    tokens: int = 24_576,
    seq_len: int = 512,
    bos: bool = False,
    against: Any = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> Perplexity | Comparison:
    """Measure perplexity by the protocol of eckart.measure; with `against`, compare two models.

    Args:
        model, against: hub ids, paths or models. Models with different tokenizers have no common
            perplexity; `against` is run on the tokens of `model`.
        text: sources to read (eckart.text.read).
        tokens: from the start of the text.
        seq_len: window length, of which all but the first token are predicted.
        bos: begin every window with the tokenizer's begin-of-text token.
        tokenizer: for a model given as an object.
        dtype: to compute in; default: float32 on a CPU, else as stored.

    Raises:
        NotFinite: a logit is NaN or infinite.
        ConfigError: no text, or no such option.
    """
    first = loaded(model, tokenizer, dtype, device, trust_remote_code)
    windows = eval_windows(text, first.tokenizer, tokens, seq_len, bos)
    measure.check_length(first.model, seq_len)
    measure.check_causal(first.model)
    if against is None:
        return measure.perplexity(first.model, windows, watch)
    second = loaded(against, first.tokenizer, dtype, device, trust_remote_code)
    same_vocabulary(first, second)
    return measure.compare(first.model, second.model, windows, watch)


def eval_windows(given: Sources, tokenizer: Any, tokens: int, seq_len: int, bos: bool) -> torch.Tensor:
    """Return windows (k, seq_len) of the first `tokens` tokens of the sources `given`.

    Raises:
        ModelError: there is no tokenizer.
        ConfigError: a number is not legal, or there is too little text.
    """
    if tokenizer is None:
        raise ModelError("text needs a tokenizer: pass tokenizer=")
    if tokens < 2 or seq_len < 2:
        raise ConfigError(f"tokens {tokens}, seq_len {seq_len}: both must be at least 2")
    parts = [text.tokenize(text.read(source, tokenizer), tokenizer) for source in sources(given) or ()]
    return text.windows(torch.cat(parts)[:tokens], seq_len, text.begin_token(tokenizer, bos))


def same_vocabulary(first: hub.Loaded, second: hub.Loaded) -> None:
    """Raise ModelError unless both score the same tokens."""
    own, other = (models.vocabulary(loaded.model) for loaded in (first, second))
    if own != other:
        raise ModelError(
            f"{first.source} has a vocabulary of {own} and {second.source} of {other}: "
            "models with different tokenizers cannot be compared token by token"
        )
