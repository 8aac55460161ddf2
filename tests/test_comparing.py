"""Two models side by side: a model and itself, a matrix and what was made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, ModelError, comparing
from eckart.cli import app
from eckart.factors import LowRankLinear

from . import tiny

FEW: dict[str, Any] = {"tokens": 512, "seq_len": 64, "new_tokens": 5}


def test_a_model_and_itself(llama_folder: Path, text_file: Path) -> None:
    found = eckart.compare(llama_folder, llama_folder, text=text_file, prompts=["low rank"], **FEW)
    assert found.quality is not None
    assert found.quality.difference == 0
    assert found.quality.kl == pytest.approx(0, abs=1e-6)
    assert all(pair.change == 0 and pair.parameters_a == pair.parameters_b for pair in found.matrices)
    assert [sample.a for sample in found.samples] == [sample.b for sample in found.samples]


@pytest.mark.parametrize("options", [{"form": "pivoted"}, {"form": "factored"}, {"form": "width"},
                                     {"storage": "int8"}], ids=str)  # fmt: skip
def test_what_compression_did_to_each_matrix(compress: Any, options: dict[str, str]) -> None:
    dense = tiny.build("llama")
    small, result = compress(tiny.build("llama"), **options)
    found = eckart.compare(dense, small, new_tokens=0)
    moved = comparing.narrowed(comparing.maps(small))
    wide = eckart.densify(small)
    after = {module.name: module.after for module in result.modules}
    assert bool(moved) == (options == {"form": "width"})
    for pair in found.matrices:
        own, other = (model.get_submodule(pair.name).weight.detach().double() for model in (dense, wide))
        expected = float((own - other).norm() / own.norm())
        assert pair.change == (None if pair.name in moved else pytest.approx(expected, rel=1e-4, abs=1e-6))
        assert pair.parameters_b == after[pair.name]
        assert pair.shape_a == pair.shape_b == tuple(own.shape)
    assert any(pair.change and pair.change > 1e-3 for pair in found.matrices)


def test_channels_that_stand_elsewhere_are_not_compared(compress: Any) -> None:
    """Which channels a narrower map has left is not stored: that of another model is another one."""
    dense = tiny.build("llama")
    small, result = compress(tiny.build("llama"), form="width")
    found = eckart.compare(dense, small, new_tokens=0)
    forms = {module.name: module.form for module in result.modules}
    moved = {pair.name for pair in found.matrices if pair.change is None}
    assert moved == comparing.narrowed(comparing.maps(small))
    narrower = {name for name, form in forms.items() if form in ("narrow", "partial")}
    assert {name for name in narrower if name.endswith(("v_proj", "o_proj", "gate_proj"))} <= moved
    assert any(name.endswith("v_proj") for name in moved)
    # Rotary pairs are where they were.
    assert any(name.endswith("q_proj") for name in narrower - moved)
    assert f"{len(moved)} matrices are narrower inside of an MLP or a head" in "".join(found.notes)
    assert moved == {
        pair.name for pair in eckart.compare(small, dense, new_tokens=0).matrices if pair.change is None
    }


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_kinds_of_matrices_and_models_stay_as_they_are(name: str, compress: Any) -> None:
    dense = tiny.build(name)
    small, _ = compress(tiny.build(name), method="svd", text=None)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = [model(input_ids=ids).logits for model in (dense, small)]
    kinds = [[type(module) for module in model.modules()] for model in (dense, small)]
    found = eckart.compare(dense, small, new_tokens=0)
    assert found.matrices
    assert all(pair.change is not None for pair in found.matrices)
    assert [[type(module) for module in model.modules()] for model in (dense, small)] == kinds
    with torch.no_grad():
        after = [model(input_ids=ids).logits for model in (dense, small)]
    assert all(torch.equal(now, was) for now, was in zip(after, before))


def test_narrower_models_have_no_difference() -> None:
    small = tiny.build("llama", intermediate_size=32)
    found = eckart.compare(tiny.build("llama"), small, new_tokens=0)
    other = [pair for pair in found.matrices if pair.shape_a != pair.shape_b]
    assert other
    assert all(pair.change is None for pair in other)
    assert "other shapes in B" in "".join(found.notes)


def test_the_matrix_of_a_module_is_what_it_computes(compress: Any) -> None:
    small, _ = compress(tiny.build("llama"), form="pivoted", storage="int8")
    modules = comparing.maps(small)
    assert any(isinstance(module, LowRankLinear) for module in modules.values())
    for module in modules.values():
        found = comparing.matrix(module).float()
        identity = torch.eye(found.shape[1])
        with torch.no_grad():
            shift = module(torch.zeros(1, found.shape[1]))
            assert torch.allclose((module(identity) - shift).T, found, atol=1e-5)


def test_what_cannot_be_compared(llama: Any) -> None:
    with pytest.raises(ModelError, match="models with different tokenizers cannot be compared"):
        eckart.compare(llama, tiny.build("llama", vocab_size=99), new_tokens=0)
    with pytest.raises(ConfigError, match="new_tokens -1: must be at least 0"):
        eckart.compare(llama, llama, new_tokens=-1)
    with pytest.raises(ModelError, match="prompts need a tokenizer"):
        eckart.compare(llama, llama, prompts=["a"])


def test_the_command(tmp_path: Path, llama_folder: Path, compressed_folder: Path, text_file: Path) -> None:
    out = tmp_path / "both.html"
    command = ["compare", str(llama_folder), str(compressed_folder), "--text", str(text_file),
               "--tokens", "512", "--seq-len", "64", "--new-tokens", "4", "--out", str(out)]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "perplexity, " in done.output
    page = out.read_text()
    assert "What they write" in page
    assert str(tmp_path.parent) not in page
    done = CliRunner().invoke(app, [*command, "--overwrite", "--json"])
    values = json.loads(done.stdout)
    assert len(values["samples"]) == comparing.PROMPTS
    assert values["quality"]["model"]["perplexity"] > 1
    assert len(values["matrices"]) == 14
