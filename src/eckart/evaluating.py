"""Perplexity of a model on text and accuracy on tasks, and how far it is from another one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from . import hub, measure, models, text
from .api import Sources, loaded, sources
from .errors import ConfigError, ModelError
from .measure import Comparison, Perplexity
from .zeroshot import harness
from .zeroshot.evaluated import Evaluated
from .zeroshot.scores import Outcomes, TaskResult

Progress = Callable[[int, int], None]


@overload
def evaluate(
    model: Any,
    text: Sources,
    *,
    tasks: None = None,
    tokens: int = ...,
    seq_len: int = ...,
    bos: bool = ...,
    against: Any = ...,
    tokenizer: Any = ...,
    dtype: str | None = ...,
    device: str | None = ...,
    trust_remote_code: bool = ...,
    watch: Progress | None = ...,
) -> Perplexity | Comparison: ...


@overload
def evaluate(
    model: Any,
    text: Sources | None = None,
    *,
    tasks: str | Sequence[str],
    task_path: str | Path | None = ...,
    limit: int | None = ...,
    shots: int = ...,
    batch: int = ...,
    tokens: int = ...,
    seq_len: int = ...,
    bos: bool = ...,
    against: Any = ...,
    tokenizer: Any = ...,
    dtype: str | None = ...,
    device: str | None = ...,
    trust_remote_code: bool = ...,
    watch: Progress | None = ...,
) -> Evaluated: ...


def evaluate(
    model: Any,
    text: Sources | None = None,
    *,
    tasks: str | Sequence[str] | None = None,
    task_path: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    batch: int = harness.BATCH,
    tokens: int = 24_576,
    seq_len: int = 512,
    bos: bool = False,
    against: Any = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    watch: Progress | None = None,
) -> Perplexity | Comparison | Evaluated:
    """Measure perplexity by the protocol of eckart.measure, and accuracy on tasks; compare with `against`.

    Args:
        model, against: hub ids, paths or models. Models with different tokenizers have no common
            perplexity; `against` is run on the tokens of `model`.
        text: sources to read (eckart.text.read); not needed where there are tasks.
        tasks: names of lm_eval's tasks, groups or tags (needs the extra `tasks`). Both models are run on the
            same samples, and differences are paired (eckart.zeroshot.scores.Paired).
        task_path: a folder of task definitions (YAML) of your own, whose data may be local files.
        limit: the first so many samples of each task; default: all.
        shots: examples before each question.
        batch: rows of a task at once.
        tokens: from the start of the text.
        seq_len: window length, of which all but the first token are predicted.
        bos: begin every window with the tokenizer's begin-of-text token.
        tokenizer: for a model given as an object.
        dtype: to compute in; default: float32 on a CPU, else as stored.

    Returns:
        Perplexity, or, with `against`, Comparison; with `tasks` Evaluated, which holds it beside the tasks.

    Raises:
        NotFinite: a logit is NaN or infinite.
        ConfigError: no text and no tasks, no such task, or no such option.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks or ())
    names = [name.strip() for given in names for name in given.split(",") if name.strip()]
    if tasks is None and not sources(text):
        raise ConfigError("neither text nor tasks: give one to measure on, or both")
    known = None if tasks is None else harness.manager(names, task_path)
    first = loaded(model, tokenizer, dtype, device, trust_remote_code)
    second = None if against is None else loaded(against, first.tokenizer, dtype, device, trust_remote_code)
    language = _language(first, second, text, (tokens, seq_len, bos), watch) if sources(text) else None
    if language is not None and known is None:
        return language
    options: dict[str, Any] = {"shots": shots, "limit": limit, "batch": batch}

    def run(which: hub.Loaded) -> tuple[Outcomes, ...]:
        measure.check_causal(which.model)
        return harness.run(which.model, which.tokenizer, names, known, progress=watch, **options)

    own = run(first)
    other = (None,) * len(own) if second is None else run(second)
    found = tuple(TaskResult(*pair) for pair in zip(own, other))
    return Evaluated(first.source, None if second is None else second.source, language, found)


def _language(
    first: hub.Loaded,
    second: hub.Loaded | None,
    text: Sources | None,
    how: tuple[int, int, bool],
    watch: Progress | None,
) -> Perplexity | Comparison:
    windows = eval_windows(text, first.tokenizer, *how)
    measure.check_length(first.model, how[1])
    measure.check_causal(first.model)
    if second is None:
        return measure.perplexity(first.model, windows, watch)
    same_vocabulary(first, second)
    return measure.compare(first.model, second.model, windows, watch)


def eval_windows(given: Sources | None, tokenizer: Any, tokens: int, seq_len: int, bos: bool) -> torch.Tensor:
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
