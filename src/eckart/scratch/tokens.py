"""A tokenizer of one's own: byte-level pairs, merged by how often they come in the text."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from ..errors import ConfigError

END = "<|endoftext|>"
BYTES = 257
"""The least vocabulary: every byte, and the end of a text."""


def train(texts: Iterable[str], vocabulary: int) -> Any:
    """Return a tokenizer of at most `vocabulary` tokens: bytes, the end of a text, and frequent pairs.

    Byte-level byte-pair encoding as in GPT-2 (Sennrich et al. 2016): any text comes back as it was. It has
    fewer tokens where the text has fewer pairs that come twice. BYTES gives one token per byte.

    Raises:
        ConfigError: fewer than BYTES tokens.
    """
    if vocabulary < BYTES:
        raise ConfigError(f"vocabulary {vocabulary}: at least {BYTES}, every byte and the end of a text")
    inner = Tokenizer(kinds.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END)
