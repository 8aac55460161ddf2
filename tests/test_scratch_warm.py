"""Warm start: the SVD of a trained model as the start of retraining, as factors or as a dense matrix.

It is compression by method svd, and healing with the text's own loss: no other code.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

import eckart
from eckart import distil, models
from eckart.linalg import truncated_svd
from eckart.scratch import preset
from eckart.scratch.preset import Structure
from eckart.teacher import Teacher

from . import tiny, wards
from .conftest import logits

STRUCTURE = Structure(keep=0.6, of="linears")


def test_the_dense_reconstruction_is_the_same_function_and_the_best_of_its_rank() -> None:
    trained = tiny.build("llama")
    factored = preset.factorize(copy.deepcopy(trained), STRUCTURE)
    ranks = preset.ranks(trained, STRUCTURE)
    dense = eckart.densify(copy.deepcopy(factored))
    assert not models.low_rank_modules(dense)
    assert models.parameter_count(dense) == models.parameter_count(trained)
    ids = tiny.tokens()
    assert torch.allclose(logits(dense, ids), logits(factored, ids), atol=1e-4)
    assert not torch.allclose(logits(dense, ids), logits(trained, ids), atol=1e-2)
    for name, rank in ranks.items():
        weight = models.find(trained, name).weight.detach()
        found = models.find(dense, name).weight.detach()
        assert torch.allclose(found, truncated_svd(weight, rank).dense(), atol=1e-5 * float(weight.norm()))


@pytest.mark.parametrize("start", ["factors", "dense"])
def test_healing_with_the_text_s_loss_alone_is_training_on_the_text(start: str) -> None:
    """The gradient is that of the language model's own loss, and the teacher does not matter."""
    trained = tiny.build("llama")
    student = preset.factorize(copy.deepcopy(trained), STRUCTURE)
    if start == "dense":
        student = eckart.densify(student)
    healing = replace(wards.SETTINGS, text_loss=1.0, train="all")
    windows = tiny.tokens(16)
    found = []
    for dense in (trained, tiny.build("llama", rms_norm_eps=0.1)):
        teacher = Teacher(dense, healing.temperature, healing.largest)
        found.append(distil.judge(student, teacher, windows, healing))
    with torch.no_grad():
        rows = student(input_ids=windows).logits[:, :-1]
    wanted = [functional.cross_entropy(row, window[1:]) for row, window in zip(rows, windows, strict=True)]
    assert torch.allclose(found[0], torch.stack(wanted).double(), atol=1e-5)
    assert torch.allclose(found[0], found[1])
    mixed = distil.judge(student, Teacher(trained, 1.0, None), windows, replace(healing, text_loss=0.5))
    assert not torch.allclose(mixed, found[0], atol=1e-3)


@pytest.mark.parametrize("start", ["factors", "dense"])
def test_retraining_from_either_start_lowers_the_text_s_loss(
    start: str, tokenizer: Any, text_file: Any
) -> None:
    trained = tiny.build("llama")
    student = preset.factorize(copy.deepcopy(trained), STRUCTURE)
    if start == "dense":
        student = eckart.densify(student)
    settings = replace(
        wards.SETTINGS, text_loss=1.0, train="all", tokens=2048, batch=4, rate=5e-3, hold_tokens=128
    )
    _, healed = eckart.heal(student, trained, str(text_file), settings=settings, tokenizer=tokenizer)
    (step,) = healed.steps
    assert step.gain
    assert step.after < 0.8 * step.before
