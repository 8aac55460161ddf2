from pathlib import Path
from typing import Any

import pytest
import torch

from eckart import ConfigError, Recipe, text, windows


def test_a_plain_file_is_read_whole(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("låw\nrank\n", encoding="utf-8")
    assert text.read(tmp_path / "a.txt", tokenizer) == "låw\nrank\n"


def test_jsonl_with_text_or_messages(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert text.read(tmp_path / "a.jsonl", tokenizer) == "one\n\ntwo"
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert text.read(tmp_path / "b.jsonl", tokenizer) == "user: hi\n"


def test_a_local_dataset(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (data / "test.jsonl").write_text('{"text": "three"}\n')
    assert text.read(str(data), tokenizer) == "one\n\ntwo"
    assert text.read(f"{data}:test", tokenizer) == "three"
    with pytest.raises(ConfigError, match="neither a file nor a dataset that can be loaded"):
        text.read(f"{data}:nosuchsplit", tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n\n", "holds no text"),
        ("bytes.txt", b"\xff\xfe\xfa", "not UTF-8 text"),
        ("bad.jsonl", b"{oops\n", "line 1: not JSON"),
        ("list.jsonl", b"[1]\n", "expected an object, got list"),
        ("other.jsonl", b'{"prompt": "x", "answer": "y"}\n', "columns prompt, answer: one named 'text'"),
    ],
)
def test_unusable_text_is_refused(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        text.read(tmp_path / name, tokenizer)


def test_a_missing_file_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no file nowhere.txt: give a text file"):
        text.read("nowhere.txt", tokenizer)


def test_messages_need_a_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    class Plain:
        chat_template = None

    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(ConfigError, match="no chat template"):
        text.read(tmp_path / "a.jsonl", Plain())


def test_windows_cut_without_overlap_and_drop_the_rest() -> None:
    rows = text.windows(torch.arange(10), 4)
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert text.windows(torch.arange(1, 8), 4, bos=0).tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    assert text.windows(torch.arange(3), 512).tolist() == [[0, 1, 2]]
    with pytest.raises(ConfigError, match="the text has 1 tokens, at least 2 are needed"):
        text.windows(torch.arange(1), 512)


def test_a_begin_token_that_is_wanted_must_exist(tokenizer: Any) -> None:
    class Without:
        bos_token_id = None

    assert text.begin_token(tokenizer, True) == tokenizer.bos_token_id
    assert text.begin_token(Without(), False) is None
    with pytest.raises(ConfigError, match="the tokenizer has no begin-of-text token"):
        text.begin_token(Without(), True)


def test_windows_are_drawn_once_and_in_order(text_file: Path, tokenizer: Any) -> None:
    def read(seed: int, tokens: int = 1024) -> tuple[list[Any], list[Any]]:
        recipe = Recipe(keep=0.5, text=(str(text_file),), tokens=tokens, seq_len=64, seed=seed)
        found = windows.read(recipe, tokenizer, warnings)
        assert found.calibration is not None
        assert found.trial is not None
        return [tuple(row) for row in found.calibration.tolist()], [
            tuple(row) for row in found.trial.tolist()
        ]

    warnings: list[str] = []
    rows, trial = read(3)
    assert read(3) == (rows, trial)
    assert read(4)[0] != rows
    assert len(rows) == 16
    assert not set(rows) & set(trial)
    assert not warnings
    whole, _ = read(3, tokens=10**6)
    assert "fewer than tokens = 1,000,000" in warnings[0]
    assert [row for row in whole if row in set(rows)] == rows


def test_held_out_text_is_the_end_and_never_calibrated_on(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a" * 190 + "b" * 10)
    texts = text.load([tmp_path / "a.txt"], [], tokenizer)
    assert tokenizer.decode(texts.calibration) == "a" * 190
    assert tokenizer.decode(texts.evaluation) == "b" * 10
    assert texts.held_out
    (tmp_path / "b.txt").write_text("c" * 30)
    texts = text.load([tmp_path / "a.txt"], [tmp_path / "b.txt"], tokenizer)
    assert len(texts.calibration) == 200
    assert tokenizer.decode(texts.evaluation) == "c" * 30
    assert not texts.held_out
