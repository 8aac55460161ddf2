"""What all engines share: the tokens, timing in turn, perplexity by logits, and the shape of a row."""

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from eckart import text

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What one run of one engine in one storage is made with."""

    storage: str
    tokens: int
    seq_len: int
    prompt: int
    new_tokens: int
    repeats: int
    threads: int
    cache: Path
    llama_cpp: Path | None


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of one pass: the prompt at once, then token by token behind it."""

    prefill: float
    decode: float


class Session(Protocol):
    """A loaded model that keeps its own KV cache."""

    def reset(self) -> None:
        """Forget the tokens fed so far."""
        ...

    def feed(self, ids: Tensor, every: bool) -> Tensor:
        """Append `ids` (n,); return the logits (n, vocabulary) of every position, or only of the last."""
        ...


def tokens(folder: Path, source: Path, count: int) -> Tensor:
    """Return the first `count` token ids of the text at `source`.

    Raises:
        ValueError: the text is shorter.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = text.tokenize(text.read(source, tokenizer), tokenizer)[:count]
    if len(found) < count:
        raise ValueError(f"{source.name} has {len(found)} tokens: give a longer text or fewer than {count}")
    return found


def windows(folder: Path, source: Path, options: Options) -> Tensor:
    return text.windows(tokens(folder, source, options.tokens), options.seq_len)


@torch.no_grad()
def perplexity(session: Session, rows: Tensor) -> float:
    """The protocol of eckart.measure: each window alone, all its tokens but the first."""
    losses = []
    for row in rows:
        session.reset()
        logits = session.feed(row, every=True)[:-1].float()
        losses.append(functional.cross_entropy(logits, row[1:]).double())
    return float(torch.stack(losses).mean().exp())


@torch.no_grad()
def speed(session: Session, prompt: Tensor, new_tokens: int) -> Speed:
    """Time one prompt (n,) and the greedy tokens behind it, one at a time."""
    session.reset()
    start = time.perf_counter()
    following = session.feed(prompt, every=False)[-1].argmax()[None]
    middle = time.perf_counter()
    for _ in range(new_tokens):
        following = session.feed(following, every=False)[-1].argmax()[None]
    end = time.perf_counter()
    return Speed(len(prompt) / (middle - start), new_tokens / (end - middle))


def in_turn(passes: Sequence[Callable[[], Speed]], repeats: int) -> list[list[Speed]]:
    """Warm each model up once, then time A B C A B C ...; return the speeds of each model."""
    for once in passes:
        once()
    found: list[list[Speed]] = [[] for _ in passes]
    for _ in range(repeats):
        for once, own in zip(passes, found, strict=True):
            own.append(once())
    return found


def sessions_in_turn(sessions: Sequence[Session], prompt: Tensor, options: Options) -> list[list[Speed]]:
    passes = [lambda own=session: speed(own, prompt, options.new_tokens) for session in sessions]
    return in_turn(passes, options.repeats)


def row(folder: Path, speeds: Sequence[Speed], *, size: int, size_of: str, perplexity: float) -> Row:
    """Medians with the smallest and largest of the repeats beside them."""
    decode, prefill = [one.decode for one in speeds], [one.prefill for one in speeds]
    return {
        "model": folder.name,
        "bytes": size,
        "bytes_of": size_of,
        "perplexity": perplexity,
        "decode_tokens_per_s": statistics.median(decode),
        "decode_spread": [min(decode), max(decode)],
        "prefill_tokens_per_s": statistics.median(prefill),
        "prefill_spread": [min(prefill), max(prefill)],
    }


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def version(*packages: str) -> str:
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def kept_file(folder: Path, options: Options, suffix: str) -> Path:
    """Where a file made from the model at `folder` is kept; its name holds a hash of the model."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    made = options.cache / "made" / f"{folder.name}-{digest.hexdigest()[:12]}"
    made.mkdir(parents=True, exist_ok=True)
    return made / suffix
