"""What is unfolded while it is treated is healed, quantised and made shallower, and comes out stock."""

from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from eckart import Recipe, hub, kinds, models
from eckart.healing import Healing

from . import tiny
from .conftest import Compress, logits, reload

HEALING = Healing(steps=("ranks", "closed", "block", "logits"), tokens=256, fit_tokens=256, seq_len=32)


def classes(model: Any) -> list[Any]:
    """Return the classes of the modules of `model`."""
    return [type(module) for module in model.modules()]


def saved(model: Any, result: Any, tokenizer: Any, folder: Path) -> Any:
    """Return `model` as it loads after it was saved: the same, in as many bytes as the result says."""
    before = logits(model, tiny.tokens())
    eckart.save(model, tokenizer, folder, result)
    assert hub.weight_bytes(folder) == result.after.bytes
    again = reload(folder)
    assert torch.allclose(logits(again, tiny.tokens()), before, atol=1e-5 * float(before.abs().max()))
    return again


@pytest.mark.parametrize(("name", "split"), [("gpt2", "none"), ("phi3", "fused"), ("mixtral", "none")])
def test_a_model_is_healed_and_then_stored_in_few_bits(
    name: str, split: Any, compress: Compress, tmp_path: Path, tokenizer: Any, text_file: Path
) -> None:
    stock = classes(tiny.build(name))
    model, result = compress(tiny.build(name), split=split, heal=HEALING)
    assert [step.step for step in result.healing] == list(HEALING.steps)
    assert any(step.gain for step in result.healing)
    again = saved(model, result, tokenizer, tmp_path / "healed")
    text = {"text": text_file, "tokens": 1024, "gradient_tokens": 512, "seq_len": 64, "tokenizer": tokenizer}
    small, stored = eckart.quantise(again, "int8", **text)
    assert not any(row.name.endswith(("gate", "router")) for row in stored.modules)
    last = saved(small, stored, tokenizer, tmp_path / "stored")
    assert classes(eckart.densify(last)) == stock


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_dense_model_is_stored_in_few_bits(
    name: str, tmp_path: Path, tokenizer: Any, text_file: Path
) -> None:
    dense = tiny.build(name)
    stock, before = classes(dense), {key: value.clone() for key, value in dense.state_dict().items()}
    text = {"text": text_file, "tokens": 1024, "gradient_tokens": 512, "seq_len": 64, "tokenizer": tokenizer}
    small, result = eckart.quantise(dense, "int8", **text)
    assert all(row.storage == "int8" for row in result.modules)
    again = saved(small, result, tokenizer, tmp_path / "stored")
    plain = eckart.densify(again)
    assert classes(plain) == stock
    changed = 0
    for key, value in plain.state_dict().items():
        error = float((value - before[key]).norm())
        assert error <= 0.02 * float(before[key].norm())
        changed += error > 0
    assert changed >= 9


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_blocks_are_left_out(name: str, compress: Compress, tmp_path: Path, tokenizer: Any) -> None:
    model, result = compress(tiny.build(name, num_hidden_layers=4), depth=True, keep=0.3)
    assert any(row.form == "dropped" for row in result.modules)
    assert len(models.block_names(model)) < 4
    again = saved(model, result, tokenizer, tmp_path / "shallow")
    assert len(models.block_names(eckart.densify(again))) == len(models.block_names(model))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "falcon"])
def test_an_ordinary_model_of_the_same_architecture(
    name: str, compress: Compress, tmp_path: Path, tokenizer: Any
) -> None:
    model, result = compress(tiny.build(name), keep=0.8, recipe=Recipe(keep=0.8, stock=True, multiple=4))
    assert classes(model) == classes(tiny.build(name))
    assert "eckart" not in str(getattr(model.config, "quantization_config", ""))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in tiny.build(name).parameters())
    saved(model, result, tokenizer, tmp_path / "stock")


def test_the_same_kinds_in_a_second_compression_are_refused_as_everywhere(compress: Compress) -> None:
    model, _ = compress(tiny.build("gpt2"))
    with pytest.raises(eckart.ModelError, match="already low-rank"):
        compress(model)
    assert not any(isinstance(part, torch.nn.Linear) and kinds.stock(part) for part in model.modules())
    assert Recipe(keep=0.5).split == "none"
