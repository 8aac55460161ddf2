"""A causal language model under torch.compile, with a static cache: one graph for prompts, one for tokens."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from ..errors import ModelError
from . import decoding
from .decoding import Pass
from .options import Setting
from .timing import Clock


@dataclass(frozen=True, slots=True)
class Compiled:
    """A model that was compiled for the sizes of one setting.

    Args:
        model: the model.
        forward: the compiled one.
        cache: of as many tokens as the setting has, filled anew by every pass.
        seconds: that the first pass took: both graphs, and running each for the first time.
    """

    model: Any
    forward: Callable[..., Any]
    cache: Any
    seconds: float

    def greedy(self, ids: Tensor, new_tokens: int, clock: Clock = time.perf_counter) -> Pass:
        """Decode as `decoding.greedy` does."""
        return _greedy(self.model, self.forward, self.cache, ids, new_tokens, clock)


def check(model: Any) -> None:
    """Raise ModelError if transformers says that the class of `model` is no single graph."""
    if not getattr(model, "_can_compile_fullgraph", False):
        raise ModelError(
            f"{type(model).__name__} does not compile with a static cache, says transformers: measure it "
            "without --compile"
        )


@torch.no_grad()
def prepare(
    model: Any,
    setting: Setting,
    ids: Tensor,
    *,
    backend: str | Callable[..., Any] = "inductor",
    clock: Clock = time.perf_counter,
) -> Compiled:
    """Compile `model` for `setting`, and run it once on `ids`, the prompt of that.

    Raises:
        ModelError: the model does not compile with a static cache.
    """
    check(model)
    cache = StaticCache(config=model.config, max_cache_len=setting.prompt_tokens + setting.new_tokens)
    # What the cache allocates at its first use, a graph would take for one of its own results.
    model(input_ids=ids.to(model.device), use_cache=True, **{decoding.cache_word(model): cache})
    forward = torch.compile(model.forward, dynamic=False, backend=backend)
    start = clock()
    _greedy(model, forward, cache, ids, 2, clock)
    return Compiled(model, forward, cache, clock() - start)


def _greedy(
    model: Any, forward: Callable[..., Any], cache: Any, ids: Tensor, new_tokens: int, clock: Clock
) -> Pass:
    cache.reset()
    return decoding.greedy(model, ids, new_tokens, clock=clock, forward=forward, kept=cache)
