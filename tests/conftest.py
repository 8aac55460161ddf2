"""Tiny models of every architecture, a byte tokenizer and some text: all made here, nothing is fetched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import eckart
from eckart import hub

from . import tiny

logging.disable_progress_bar()
logging.set_verbosity_error()


SLOW = (
    "test_adapt_footprint", "test_adapt_session", "test_cache", "test_closed", "test_compiled",
    "test_correcting", "test_distil", "test_docs", "test_exports", "test_storing", "test_streaming_processes",
)  # fmt: skip
"""Modules whose tests take long: they start processes, or repeat whole runs. `make slow` runs them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token per byte, with a begin token and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    inner = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return fast


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve thousand characters of patterned text, so that a language model has something to see."""
    generator = torch.Generator().manual_seed(7)
    words = ["low", "rank", "matrix", "of", "the", "singular", "value", "is", "a", "sum", "and", "norm"]
    picks = torch.randint(len(words), (2400,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[pick] for pick in picks))
    return path


@pytest.fixture
def llama() -> Any:
    """A fresh tiny Llama: grouped-query attention, tied embeddings."""
    return tiny.build("llama")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A dense tiny Llama on disk with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny.build("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


Compress = Callable[..., tuple[Any, Any]]


@pytest.fixture
def compress(tokenizer: Any, text_file: Path) -> Compress:
    """Compress a tiny model with little text; keyword arguments go over these defaults."""

    def run(model: Any, **options: Any) -> tuple[Any, Any]:
        defaults: dict[str, Any] = {"tokens": 1024, "gradient_tokens": 512, "seq_len": 64}
        if not {"keep", "size", "rank", "energy", "max_ppl_increase"} & set(options):
            defaults |= {"keep": 0.6, "of": "linears"}
        if isinstance(model, torch.nn.Module):
            defaults["tokenizer"] = tokenizer
        return eckart.compress(model, **defaults | {"text": text_file} | options)

    return run


@pytest.fixture(scope="session")
def compressed_folder(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, tokenizer: Any, text_file: Path
) -> Path:
    """A tiny Llama compressed and saved."""
    out = tmp_path_factory.mktemp("models") / "small"
    model, result = eckart.compress(
        llama_folder, keep=0.6, of="linears", text=text_file, tokens=1024, gradient_tokens=512, seq_len=64
    )
    return eckart.save(model, tokenizer, out, result)


def reload(folder: Path, **options: Any) -> Any:
    """Load a folder with AutoModel, as a user does."""
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | options).eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of `model` on `tokens`."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits
    return found


assert hub.DTYPES  # eckart is imported, so its quantizer is registered


@pytest.fixture(scope="session")
def commanded(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, text_file: Path, tokenizer: Any
) -> Any:
    """Every command, run once (tests.commanded)."""
    from . import commanded as commands

    return commands.run_all(tmp_path_factory.mktemp("commands"), llama_folder, text_file, tokenizer)
