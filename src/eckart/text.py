"""Text in: files, JSONL, chat messages, datasets; tokens out, in windows of equal length."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError

HELD_OUT = 0.05
"""The share at the end of the text that evaluation gets when no other text is given."""


def read(source: str | Path, tokenizer: Any) -> str:
    """Return the text of one source.

    A `.jsonl` file has one object per line with a `text` or a `messages` column (the tokenizer's
    chat template is applied). Any other file is plain UTF-8. What is not a file is taken as
    `ID[@CONFIG][:SPLIT]` of the datasets library (default split: train), an ID being a name on the
    hub or a local folder.

    Raises:
        ConfigError: no such file or dataset, no text in it, not UTF-8, or no usable column.
    """
    path = Path(source)
    if path.is_file() and path.suffix != ".jsonl":
        text = plain(path)
    else:
        text = "\n\n".join(_row_text(row, tokenizer, str(source)) for row in rows(source))
    if not text.strip():
        raise ConfigError(f"{source} holds no text")
    return text


def rows(source: str | Path) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a `.jsonl` file or of a dataset, by the names of `read`.

    Raises:
        ConfigError: no such file or dataset, not UTF-8, or a line that is no JSON object.
    """
    path = Path(source)
    return _json_rows(path) if path.is_file() else _dataset_rows(str(source))


def plain(path: Path) -> str:
    """Return the content of a UTF-8 file.

    Raises:
        ConfigError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _json_rows(path: Path) -> Iterable[Mapping[str, Any]]:
    for number, line in enumerate(plain(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        yield row


def _row_text(row: Mapping[str, Any], tokenizer: Any, source: str) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"{source} holds chat messages and the model's tokenizer has no chat template: "
                "give a text column"
            )
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    raise ConfigError(
        f"{source} has the columns {', '.join(map(str, row))}: one named 'text' or 'messages' is needed"
    )


def _dataset_rows(source: str) -> Iterable[Mapping[str, Any]]:
    name, _, split = source.partition(":")
    name, _, config = name.partition("@")
    local = Path(name).exists()
    if not local and (name.startswith((".", "/")) or Path(name).suffix in (".txt", ".jsonl", ".json", ".md")):
        raise ConfigError(f"no file {source}: give a text file, a .jsonl file or the id of a dataset")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"no file {source}; to read it as a dataset, pip install 'eckart[datasets]'"
        ) from error
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            name, config or None, split=split or "train"
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{source} is neither a file nor a dataset that can be loaded: {error}") from error
    return rows


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Return the token ids (count,) of the whole text at once, without special tokens."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def windows(tokens: Tensor, seq_len: int, bos: int | None = None, what: str = "the text") -> Tensor:
    """Cut `tokens` (count,) into consecutive windows (k, seq_len); what is left at the end is dropped.

    With `bos` each window begins with that id and holds seq_len - 1 tokens of the text. A text
    shorter than one window gives one shorter window.

    Raises:
        ConfigError: fewer than two tokens.
    """
    body = seq_len if bos is None else seq_len - 1
    body = min(body, len(tokens))
    if body < 2:
        raise ConfigError(
            f"{what} has {len(tokens)} tokens, at least 2 are needed and windows are of {seq_len}: "
            "give a longer text"
        )
    rows = tokens[: len(tokens) // body * body].reshape(-1, body)
    if bos is None:
        return rows
    return torch.cat([torch.full((len(rows), 1), bos, dtype=rows.dtype), rows], dim=1)


def begin_token(tokenizer: Any, wanted: bool) -> int | None:
    """Return the id that begins every window if that is `wanted`, else None.

    Raises:
        ConfigError: it is wanted and the tokenizer has none.
    """
    if not wanted:
        return None
    found: int | None = tokenizer.bos_token_id
    if found is None:
        raise ConfigError("bos: the tokenizer has no begin-of-text token")
    return found


@dataclass(frozen=True, slots=True)
class Texts:
    """Tokens to calibrate on and tokens to evaluate on, which never overlap when they share a source."""

    calibration: Tensor
    evaluation: Tensor
    held_out: bool


def load(text: Sequence[str | Path], eval_text: Sequence[str | Path], tokenizer: Any) -> Texts:
    """Read and tokenise the sources; without `eval_text` the last 5 % of each source is held out."""
    parts = [tokenize(read(source, tokenizer), tokenizer) for source in text]
    if eval_text:
        evaluation = [tokenize(read(source, tokenizer), tokenizer) for source in eval_text]
        return Texts(torch.cat(parts), torch.cat(evaluation), held_out=False)
    cuts = [len(part) - int(len(part) * HELD_OUT) for part in parts]
    return Texts(
        torch.cat([part[:cut] for part, cut in zip(parts, cuts, strict=True)]),
        torch.cat([part[cut:] for part, cut in zip(parts, cuts, strict=True)]),
        held_out=True,
    )


def shares(
    sources: Sequence[str], tokenizer: Any, tokens: int, seq_len: int, bos: bool, what: str
) -> Tensor | None:
    """Return windows of the first tokens of each source, `tokens` shared evenly; None without sources."""
    if not sources:
        return None
    parts = [tokenize(read(source, tokenizer), tokenizer) for source in sources]
    found = torch.cat([part[: max(2, tokens // len(parts))] for part in parts])
    return windows(found, seq_len, begin_token(tokenizer, bos), what)
