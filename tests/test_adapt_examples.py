"""Examples to learn from: what is learned of each kind of data, what is held out, what is refused."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from eckart import ConfigError
from eckart.adapt import examples
from eckart.adapt.examples import IGNORED, Example
from eckart.adapt.tuning import Tuning

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Answers but the last lose what stands before "=>", as templates do with what a model thought.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{{ m['content'] if loop.last else m['content'].split('=>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SENTIMENT: dict[str, Any] = {"task": "classification", "labels": ("no", "yes"), "template": "{text}\nLabel:"}
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file of rows, or of text, and return its name."""

    def run(content: str | Sequence[Any], name: str = "data.jsonl") -> str:
        whole = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        (tmp_path / name).write_text(whole, encoding="utf-8")
        return str(tmp_path / name)

    return run


def read(tokenizer: Any, *data: str, **options: Any) -> examples.Examples:
    return examples.read(Tuning(data=data, **options), tokenizer)


def one(tokenizer: Any, source: str, **options: Any) -> Example:
    """Return the only example of a source."""
    (found,) = read(tokenizer, source, **{"eval_data": (source,)} | options).train
    return found


def every(found: examples.Examples) -> list[Example]:
    return [*found.train, *found.held_out]


def learned(tokenizer: Any, example: Example) -> str:
    """Return what is learned of an example, with a gap wherever something between is not."""
    parts: list[list[int]] = [[]]
    for token, label in zip(example.ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return "|".join(tokenizer.decode(part) for part in parts if part)


@pytest.fixture(scope="session")
def beginning(tokenizer: Any) -> Any:
    """The byte tokenizer, which puts its begin token before every text by itself."""
    made = copy.deepcopy(tokenizer)
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return made


@pytest.fixture(scope="session")
def chatml(tokenizer: Any) -> Any:
    """The byte tokenizer with the tokens and the template of ChatML."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


def words(vocabulary: Sequence[str], lower: bool = False) -> Any:
    """Return a tokenizer of whole words."""
    ids = {word: index for index, word in enumerate(["[UNK]", *vocabulary])}
    inner = Tokenizer(token_models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        inner.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def test_text_is_cut_into_windows_and_all_of_it_is_learned(
    write: Write, tokenizer: Any, beginning: Any
) -> None:
    whole = "abcdefghij" * 5
    found = every(read(tokenizer, write(whole, "a.txt"), seq_len=8))
    assert tokenizer.decode([token for example in found for token in example.ids]) == whole[:48]
    assert all(example.labels == example.ids and len(example.ids) == 8 for example in found)
    begun = every(read(beginning, write(whole, "a.txt"), seq_len=8))
    assert all(example.ids[0] == beginning.bos_token_id for example in begun)
    assert "".join(tokenizer.decode(example.ids[1:]) for example in begun) == whole[:49]


@pytest.mark.parametrize("ids", ["tokenizer", "beginning"])
def test_of_a_prompt_nothing_is_learned_and_of_a_completion_all(
    ids: str, write: Write, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(ids)
    source = write([{"prompt": "Say hå: ", "completion": "hå!"}])
    found = one(tokenizer, source)
    first = tokenizer("Say hå: ")["input_ids"]
    second = [*tokenizer("hå!", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert found.ids == first + second
    assert found.labels == [IGNORED] * len(first) + second
    assert found.learned == len(second)
    assert found.prompt == first


def test_a_tokenizer_without_an_end_token_ends_with_the_completion(write: Write) -> None:
    tokenizer = words(["say", "hi"])
    found = one(tokenizer, write([{"prompt": "say", "completion": "hi"}]))
    assert found == Example([1, 2], [IGNORED, 2])


def test_a_text_is_learned_with_its_end(write: Write, tokenizer: Any, beginning: Any) -> None:
    source = write([{"text": "low rank"}])
    found = one(tokenizer, source)
    assert found.labels == found.ids == [*tokenizer("low rank")["input_ids"], tokenizer.eos_token_id]
    assert found.learned == len("low rank")  # there is nothing before the first token
    begun = one(beginning, source)
    assert begun.ids == [beginning.bos_token_id, *found.ids]
    assert begun.learned == len("low rank") + 1


def test_columns_go_by_other_names(write: Write, tokenizer: Any) -> None:
    plain = one(tokenizer, write([{"prompt": "a", "completion": "b"}]))
    columns = {"prompt": "question", "completion": "answer"}
    assert one(tokenizer, write([{"question": "a", "answer": "b"}]), columns=columns) == plain
    text = one(tokenizer, write([{"text": "abc"}]))
    assert one(tokenizer, write([{"body": "abc"}]), columns={"text": "body"}) == text
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    said = one(tokenizer, write([{"messages": chat}]))
    assert one(tokenizer, write([{"talk": chat}]), columns={"messages": "talk"}) == said
    rows = [{"body": "fine", "gold": 1}, {"body": "bad", "gold": 0}]
    labelled = read(tokenizer, write(rows), columns={"text": "body", "label": "gold"}, hold=0.5, **SENTIMENT)
    assert sorted(str(example.answer) for example in every(labelled)) == ["0", "1"]


def test_columns_that_hold_nothing_are_as_absent(write: Write, tokenizer: Any) -> None:
    plain = one(tokenizer, write([{"text": "abc"}]))
    row = {"messages": None, "prompt": None, "completion": None, "text": "abc"}
    assert one(tokenizer, write([row])) == plain


def test_numbers_are_text(write: Write, tokenizer: Any) -> None:
    plain = one(tokenizer, write([{"prompt": "6 * 7 = ", "completion": "42"}]))
    assert one(tokenizer, write([{"prompt": "6 * 7 = ", "completion": 42}])) == plain


def chat(*turns: str) -> list[dict[str, str]]:
    """Return messages: "u hello", "a hi", "s be kind"."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (("u hello", "a hi"), "hi<|im_end|>\n"),
        (("s be kind", "u hello", "a hi"), "hi<|im_end|>\n"),
        (("u hello", "a hi", "u and?", "a  spaces "), "hi<|im_end|>\n| spaces <|im_end|>\n"),
        (("u hello", "a hi", "u unanswered"), "hi<|im_end|>\n"),
        (("u hi", "a hi", "a again: hi"), "hi<|im_end|>\n|again: hi<|im_end|>\n"),
        (("u é", "a 😀é"), "😀é<|im_end|>\n"),
        # What opens a chat answers nothing.
        (("a welcome", "u hello", "a hi"), "hi<|im_end|>\n"),
    ],
)
def test_what_the_assistant_says_is_learned_and_nothing_else(
    turns: tuple[str, ...], expected: str, write: Write, chatml: Any
) -> None:
    source = write([{"messages": chat(*turns)}])
    found = one(chatml, source)
    assert chatml.decode(found.ids) == chatml.apply_chat_template(chat(*turns), tokenize=False)
    assert learned(chatml, found) == expected


