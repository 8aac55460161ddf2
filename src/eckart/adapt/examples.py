"""Examples to learn from: text, prompts with completions, chats, texts with label words; as tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from .. import text
from ..errors import ConfigError
from .tuning import Tuning

IGNORED = -100
"""The label of a token that nothing is learned from."""

_ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids; for each the id to learn there, or IGNORED; the index of the label word, if there is one."""

    ids: list[int]
    labels: list[int]
    answer: int | None = None

    @property
    def learned(self) -> int:
        """Tokens that something is learned from; the first one of a row has nothing before it."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def prompt(self) -> list[int]:
        """The ids before the first that is learned."""
        return self.ids[: next(index for index, label in enumerate(self.labels) if label != IGNORED)]


@dataclass(frozen=True, slots=True)
class Examples:
    """What is learned from and what is decided on.

    Args:
        train, held_out: disjoint where they come from the same source.
        words: classification: the label words ...
        word_ids: ... and their tokens, as they follow a text.
        cut: examples that were longer than seq_len.
        dropped: of these, those of which nothing to learn was left.
    """

    train: list[Example]
    held_out: list[Example]
    words: tuple[str, ...]
    word_ids: tuple[tuple[int, ...], ...]
    cut: int
    dropped: int


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    examples: list[Example]
    in_order: bool


def read(tuning: Tuning, tokenizer: Any) -> Examples:
    """Read and tokenise the sources of `tuning`.

    A `.txt` file is one text, in windows of `seq_len`. The rows of a `.jsonl` file or a dataset have a
    column `messages` (learned: what the assistant says, and what the chat template ends it with; not what
    opens the chat), `prompt` and `completion` (learned: the completion and the end token), or `text`; for
    classification `text` and `label`. A `.tsv` file has a text, a tab and a label on each line. `columns`
    says what these are called instead. Without `eval_data` a share `hold` is held out: the end of a text,
    and rows that `seed` draws.

    Raises:
        ConfigError: a source cannot be read, lacks a column or holds nothing to learn from; a label that is
            not among the label words, or a label word that the vocabulary does not have; a chat in which
            what the assistant says cannot be told apart.
    """
    if not tuning.data:
        raise ConfigError("no data: give at least one source to learn from")
    words = _words(tuning)
    reader = _Reader(tuning, tokenizer, words)
    train = [reader.source(name) for name in tuning.data]
    if tuning.eval_data:
        held = [reader.source(name).examples for name in tuning.eval_data]
    else:
        cut = [_split(source, tuning) for source in train]
        train, held = [pair[0] for pair in cut], [pair[1].examples for pair in cut]
    held_out = [example for part in held for example in part]
    found = Examples(
        train=[example for source in train for example in source.examples],
        held_out=_sample(held_out, tuning.eval_limit, tuning.seed),
        words=words,
        word_ids=reader.word_ids,
        cut=reader.cut,
        dropped=reader.dropped,
    )
    if not found.train or not found.held_out:
        raise ConfigError(
            f"{len(found.train)} examples to learn from and {len(found.held_out)} held out, of at most "
            f"{tuning.seq_len} tokens ({found.dropped} had nothing to learn within them): give more data, a "
            "longer seq_len, or another hold"
        )
    return found


def _sample(examples: list[Example], most: int, seed: int) -> list[Example]:
    if len(examples) <= most:
        return examples
    picks = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:most]
    return [examples[index] for index in sorted(picks.tolist())]


def _split(source: _Source, tuning: Tuning) -> tuple[_Source, _Source]:
    count = len(source.examples)
    size = min(count, max(1, round(tuning.hold * count)))
    if source.in_order:
        held = set(range(count - size, count))
    else:
        generator = torch.Generator().manual_seed(tuning.seed)
        held = set(torch.randperm(count, generator=generator)[:size].tolist())
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, example in enumerate(source.examples):
        parts[index in held].append(example)
    return tuple(_Source(source.name, part, source.in_order) for part in parts)  # type: ignore[return-value]


def _words(tuning: Tuning) -> tuple[str, ...]:
    """Return the label words: those that are given, else those of the data, in the order of the alphabet."""
    if tuning.task != "classification" or tuning.labels:
        return tuning.labels
    found = {label for name in tuning.data for _, label in _labelled(name, tuning)}
    numbers = sorted((word for word in found if word.removeprefix("-").isdecimal()), key=int)
    if numbers:
        raise ConfigError(
            f"the labels {', '.join(numbers)} are numbers: give their words in order, e.g. "
            "--labels negative --labels positive"
        )
    return tuple(sorted(found))


def _column(tuning: Tuning, name: str) -> str:
    return (tuning.columns or {}).get(name, name)


def _labelled(name: str, tuning: Tuning) -> Iterator[tuple[str, str]]:
    """Yield (text, label) of every row."""
    path = Path(name)
    if path.is_file() and path.suffix == ".tsv":
        for number, line in enumerate(text.plain(path).split("\n"), 1):
            if line.strip():
                body, tab, label = line.rpartition("\t")
                if not tab:
                    raise ConfigError(f"{name}, line {number}: expected a text, a tab and a label")
                yield body.strip(), label.strip()
        return
    if path.is_file() and path.suffix != ".jsonl":
        raise ConfigError(f"{name}: classification takes a .tsv, a .jsonl or a dataset")
    wanted = (_column(tuning, "text"), _column(tuning, "label"))
    for number, row in enumerate(text.rows(name), 1):
        if any(row.get(column) is None for column in wanted):
            raise _missing(name, number, row, " and ".join(map(repr, wanted)))
        body, label = (_said(name, number, row, column).strip() for column in wanted)
        yield body, label


def _missing(name: str, number: int, row: Mapping[str, Any], wanted: str) -> ConfigError:
    filled = ", ".join(repr(column) for column, value in row.items() if value is not None)
    return ConfigError(
        f"{name}, row {number}, has {f'the columns {filled}' if filled else 'no columns'}: {wanted} needed; "
        "say what they are called, e.g. --columns prompt=question"
    )


def _said(name: str, number: int, row: Mapping[str, Any], column: str) -> str:
    """Return what a row says in `column`, as text."""
    found = row[column]
    if not isinstance(found, (str, int, float)):
        raise ConfigError(f"{name}, row {number}: {column!r} holds a {type(found).__name__}, expected text")
    return str(found)


class _Reader:
    """Rows in, examples out; counts what did not fit."""

    def __init__(self, tuning: Tuning, tokenizer: Any, words: Sequence[str]) -> None:
        self.tuning, self.tokenizer, self.words = tuning, tokenizer, list(words)
        self.cut = self.dropped = 0
        self.begin = _begin(tokenizer)
        self.gap = "" if tuning.template[-1:].isspace() else " "
        self.word_ids = tuple(self._word(word) for word in words)
        self.longest = max(map(len, self.word_ids), default=0)
        self._check_words()

    def _check_words(self) -> None:
        if len(self.words) == 1:
            raise ConfigError(f"{self.words[0]!r} is the only label word: to choose, at least two are needed")
        if len(set(self.word_ids)) < len(self.word_ids):
            raise ConfigError(f"the label words {', '.join(self.words)}: two of them have the same tokens")
        least = self.longest + len(self.begin_ids) + 1
        if self.words and self.tuning.seq_len < least:
            raise ConfigError(
                f"seq_len {self.tuning.seq_len}: a label word has {self.longest} tokens, give {least} or more"
            )

    def _word(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._ids(self.gap + word))
        if not ids or getattr(self.tokenizer, "unk_token_id", None) in ids:
            raise ConfigError(f"the label word {word!r} is not in the vocabulary: choose another by --labels")
        return ids

    def _ids(self, what: str) -> list[int]:
        return list(self.tokenizer(what, add_special_tokens=False, verbose=False)["input_ids"])

    def source(self, name: str) -> _Source:
        """Return the examples of one source."""
        if self.tuning.task == "classification":
            found = [self._classified(name, *row) for row in _labelled(name, self.tuning)]
            return _Source(name, self._kept(found), False)
        path = Path(name)
        if path.is_file() and path.suffix == ".tsv":
            raise ConfigError(f"{name}: a .tsv has label words; pass --task classification, or give a .jsonl")
        if path.is_file() and path.suffix != ".jsonl":
            return _Source(name, self._windows(text.plain(path), name), True)
        rows = enumerate(text.rows(name), 1)
        return _Source(name, self._kept([self._row(name, number, row) for number, row in rows]), False)

    def _kept(self, examples: Iterable[Example]) -> list[Example]:
        """Return the examples, cut to seq_len, that something is left to learn from."""
        kept, most = [], self.tuning.seq_len
        for example in examples:
            self.cut += len(example.ids) > most
            short = Example(example.ids[:most], example.labels[:most], example.answer)
            if short.learned:
                kept.append(short)
            else:
                self.dropped += 1
        return kept

    def _windows(self, whole: str, name: str) -> list[Example]:
        tokens = text.tokenize(whole, self.tokenizer)
        found = text.windows(tokens, self.tuning.seq_len, self.begin, name)
        return [Example(row, list(row)) for row in found.tolist()]

    def _classified(self, name: str, body: str, label: str) -> Example:
        if label in self.words:
            answer = self.words.index(label)
        elif label.isdecimal() and int(label) < len(self.words):
            answer = int(label)
        else:
            legal = ", ".join(self.words)
            raise ConfigError(f"{name} has the label {label!r}: legal are {legal}, or their index from 0")
        word = list(self.word_ids[answer])
        # What is too long loses the beginning of its text: the end of the template must stand. Every word
        # must fit after it, and how much is left must not tell which one does.
        room = self.tuning.seq_len - self.longest - len(self.begin_ids)
        prompt = self._ids(self.tuning.template.replace("{text}", body))
        self.cut += len(prompt) > room
        prompt = self.begin_ids + prompt[-room:]
        return Example(prompt + word, [IGNORED] * len(prompt) + word, answer)

    @property
    def begin_ids(self) -> list[int]:
        """What every example begins with."""
        return [] if self.begin is None else [self.begin]

    def _row(self, name: str, number: int, row: Mapping[str, Any]) -> Example:
        prompt, completion, body, messages = (
            _column(self.tuning, key) for key in ("prompt", "completion", "text", "messages")
        )
        row = {column: value for column, value in row.items() if value is not None}
        if isinstance(row.get(messages), list):
            return self._chat(f"{name}, row {number}", row[messages])
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if prompt in row and completion in row:
            first, second = (self._ids(_said(name, number, row, column)) for column in (prompt, completion))
            first = self.begin_ids + first
            return Example(first + second + end, [IGNORED] * len(first) + second + end)
        if body in row:
            ids = self.begin_ids + self._ids(_said(name, number, row, body)) + end
            return Example(ids, list(ids))
        wanted = f"{messages!r}, {prompt!r} and {completion!r}, or {body!r}"
        raise _missing(name, number, row, wanted)

    def _chat(self, where: str, messages: list[Mapping[str, Any]]) -> Example:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(f"{where} is a chat and the tokenizer has no chat template: give other rows")
        if not getattr(self.tokenizer, "is_fast", False):
            raise ConfigError(
                f"{where} is a chat and {type(self.tokenizer).__name__} does not say where in the text its "
                "tokens stand: take a fast tokenizer, or give prompt and completion"
            )
        whole, spans = self._spans(where, messages)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        # By their ends, too: where a tokenizer trims spaces off its offsets a token of spaces is empty.
        labels = [
            token if any(low <= start and low < end <= high for low, high in spans) else IGNORED
            for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        return Example(ids, labels)

    def _spans(self, where: str, messages: list[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Return the chat as text, and from where to where the assistant speaks."""
        if not all(isinstance(message, Mapping) for message in messages):
            raise ConfigError(f"{where}: a message must be an object with role and content")
        # What opens the chat answers nothing; what the template puts before it cannot be told apart.
        turns = [
            index for index, message in enumerate(messages) if message.get("role") == _ASSISTANT and index
        ]
        if not turns:
            raise ConfigError(f"{where}: no message of the assistant after another, so nothing to learn")
        whole = self._render(where, messages)
        spans = []
        for index in turns:
            before = self._render(where, messages[:index], answer=True)
            after = self._render(where, messages[: index + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise ConfigError(
                    f"{where}: the chat template writes messages differently when others "
                    "follow, so that what the assistant says cannot be told apart; give prompt and completion"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _render(self, where: str, messages: list[Mapping[str, Any]], answer: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
            )
        except TemplateError as error:
            raise ConfigError(f"{where}: the chat template refuses it: {error}") from error


def _begin(tokenizer: Any) -> int | None:
    """Return the begin token if the tokenizer puts one before every text by itself."""
    begin: int | None = getattr(tokenizer, "bos_token_id", None)
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return begin if begin is not None and first == [begin] else None
