"""Export: the same function without eckart, and what it says of the saving."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, ModelError, StoreError, hub
from eckart.cli import app
from eckart.exporting import Exported

from . import tiny
from .conftest import Compress, logits, reload


def test_dense_is_the_same_function_in_a_stock_model(compressed_folder: Path, tmp_path: Path) -> None:
    found = eckart.export(compressed_folder, tmp_path / "out", "dense")
    assert isinstance(found, Exported)
    assert "eckart" not in (tmp_path / "out" / "config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    small, dense = reload(compressed_folder), reload(tmp_path / "out")
    assert {type(module) for module in dense.modules()} == {type(m) for m in tiny.build("llama").modules()}
    expected = logits(small, tiny.tokens())
    assert torch.allclose(logits(dense, tiny.tokens()), expected, atol=2e-4 * float(expected.abs().max()))
    assert found.difference is not None
    assert found.difference < 1e-4
    assert found.parameters == (
        sum(value.numel() for value in small.parameters()),
        sum(value.numel() for value in dense.parameters()),
    )
    assert found.parameters[0] < found.parameters[1]
    assert found.bytes == (hub.weight_bytes(compressed_folder), hub.weight_bytes(tmp_path / "out"))
    assert "nothing" in str(found)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{found.bytes[1]:,}" in card
    assert "import eckart" not in card


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_few_bits_become_the_values_that_they_stand_for(
    storage: str, compress: Compress, tokenizer: Any, tmp_path: Path
) -> None:
    model, result = compress(tiny.build("llama"), storage=storage, dtype="bfloat16")
    eckart.save(model, tokenizer, tmp_path / "small", result)
    found = eckart.export(tmp_path / "small", tmp_path / "out", dtype="float32")
    assert isinstance(found, Exported)
    assert found.dtype == "float32"
    assert found.difference is not None
    assert found.difference < 1e-4
    expected = logits(reload(tmp_path / "small", dtype=torch.float32), tiny.tokens())
    again = logits(reload(tmp_path / "out"), tiny.tokens())
    assert torch.allclose(again, expected, atol=2e-4 * float(expected.abs().max()))
    rounded = eckart.export(tmp_path / "small", tmp_path / "rounded")
    assert isinstance(rounded, Exported)
    assert rounded.dtype == "bfloat16"
    assert rounded.bytes[1] < found.bytes[1]


def test_the_command_says_what_it_did(compressed_folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["export", str(compressed_folder), "--out", str(tmp_path / "out"), "--json"]
    )
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["target"] == "dense"
    assert values["bytes"][1] == hub.weight_bytes(tmp_path / "out")


def test_what_cannot_be_exported_is_refused(
    compressed_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="form 'exe': legal are dense"):
        eckart.export(compressed_folder, tmp_path / "out", "exe")
    with pytest.raises(ConfigError, match="dtype 'int3': legal are"):
        eckart.export(compressed_folder, tmp_path / "out", dtype="int3")
    with pytest.raises(ModelError, match="is not compressed by eckart: nothing is to be multiplied out"):
        eckart.export(llama_folder, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(StoreError, match="exists"):
        eckart.export(compressed_folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())