@given(st.lists(st.text("ab \n<é", max_size=4), min_size=2, max_size=6))
def test_learned_and_context_together_are_the_chat(chatml: Any, said: list[str]) -> None:
    turns = [f"{'ua'[index % 2]} {content}" for index, content in enumerate(said)]
    reader = examples._Reader(Tuning(data=("x",)), chatml, ())
    found = reader._chat("here", chat(*turns))  # type: ignore[arg-type]
    expected = [f"{content}<|im_end|>\n" for content in said[1::2]]
    assert learned(chatml, found) == "|".join(expected)
    assert chatml.decode(found.ids) == chatml.apply_chat_template(chat(*turns), tokenize=False)


def test_without_a_header_for_answers_the_header_is_learned(write: Write, tokenizer: Any) -> None:
    """A template that adds nothing before an answer leaves the role to be written by the model."""
    found = one(tokenizer, write([{"messages": chat("u hello", "a hi")}]))
    assert learned(tokenizer, found) == "assistant: hi\n"


def test_tokens_of_spaces_are_learned_where_a_tokenizer_trims_them(write: Write) -> None:
    """Byte-level tokenizers may trim spaces off the offsets: those of an indentation are empty."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: index for index, letter in enumerate([*letters, "ĠĠ"])}
    inner = Tokenizer(token_models.BPE(vocab=ids, merges=[("Ġ", "Ġ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = CHATML
    offsets = tokenizer("a\n   b", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in offsets)
    found = one(tokenizer, write([{"messages": chat("u   a", "a   b\n   c\n    d  ", "u  x")}]))
    assert "".join(
        tokenizer.convert_ids_to_tokens([token for token in found.labels if token != IGNORED])
    ) == "  b\n   c\n    d  <|im_end|>\n".replace(" ", "Ġ").replace("\n", "Ċ")


def test_a_template_that_rewrites_earlier_messages_is_refused(write: Write, tokenizer: Any) -> None:
    made = copy.deepcopy(tokenizer)
    made.chat_template = FORGETFUL
    short = write([{"messages": chat("u 1+1", "a one and one =>2")}])
    assert learned(made, one(made, short)) == "one and one =>2\n"
    long = write([{"messages": chat("u 1+1", "a one and one =>2", "u +1", "a =>3")}])
    with pytest.raises(
        ConfigError,
        match=r"data.jsonl, row 1: the chat template writes messages differently when others follow, so that "
        "what the assistant says cannot be told apart; give prompt and completion",
    ):
        one(made, long)


class Slow:
    """A tokenizer without offsets."""

    chat_template = CHATML
    is_fast = False
    eos_token_id = bos_token_id = None

    def __call__(self, what: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(what)}


def test_chats_that_cannot_be_learned_are_refused(write: Write, tokenizer: Any) -> None:
    source = write([{"text": "abc"}, {"messages": chat("u a", "a b")}])
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ConfigError, match=r"jsonl, row 2 is a chat and the tokenizer has no chat template"):
        read(plain, source)
    with pytest.raises(ConfigError, match=r"row 2 is a chat and Slow does not say where .* a fast tokenizer"):
        read(Slow(), source)
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="row 2: the chat template refuses it: roles must alternate"):
        read(strict, source)
    for messages in ([], chat("u alone"), chat("a first")):
        with pytest.raises(ConfigError, match="row 1: no message of the assistant after another, so nothing"):
            read(tokenizer, write([{"messages": messages}]))
    with pytest.raises(ConfigError, match="row 1: a message must be an object with role and content"):
        read(tokenizer, write([{"messages": ["hello"]}]))


def texts(tokenizer: Any, found: Sequence[Example]) -> list[str]:
    return [tokenizer.decode(example.ids, skip_special_tokens=True) for example in found]


def test_rows_that_are_held_out_are_drawn_by_the_seed(write: Write, tokenizer: Any) -> None:
    source = write([{"text": f"row {index}"} for index in range(40)])
    drawn = {}
    for seed in (0, 1):
        found = read(tokenizer, source, hold=0.25, seed=seed)
        train, held = texts(tokenizer, found.train), texts(tokenizer, found.held_out)
        assert len(held) == 10
        assert sorted(train + held) == sorted(f"row {index}" for index in range(40))
        assert read(tokenizer, source, hold=0.25, seed=seed) == found
        for part in (train, held):  # in the order of the file
            assert part == sorted(part, key=lambda text: int(text[4:]))
        drawn[seed] = held
    assert drawn[0] != drawn[1]


def test_of_every_source_a_share_is_held_out(write: Write, tokenizer: Any) -> None:
    many = write([{"text": f"many {index}"} for index in range(20)], "many.jsonl")
    few = write([{"text": f"few {index}"} for index in range(3)], "few.jsonl")
    held = texts(tokenizer, read(tokenizer, many, few, hold=0.1).held_out)
    assert [text.split()[0] for text in held] == ["many", "many", "few"]


@pytest.mark.parametrize(("hold", "windows"), [(0.0, 1), (0.1, 1), (0.25, 2), (0.5, 5)])
def test_of_a_text_the_end_is_held_out(hold: float, windows: int, write: Write, tokenizer: Any) -> None:
    whole = "".join(chr(97 + index) * 5 for index in range(10))
    found = read(tokenizer, write(whole, "a.txt"), seq_len=5, hold=hold)
    assert "".join(texts(tokenizer, found.train)) == whole[: 50 - 5 * windows]
    assert "".join(texts(tokenizer, found.held_out)) == whole[50 - 5 * windows :]


def test_with_data_to_decide_on_nothing_is_held_out(write: Write, tokenizer: Any) -> None:
    train, other = write([{"text": "aa"}] * 3, "a.jsonl"), write([{"text": "bb"}] * 2, "b.jsonl")
    found = read(tokenizer, train, eval_data=(other,), hold=0.5)
    assert texts(tokenizer, found.train) == ["aa"] * 3
    assert texts(tokenizer, found.held_out) == ["bb"] * 2


def test_no_more_than_the_limit_is_decided_on(write: Write, tokenizer: Any) -> None:
    source = write([{"text": f"row {index}"} for index in range(30)])
    whole = read(tokenizer, source, hold=0.5)
    found = [read(tokenizer, source, hold=0.5, eval_limit=6), read(tokenizer, source, hold=0.5, eval_limit=6)]
    assert found[0] == found[1]
    assert found[0].train == whole.train
    assert len(found[0].held_out) == 6
    rest = iter(whole.held_out)
    assert all(example in rest for example in found[0].held_out)  # some of them, in order
    assert found[0].held_out != whole.held_out[:6]
    assert read(tokenizer, source, hold=0.5, eval_limit=15) == whole


def test_what_is_too_long_loses_its_end(write: Write, tokenizer: Any) -> None:
    rows = [
        {"prompt": "ab", "completion": "cdefgh"},
        {"prompt": "ab", "completion": "c"},
        {"prompt": "abcdefgh", "completion": "nothing left"},
    ]
    found = read(tokenizer, write(rows), eval_data=(write([{"text": "ab"}], "b.jsonl"),), seq_len=5)
    assert texts(tokenizer, found.train) == ["abcde", "abc"]
    assert [example.learned for example in found.train] == [3, 2]
    assert (found.cut, found.dropped) == (2, 1)


def answers(found: examples.Examples) -> list[int | None]:
    return [example.answer for example in found.train]


def test_labels_are_words_or_their_index(write: Write, tokenizer: Any) -> None:
    tsv = write("bad film\tno\n\ngood film\tyes\r\nvery\tgood \t1\nawful\t 0 \n", "a.tsv")
    found = read(tokenizer, tsv, eval_data=(tsv,), **SENTIMENT)
    assert answers(found) == [0, 1, 1, 0]
    assert found.words == ("no", "yes")
    assert [tokenizer.decode(word) for word in found.word_ids] == [" no", " yes"]
    assert texts(tokenizer, found.train)[:3] == [
        "bad film\nLabel: no",
        "good film\nLabel: yes",
        "very\tgood\nLabel: yes",
    ]
    assert [learned(tokenizer, example) for example in found.train] == [" no", " yes", " yes", " no"]
    rows = [{"text": "bad film", "label": "no"}, {"text": "good film", "label": 1}]
    assert read(tokenizer, write(rows), eval_data=(tsv,), **SENTIMENT).train == found.train[:2]


def test_lines_of_a_tsv_end_at_line_feeds_alone(write: Write, tokenizer: Any) -> None:
    tsv = write("a\u2028b\x85c\x0cd\tyes\n", "a.tsv")
    assert texts(tokenizer, read(tokenizer, tsv, eval_data=(tsv,), **SENTIMENT).train) == [
        "a\u2028b\x85c\x0cd\nLabel: yes"
    ]


def test_label_words_that_are_not_given_are_those_of_the_data(write: Write, tokenizer: Any) -> None:
    tsv = write("a\tyes\nb\tno\nc\tmaybe\nd\tno\n", "a.tsv")
    found = read(tokenizer, tsv, eval_data=(tsv,), task="classification")
    assert found.words == ("maybe", "no", "yes")
    assert answers(found) == [2, 1, 0, 1]


def test_a_template_that_ends_in_a_space_gives_words_without_one(write: Write, tokenizer: Any) -> None:
    tsv = write("a\tyes\nb\tno\n", "a.tsv")
    found = read(tokenizer, tsv, eval_data=(tsv,), **SENTIMENT | {"template": "{text}\n"})
    assert [tokenizer.decode(word) for word in found.word_ids] == ["no", "yes"]
    assert texts(tokenizer, found.train) == ["a\nyes", "b\nno"]


@pytest.mark.parametrize("ids", ["tokenizer", "beginning"])
def test_a_classified_text_that_is_too_long_keeps_the_end_of_the_template(
    ids: str, write: Write, request: pytest.FixtureRequest
) -> None:
    """And what is left of it is the same whatever the label, so that its length tells nothing."""
    tokenizer = request.getfixturevalue(ids)
    body = "abcdefghij" * 3
    tsv = write(f"{body}\tno\n{body}\tyes\nshort\tno\n", "a.tsv")
    found = read(tokenizer, tsv, eval_data=(tsv,), seq_len=20, **SENTIMENT)
    begin = int(ids == "beginning")
    kept = 20 - len("\nLabel: yes") - begin
    assert texts(tokenizer, found.train) == [
        body[-kept:] + "\nLabel: no",
        body[-kept:] + "\nLabel: yes",
        "short\nLabel: no",
    ]
    assert found.train[0].prompt == found.train[1].prompt
    assert all(example.ids[:begin] == [0][:begin] for example in found.train)
    assert [len(example.ids) for example in found.train[:2]] == [19, 20]
    assert (found.cut, found.dropped) == (4, 0)  # to learn from and to decide on


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", "x", {}, "a.txt has 1 tokens, at least 2 are needed"),
        (
            "a.jsonl",
            '{"question": "x", "answer": "y"}\n',
            {},
            "a.jsonl, row 1, has the columns 'question', 'answer': 'messages', 'prompt' and 'completion', "
            "or 'text' needed; say what they are called, e.g. --columns prompt=question",
        ),
        (
            "a.jsonl",
            '{"text": "x"}\n{"ask": "x"}\n',
            {"columns": {"prompt": "q", "text": "body", "completion": "a", "messages": "m"}},
            "a.jsonl, row 1, has the columns 'text': 'm', 'q' and 'a', or 'body' needed",
        ),
        ("a.jsonl", '{"text": "xy"}\n{"text": null}\n', {}, "a.jsonl, row 2, has no columns: 'messages', "),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user"}], "completion": "y"}\n',
            {},
            "a.jsonl, row 1: 'prompt' holds a list, expected text",
        ),
        ("a.jsonl", '{"text": {"a": 1}}\n', {}, "a.jsonl, row 1: 'text' holds a dict, expected text"),
        (
            "a.jsonl",
            '{"text": "x", "gold": "y"}\n',
            SENTIMENT,
            "a.jsonl, row 1, has the columns 'text', 'gold': 'text' and 'label' needed; say what they are",
        ),
        (
            "a.jsonl",
            '{"text": "x", "label": "no"}\n{"text": "x", "label": null}\n',
            SENTIMENT,
            "a.jsonl, row 2, has the columns 'text': 'text' and 'label' needed",
        ),
        (
            "a.jsonl",
            '{"text": "x", "label": ["no"]}\n',
            SENTIMENT,
            "a.jsonl, row 1: 'label' holds a list, expected text",
        ),
        (
            "a.tsv",
            "x\tno\n",
            {},
            "a.tsv: a .tsv has label words; pass --task classification, or give a .jsonl",
        ),
        ("a.txt", "x\tno\n", SENTIMENT, "a.txt: classification takes a .tsv, a .jsonl or a dataset"),
        ("a.tsv", "x\tno\nyes\n", SENTIMENT, "a.tsv, line 2: expected a text, a tab and a label"),
        *[
            (
                "a.tsv",
                f"x\t{label}\n",
                SENTIMENT,
                f"a.tsv has the label '{label}': legal are no, yes, or their index",
            )
            for label in ("maybe", "2", "-1", "²", "1.0", "No")
        ],
        (
            "a.tsv",
            "x\t10\ny\t9\nz\tfine\n",
            {"task": "classification"},
            "the labels 9, 10 are numbers: give their words in order, e.g. --labels negative",
        ),
        (
            "a.tsv",
            "x\tno\ny\tno\n",
            {"task": "classification"},
            "'no' is the only label word: to choose, at least two are needed",
        ),
        (
            "a.tsv",
            "x\tno\n",
            SENTIMENT | {"labels": ("no", "no")},
            "the label words no, no: two of them have the same tokens",
        ),
        (
            "a.tsv",
            "x\tno\n",
            SENTIMENT | {"seq_len": 4},
            "seq_len 4: a label word has 4 tokens, give 5 or more",
        ),
        (
            "a.jsonl",
            '{"text": "one"}\n',
            {},
            "0 examples to learn from and 1 held out, of at most 512 tokens (0 had nothing to learn within "
            "them): give more data, a longer seq_len, or another hold",
        ),
        (
            "a.jsonl",
            '{"text": "one"}\n{"text": "two"}\n',
            {"hold": 1.0},
            "0 examples to learn from and 2 held",
        ),
        (
            "a.jsonl",
            '{"prompt": "long enough", "completion": "x"}\n' * 3,
            {"seq_len": 8},
            "0 examples to learn from and 0 held out, of at most 8 tokens (3 had nothing to learn within",
        ),
        ("a.jsonl", "\n", {}, "0 examples to learn from and 0 held out"),
        ("a.tsv", "\n", {"task": "classification"}, "0 examples to learn from and 0 held out"),
    ],
)
def test_unusable_data_is_refused(
    name: str, content: str, options: dict[str, Any], message: str, write: Write, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tokenizer, write(content, name), **options)


def test_there_must_be_data(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no data: give at least one source to learn from"):
        read(tokenizer)
    with pytest.raises(ConfigError, match=r"no file nowhere.jsonl: give a text file"):
        read(tokenizer, "nowhere.jsonl")


def test_label_words_must_be_in_the_vocabulary(write: Write) -> None:
    tsv = write("good\tyes\nbad\tNo\n", "a.tsv")
    known = words(["good", "bad", "Label", ":", "yes", "No"])
    assert read(known, tsv, eval_data=(tsv,), task="classification").word_ids == ((6,), (5,))
    with pytest.raises(
        ConfigError, match="the label word 'No' is not in the vocabulary: choose another by --labels"
    ):
        read(words(["good", "bad", "Label", ":", "yes"]), tsv, task="classification")
    with pytest.raises(ConfigError, match="the label words yes, YES: two of them have the same tokens"):
        read(words(["good", "yes"], lower=True), tsv, task="classification", labels=("yes", "YES"))
