"""Small compressed models to heal, and windows to heal them on: random, nothing is calibrated."""

import copy
from dataclasses import replace
from typing import Any

import torch

from eckart import models
from eckart.factors import Form, LowRank, build
from eckart.healing import Healing
from eckart.lessons import Lessons
from eckart.linalg import truncated_svd

from . import tiny

LENGTH = 16
SETTINGS = Healing(
    text=("x",),
    steps=("logits",),
    tokens=12 * LENGTH,
    seq_len=LENGTH,
    rate=1e-3,
    evaluations=3,
    precision="float32",
)


def cut(dense: Any, rank: int, form: Form = "factored") -> Any:
    """Return a copy of `dense` with all matrices of its blocks at `rank`, by plain SVD."""
    model = copy.deepcopy(dense)
    for target in models.targets(model):
        linear = models.find(model, target.name)
        svd = truncated_svd(linear.weight.detach().double(), min(rank, *target.shape))
        bias = None if linear.bias is None else linear.bias.detach().double()
        module = build(LowRank(svd.left * svd.values, svd.right), form, bias)
        models.replace(model, target.name, module.to(linear.weight.dtype))
    return model


def lessons(rows: int = 12, fit: int = 12, held_out: int = 6, length: int = LENGTH) -> Lessons:
    """Return random windows, none twice."""
    made = torch.Generator().manual_seed(5)
    found = torch.randint(2, tiny.VOCABULARY, (rows + fit + held_out, length), generator=made)
    return Lessons(found[:rows], found[rows : rows + fit], found[rows + fit :])


def settings(**changes: Any) -> Healing:
    """Return settings for a few steps."""
    return replace(SETTINGS, **changes)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of everything that would be stored."""
    return {name: tensor.detach().clone() for name, tensor in models.state_tensors(model).items()}


def equal(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Tell whether two copies are the same to the bit."""
    return own.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in own.items())


def changed(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """Return the names of what differs in any bit."""
    assert own.keys() == other.keys()
    return {name for name, value in own.items() if not torch.equal(value, other[name])}


def distance(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two copies."""
    return max(float((value.double() - other[name].double()).abs().max()) for name, value in own.items())
