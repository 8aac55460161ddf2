"""A GGUF file as the base of an adapter: dequantised, compared, extracted from and merged into."""

from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from eckart import hub

from . import adapters, tiny
from .adapters import differ
from .conftest import logits

pytest.importorskip("gguf")
from .test_gguf import file

pytestmark = adapters.QUIET
assert file


def test_an_adapter_of_a_gguf_file(file: Path, tmp_path: Path) -> None:
    loaded = hub.load(str(file))
    model: Any = loaded.model
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "proj" in name:
                left, right = (
                    torch.randn(shape, generator=generator)
                    for shape in ((value.shape[0], 2), (2, value.shape[1]))
                )
                value.add_(0.1 * left @ right)
    hub.write(tmp_path / "tuned", model, loaded.tokenizer)
    _, done = eckart.extract(file, tmp_path / "tuned", rank=2, out=tmp_path / "adapter")
    assert done.error < 1e-6
    assert done.warnings == [
        "tiny.gguf was loaded whole: its files do not hold tensors under its modules' names"
    ]
    merged, _ = eckart.merge(file, tmp_path / "adapter", dtype="float32")
    assert differ(logits(merged, tiny.tokens()), logits(model, tiny.tokens())) < 2e-5
    found = eckart.diff(file, tmp_path / "tuned")
    assert {one.ranks[2] for one in found.tensors if one.ranks} == {2}
