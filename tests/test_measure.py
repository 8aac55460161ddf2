from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

import eckart
from eckart import ConfigError, ModelError, NotFinite, measure
from eckart.measure import Comparison, Perplexity

from . import tiny


def windows(count: int = 5, length: int = 16) -> torch.Tensor:
    return torch.randint(2, 258, (count, length), generator=torch.Generator().manual_seed(1))


def test_perplexity_is_the_mean_over_predicted_tokens(llama: Any) -> None:
    rows = windows()
    with torch.no_grad():
        scores = llama(input_ids=rows).logits[:, :-1].double()
    expected = functional.cross_entropy(scores.reshape(-1, 258), rows[:, 1:].reshape(-1))
    found = measure.perplexity(llama, rows)
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(float(expected.exp()), rel=1e-5)
    assert (found.predicted, found.windows, found.seq_len) == (75, 5, 16)


def test_the_standard_error_is_that_of_window_means(llama: Any) -> None:
    rows = windows()
    singles = torch.tensor([measure.perplexity(llama, row[None]).loss for row in rows])
    assert measure.perplexity(llama, rows).standard_error == pytest.approx(float(singles.std() / 5**0.5))
    assert measure.perplexity(llama, rows[:1]).standard_error is None


def test_a_model_against_itself_does_not_differ(llama: Any) -> None:
    found = measure.compare(llama, llama, windows())
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert (found.agreement, found.difference, found.standard_error) == (1, 0, 0)


def test_a_model_against_another_one(llama: Any) -> None:
    other, rows = tiny.build("qwen2"), windows()
    found = measure.compare(llama, other, rows)
    assert found.difference == pytest.approx(found.model.loss - found.reference.loss)
    assert found.reference == measure.perplexity(other, rows)
    with torch.no_grad():
        own, reference = (m(input_ids=rows).logits[:, :-1].double().log_softmax(-1) for m in (llama, other))
    expected = (reference.exp() * (reference - own)).sum(-1).mean()
    assert found.kl == pytest.approx(float(expected), rel=1e-4)
    assert found.agreement == pytest.approx(float((own.argmax(-1) == reference.argmax(-1)).double().mean()))


def test_a_logit_that_is_not_finite_is_an_error(llama: Any) -> None:
    with torch.no_grad():
        llama.model.norm.weight[0] = float("inf")
    with pytest.raises(NotFinite, match="LlamaForCausalLM in torch.float32 gives logits that are NaN or inf"):
        measure.perplexity(llama, windows())


def test_a_model_that_looks_ahead_has_no_perplexity(llama: Any) -> None:
    measure.check_causal(llama)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=258, **small)
    bert = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    with pytest.raises(ModelError, match="BertLMHeadModel looks at later tokens"):
        measure.check_causal(bert)


def test_windows_longer_than_the_model_are_refused(llama: Any, llama_folder: Path, text_file: Path) -> None:
    with pytest.raises(ConfigError, match="seq_len 512: the model has 128 positions"):
        eckart.evaluate(llama_folder, text_file)


def test_evaluate_reads_paths_and_models(llama_folder: Path, text_file: Path, tokenizer: Any) -> None:
    by_path = eckart.evaluate(llama_folder, text_file, tokens=640, seq_len=64)
    by_model = eckart.evaluate(tiny.build("llama"), text_file, tokens=640, seq_len=64, tokenizer=tokenizer)
    assert isinstance(by_path, Perplexity)
    assert by_path == by_model
    assert by_path.predicted == 630
    both = eckart.evaluate(llama_folder, text_file, tokens=640, seq_len=64, against=llama_folder)
    assert isinstance(both, Comparison)
    assert both.model == by_path


def test_evaluate_checks_its_arguments(llama_folder: Path, text_file: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="tokens 1, seq_len 64: both must be at least 2"):
        eckart.evaluate(llama_folder, text_file, tokens=1, seq_len=64)
    with pytest.raises(ModelError, match="text needs a tokenizer"):
        eckart.evaluate(tiny.build("llama"), text_file, seq_len=64)
    other = tiny.build("llama")
    other.resize_token_embeddings(300)
    with pytest.raises(ModelError, match="vocabulary of 258 and .* of 300"):
        eckart.evaluate(llama_folder, text_file, tokens=128, seq_len=64, against=other)
