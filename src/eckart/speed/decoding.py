"""One pass of a causal language model: the prompt at once, then token by token behind it."""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError, NotFinite
from .options import Setting
from .timing import Clock, synchronise


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass took, in seconds, and made.

    Args:
        prefill: from token ids in main memory to the logits of the last one of each row.
        first_token: from there on to the first new token in main memory; `prefill` is a part of it.
        decode: of all new tokens but the first.
        tokens: (batch, new tokens), on the CPU.
    """

    prefill: float
    first_token: float
    decode: float
    tokens: Tensor

    def prefill_rate(self, setting: Setting) -> float:
        """Return tokens per second of all rows."""
        return setting.batch * setting.prompt_tokens / self.prefill

    def decode_rate(self, setting: Setting) -> float:
        """Return tokens per second of all rows, without the first of each, which comes from the prompt."""
        return setting.batch * (setting.new_tokens - 1) / self.decode


def prompt(setting: Setting, vocabulary: int, seed: int) -> Tensor:
    """Return random token ids (batch, prompt tokens) below `vocabulary`, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (setting.batch, setting.prompt_tokens), generator=generator)


def check_length(config: Any, source: str, setting: Setting) -> None:
    """Raise ConfigError if the model of `config` has fewer positions than prompt and new tokens need."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = setting.prompt_tokens + setting.new_tokens
    if positions is not None and wanted > positions:
        raise ConfigError(
            f"a prompt of {setting.prompt_tokens} and {setting.new_tokens} new tokens are {wanted}: {source} "
            f"has {positions} positions, give at most that many in all"
        )


@torch.no_grad()
def greedy(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    *,
    clock: Clock = time.perf_counter,
    finite: bool = False,
    forward: Callable[..., Any] | None = None,
    kept: Any = None,
) -> Pass:
    """Decode always the likeliest token, `new_tokens` of them whatever they are, and time it.

    The model keeps keys and values in the cache that it makes itself, or in the one that it gets. Every
    reading of `clock` waits for the device; between the first new token and the last nothing does.

    Args:
        model: a causal language model.
        ids: prompt (batch, tokens) on the CPU.
        new_tokens: at least 2.
        clock: what tells the seconds.
        finite: check all logits, which takes time.
        forward: what runs it; default: the model.
        kept: a cache, empty; default: the model makes one.

    Raises:
        ModelError: the model keeps no cache.
        NotFinite: a logit is NaN or infinite, with `finite`.
    """
    word, options = cache_word(model), _last_alone(model)
    run = forward or model
    given = {} if kept is None else {word: kept}
    synchronise(model.device)
    start = clock()
    made = run(input_ids=ids.to(model.device), use_cache=True, **given, **options)
    synchronise(model.device)
    prefilled = clock()
    token = _likeliest(made.logits, finite)
    chosen = [token]
    token.cpu()
    first = clock()
    for _ in range(new_tokens - 1):
        given = given if kept is not None else {word: _kept(model, made, word)}
        made = run(input_ids=token, use_cache=True, **given, **options)
        token = _likeliest(made.logits, finite)
        chosen.append(token)
    synchronise(model.device)
    return Pass(prefilled - start, first - start, clock() - first, torch.cat(chosen, dim=1).cpu())


def _last_alone(model: Any) -> dict[str, int]:
    """Return the option that makes logits for the last position alone, where the model has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _likeliest(logits: Tensor, finite: bool) -> Tensor:
    if finite and not bool(torch.isfinite(logits).all()):
        raise NotFinite("a logit is NaN or infinite, so that there is no likeliest token: try another dtype")
    return logits[:, -1:].argmax(-1)


def cache_word(model: Any) -> str:
    """Return what the cache is called, in arguments and outputs; newer transformers call it otherwise."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _kept(model: Any, made: Any, word: str) -> Any:
    found = getattr(made, word, None)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} keeps no cache when it decodes: only models that do are measured"
        )
    return found


def check_tokens(done: Pass, setting: Setting, vocabulary: int) -> Pass:
    """Return `done` if it made as many tokens as it should, all of them in the vocabulary.

    Raises:
        ModelError: it did not, so that its time says nothing.
    """
    wanted = (setting.batch, setting.new_tokens)
    if tuple(done.tokens.shape) != wanted:
        raise ModelError(
            f"the model made tokens of shape {tuple(done.tokens.shape)}, not {wanted}: its time says nothing"
        )
    if not 0 <= int(done.tokens.min()) <= int(done.tokens.max()) < vocabulary:
        raise ModelError(f"the model made a token that is none of its {vocabulary:,}: its time says nothing")
    return done
