"""The windows that healing learns from, from weighted sources, and those that it is judged by."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import text
from .errors import ConfigError
from .healing import Healing

HELD_OUT = 0.1
"""The share at the end of each source that nothing is fitted to."""
SELF = "self"
"""The source that the dense model writes itself."""
_WRITERS = 16


@dataclass(frozen=True, slots=True)
class Source:
    """Where text comes from, and its weight in the mixture."""

    name: str
    weight: float = 1.0


def parse(source: str) -> Source:
    """Read `NAME` or `NAME=WEIGHT`.

    Raises:
        ConfigError: the weight is not a positive number.
    """
    name, mark, weight = source.rpartition("=")
    if not mark:
        return Source(source)
    try:
        value = float(weight)
    except ValueError:
        return Source(source)
    if not 0 < value < float("inf"):
        raise ConfigError(f"text {source!r}: the weight {weight} must be above 0")
    return Source(name, value)


@dataclass(frozen=True, slots=True)
class Lessons:
    """Token ids of equal length.

    Args:
        rows: (k, seq_len), in the order of training; a window may come again.
        fit: (j, seq_len), some of them, each once, for least squares.
        held_out: (h, seq_len), of the last tenth of each source.
    """

    rows: Tensor
    fit: Tensor
    held_out: Tensor


def learned(sources: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return (name, "healing") of the texts among `sources`, without weights and what a teacher writes."""
    names = [parse(source).name for source in sources]
    return tuple((name, "healing") for name in names if name != SELF)


def read(
    sources: Sequence[str],
    healing: Healing,
    tokenizer: Any,
    *,
    written: Tensor | None = None,
    bos: bool = False,
    spare: float = 0.0,
) -> Lessons:
    """Read `sources` (`NAME` or `NAME=WEIGHT`) and draw windows in proportion to their weights.

    Args:
        sources: as eckart.text.read takes them, or `self` for what the dense model writes ...
        healing: how many tokens, how long a window is, the seed.
        tokenizer: of the model.
        written: ... which is given here: (k, seq_len).
        bos: begin each window with the tokenizer's begin-of-text token.
        spare: the share at the end of each source that is left out altogether.

    Raises:
        ConfigError: a source cannot be read, or is too short to leave a tenth aside.
    """
    parsed = [parse(source) for source in sources]
    if not parsed:
        raise ConfigError("healing needs text: give at least one source")
    begin = text.begin_token(tokenizer, bos)
    parts = [_split(source, healing, tokenizer, written, begin, spare) for source in parsed]
    lengths = {rows.shape[1] for part in parts for rows in part}
    if len(lengths) > 1:
        raise ConfigError(f"a text is shorter than one window of {healing.seq_len} tokens: lower seq_len")
    total = sum(source.weight for source in parsed)
    shares = [source.weight / total for source in parsed]
    generator = torch.Generator().manual_seed(healing.seed)
    length, learned = lengths.pop(), [part[0] for part in parts]
    rows = _mixed(learned, shares, healing.total_steps() * healing.batch, generator)
    fit = _mixed(learned, shares, max(1, healing.fit_tokens // length), generator, once=True)
    held = max(1, healing.hold_tokens // length)
    judged = [_even(part[1], max(1, round(held * share))) for part, share in zip(parts, shares, strict=True)]
    return Lessons(rows, fit, torch.cat(judged))


def _split(
    source: Source, healing: Healing, tokenizer: Any, written: Tensor | None, begin: int | None, spare: float
) -> tuple[Tensor, Tensor]:
    """Return the windows of one source to learn from, and those of its last tenth."""
    if source.name == SELF:
        if written is None:
            raise ConfigError("the source 'self' is what the dense model writes: it needs a teacher")
        cut = min(max(1, int(len(written) * (1 - HELD_OUT))), len(written) - 1)
        if cut < 1:
            raise ConfigError("the source 'self' needs at least two windows: raise tokens")
        return written[:cut], written[cut:]
    tokens = text.tokenize(text.read(source.name, tokenizer), tokenizer)
    tokens = tokens[: len(tokens) - int(len(tokens) * spare)]
    cut = int(len(tokens) * (1 - HELD_OUT))
    return (
        text.windows(tokens[:cut], healing.seq_len, begin, f"{source.name} without its last tenth"),
        text.windows(tokens[cut:], healing.seq_len, begin, f"the last tenth of {source.name}"),
    )


def _even(rows: Tensor, count: int) -> Tensor:
    count = min(count, len(rows))
    return rows[[index * len(rows) // count for index in range(count)]]


def _mixed(
    parts: Sequence[Tensor],
    shares: Sequence[float],
    count: int,
    generator: torch.Generator,
    once: bool = False,
) -> Tensor:
    """Draw `count` windows in proportion to `shares`; a source is in a new random order every time round.

    With `once` no window comes twice, and there may be fewer.
    """
    placed: list[tuple[float, int, Tensor]] = []
    for number, (rows, quota) in enumerate(zip(parts, _quotas(shares, count), strict=True)):
        wanted = min(len(rows), quota) if once else quota
        order: list[int] = []
        while len(order) < wanted:
            order += torch.randperm(len(rows), generator=generator).tolist()
        placed += [((at + 0.5) / wanted, number, rows[index]) for at, index in enumerate(order[:wanted])]
    placed.sort(key=lambda item: item[:2])
    return torch.stack([row for _, _, row in placed])


def _quotas(shares: Sequence[float], count: int) -> list[int]:
    """Share `count` out, all of it: rounded down first, then one more to the largest remainders."""
    found = [int(count * share) for share in shares]
    left = sorted(range(len(shares)), key=lambda place: found[place] - count * shares[place])
    for place in left[: count - sum(found)]:
        found[place] += 1
    return found


@torch.no_grad()
def write(model: Any, count: int, seq_len: int, generator: torch.Generator, watch: Any = None) -> Tensor:
    """Return `count` windows (count, seq_len) that `model` writes by itself, drawn from its distribution.

    Each begins with a token drawn evenly from the vocabulary. The draws are made on the CPU.
    """
    found: list[Tensor] = []
    vocabulary = int(model.config.get_text_config().vocab_size)
    # Its name changed between versions of transformers.
    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for start in range(0, count, _WRITERS):
        rows = torch.randint(vocabulary, (min(_WRITERS, count - start), 1), generator=generator)
        latest, cache = rows, None
        for place in range(1, seq_len):
            made = model(input_ids=latest.to(model.device), use_cache=True, **{keyword: cache})
            cache = made[keyword]
            latest = torch.multinomial(made.logits[:, -1].float().softmax(-1).cpu(), 1, generator=generator)
            rows = torch.cat([rows, latest], dim=1)
            if watch and place % 16 == 0:
                watch(start * seq_len + place * len(rows), count * seq_len)
        found.append(rows)
    return torch.cat(found)
