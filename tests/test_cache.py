"""The cache: what is taken from it is what would be made, to the bit, and nothing else is found there."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eckart import StoreError, decomposing, hub, identity, models, pipeline, shelf
from eckart.recipe import Recipe
from eckart.shelf import Shelf
from eckart.streaming.work import Work

from . import tiny

SMALL: dict[str, Any] = {"tokens": 1024, "gradient_tokens": 512, "seq_len": 64, "eval_tokens": 512}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was really computed: calibrations and decompositions."""
    seen: list[str] = []
    for name in ("statistics_of", "factor"):
        whole = getattr(decomposing, name)

        def counted(*given: Any, name: str = name, whole: Any = whole, **named: Any) -> Any:
            seen.append(name)
            return whole(*given, **named)

        monkeypatch.setattr(decomposing, name, counted)
    yield seen


def compressed(
    tokenizer: Any, text: Path, cache: Shelf | None, model: Any = None, **options: Any
) -> tuple[dict[str, Tensor], Any]:
    own = model if model is not None else tiny.build("llama")
    loaded = hub.Loaded(own, tokenizer, "tiny", torch.float32, None)
    recipe = Recipe(**{"keep": 0.6, "of": "linears", "text": (str(text),), **SMALL, **options})
    made, result = pipeline.finish(recipe, pipeline.prepare(recipe, loaded, shelf=cache))
    return models.state_tensors(made), result


OPTIONS: dict[str, dict[str, Any]] = {
    "eckart": {},
    "pivoted": {"form": "pivoted"},
    "width": {"form": "width"},
    "stock": {"stock": True, "multiple": 8},
    "depth": {"depth": True, "keep": 0.5},
    "svd": {"method": "svd"},
    "fwsvd": {"method": "fwsvd"},
    "shared": {"method": "basis-sharing"},
    "anchored": {"method": "aa-svd"},
    "int8": {"storage": "int8"},
    "size": {"keep": None, "size": "40KB"},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_from_the_cache_comes_the_same_model_to_the_bit(
    name: str, tokenizer: Any, text_file: Path, tmp_path: Path, runs: list[str]
) -> None:
    """Twice with a cache and once without; the second time nothing is calibrated or decomposed."""
    options, cache = OPTIONS[name], Shelf(tmp_path)
    without, expected = compressed(tokenizer, text_file, None, **options)
    compressed(tokenizer, text_file, cache, **options)
    runs.clear()
    again, result = compressed(tokenizer, text_file, cache, **options)
    assert runs == []
    assert without.keys() == again.keys()
    assert identity.of_tensors(without) == identity.of_tensors(again)
    assert (expected.modules, expected.dense, expected.compressed) == (
        result.modules, result.dense, result.compressed,
    )  # fmt: skip
    assert expected.warnings == result.warnings
    assert (expected.calibration_tokens, expected.gradient_tokens) == (
        result.calibration_tokens, result.gradient_tokens,
    )  # fmt: skip
