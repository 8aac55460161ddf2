"""What holds for every task that runs on the model's own arguments."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import eckart
from eckart import hub

Outputs = Callable[[Any], Tensor]


def store(
    kind: str, config: str, options: Mapping[str, Any], data: Mapping[str, Tensor], folder: Path
) -> Path:
    """Store a random model of transformers' class `kind`, with a file of its arguments beside it."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    model.save_pretrained(folder / "model")
    save_file(dict(data), folder / "data.safetensors")
    return folder / "model"


def check_loads(loader: Any, source: Path, out: Path, outputs: Outputs) -> None:
    """The Auto class `loader` finds the compressed model in `out`: smaller, different, equal to eckart's."""
    small, dense = (loader.from_pretrained(folder) for folder in (out, source))
    assert type(small) is type(dense)
    assert hub.weight_bytes(out) < hub.weight_bytes(source)
    expected, found = outputs(dense), outputs(small)
    assert not torch.equal(found, expected)
    assert torch.equal(outputs(eckart.load(out)), found)


def check_full_rank(loader: Any, source: Path, task: str, outputs: Outputs, **recipe: Any) -> None:
    """At full rank `task` leaves the model at `source` what it was, to rounding."""
    data = (str(source.parent / "data.safetensors"),)
    chosen = eckart.Recipe(model=str(source), task=task, data=data, energy=1.0, **recipe)
    small, result = eckart.compress(str(source), recipe=chosen)
    assert all(module.rank == min(module.shape) for module in result.modules)
    expected = outputs(loader.from_pretrained(source))
    assert torch.allclose(outputs(small), expected, atol=1e-4 * float(expected.abs().max()))
