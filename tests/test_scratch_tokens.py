"""A tokenizer of one's own."""

import pytest

from eckart.errors import ConfigError
from eckart.scratch import tokens

TEXT = ["the rank of the matrix and the norm of the matrix\n", "the value"] * 20


@pytest.mark.parametrize("vocabulary", [257, 270])
def test_any_text_comes_back(vocabulary: int) -> None:
    tokenizer = tokens.train(TEXT, vocabulary)
    for text in (*TEXT, " äöü \t\n\n漢字 🙂 \x00"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id
    assert len(tokenizer) == vocabulary


def test_merges_make_texts_shorter_and_bytes_do_not() -> None:
    lengths = [len(tokens.train(TEXT, size)(TEXT[0])["input_ids"]) for size in (257, 265, 280)]
    assert lengths[0] == len(TEXT[0].encode())
    assert lengths == sorted(set(lengths), reverse=True)
    assert tokens.train(TEXT, 400).get_vocab() == tokens.train(TEXT, 400).get_vocab()


def test_fewer_than_all_bytes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocabulary 200: at least 257, every byte"):
        tokens.train(TEXT, 200)
