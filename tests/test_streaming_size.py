"""Streamed runs of checkpoints as they come: in bfloat16, computed in another dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from eckart.linalg import Metric, weighted_svd
from eckart.measure import Perplexity
from eckart.recipe import Recipe
from eckart.streaming.execute import compress_to

from . import tiny
from .conftest import logits, reload


@pytest.mark.parametrize("name", ["llama", "llama-bias-untied"])
def test_what_is_stored_in_few_bits_is_computed_and_written_as_in_memory(
    tmp_path: Path, tokenizer: Any, text_file: Path, name: str
) -> None:
    folder = tmp_path / "source"
    tiny.build(name).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options: dict[str, Any] = {
        "keep": 0.7, "of": "linears", "form": "pivoted", "tokens": 512, "gradient_tokens": 256, "seq_len": 64,
        "device": "cpu",
    }  # fmt: skip
    recipe = Recipe(model=str(folder), text=(str(text_file),), **options)
    found = compress_to(recipe, tmp_path / "out", memory="8GB")
    model, result = eckart.compress(str(folder), text=text_file, **options)
    assert found.dtype == result.dtype == "bfloat16"
    for ours, theirs in ((found.dense, result.dense), (found.compressed, result.compressed)):
        assert isinstance(ours, Perplexity)
        assert isinstance(theirs, Perplexity)
        assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-3)
    tokens = torch.arange(48)[None] * 5 % 200
    written, wanted = logits(reload(tmp_path / "out").float(), tokens), logits(model.float(), tokens)
    dense = logits(tiny.build(name), tokens)
    assert (written - wanted).norm() < 0.1 * (written - dense).norm()


def test_every_factor_of_the_metric_gives_the_same_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)

    def metric(size: int) -> Metric:
        rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
        return Metric(size, rows.T @ rows / len(rows))

    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    inputs, outputs = metric(9), metric(6)
    found = weighted_svd(weight, inputs, outputs)
    rooted = outputs.root_times(weight)
    values, vectors = torch.linalg.eigh(rooted @ inputs.times(rooted.T))
    left = outputs.inverse_root_times(vectors.flip(1))
    assert torch.allclose(found.spectrum, values.flip(0).sqrt())
    assert torch.allclose(found.left.abs(), left.abs())
    assert not torch.allclose(found.left.abs(), vectors.flip(1).abs(), rtol=0.01)


def test_a_factor_undoes_itself_and_gives_the_metric() -> None:
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metric, eye = Metric(5, rows.T @ rows), torch.eye(5, dtype=torch.float64)
    factor = metric.factor_times(eye)
    assert torch.allclose(factor.T @ factor, metric.dense())
    assert not torch.allclose(factor, factor.T)  # no symmetric root is formed
    assert torch.allclose(metric.factor_solve(factor), eye)
    singular = Metric(5, rows[:3].T @ rows[:3])
    root = singular.factor_times(eye)
    assert torch.allclose(root.T @ root, singular.dense())
    with pytest.raises(eckart.NotPositiveDefinite, match="raise `damp`"):
        singular.factor_solve(eye)
