"""Tasks whose inputs come as the model's own arguments: from the command line to a folder that loads."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, ModelError, tasks
from eckart.cli import app

from . import task_checks
from .task_cases import CASES

RUN = [task for task in CASES if task != "audio-xvector"]


def stored(task: str, folder: Path) -> Path:
    """Store a random model for `task`, with a file of its arguments beside it."""
    return task_checks.store(*CASES[task], folder)


def outputs(model: Any, task: str) -> Tensor:
    model.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    torch.manual_seed(0)  # ViLT draws the order of its patches
    with torch.no_grad():
        found = model(**CASES[task][3])
    tensors = [value for key, value in found.items() if key != "loss" and isinstance(value, Tensor)]
    return next(value for value in tensors if value.is_floating_point() and value.ndim)


@pytest.mark.parametrize("task", RUN)
@pytest.mark.parametrize("named", [True, False], ids=["named", "as it was stored"])
def test_the_command_compresses_and_the_auto_class_loads(task: str, named: bool, tmp_path: Path) -> None:
    source = stored(task, tmp_path)
    command = [
        "compress", str(source), "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data.safetensors"),
        "--keep", "0.6", "--of", "linears", "--json", *(["--task", task] if named else []),
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["task"] == task
    auto = getattr(transformers, tasks.get(task).auto)
    task_checks.check_loads(auto, source, tmp_path / "out", partial(outputs, task=task))


@pytest.mark.parametrize("task", RUN)
def test_full_rank_computes_the_same(task: str, tmp_path: Path) -> None:
    source = stored(task, tmp_path)
    auto = getattr(transformers, tasks.get(task).auto)
    task_checks.check_full_rank(auto, source, task, partial(outputs, task=task))


def test_text_is_refused(tmp_path: Path, text_file: Path) -> None:
    source = stored("multiple-choice", tmp_path)
    recipe = eckart.Recipe(model=str(source), task="multiple-choice", text=(str(text_file),), keep=0.6)
    with pytest.raises(ConfigError, match="task multiple-choice is not run on text: give --data"):
        eckart.compress(str(source), recipe=recipe)


def test_masks_of_choices_are_refused(tmp_path: Path) -> None:
    source = stored("multiple-choice", tmp_path)
    tokens = CASES["multiple-choice"][3]["input_ids"]
    save_file({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tmp_path / "data.safetensors")
    recipe = eckart.Recipe(
        model=str(source), task="multiple-choice", data=(str(tmp_path / "data.safetensors"),), keep=0.6
    )
    with pytest.raises(ConfigError, match=r"attention_mask has shape .*only \(samples, positions\)"):
        eckart.compress(str(source), recipe=recipe)


def test_weights_that_no_linear_map_reads_are_refused_by_name_and_can_be_left_out(tmp_path: Path) -> None:
    source = stored("audio-xvector", tmp_path)  # its head convolves with the weights of its nn.Linear
    recipe = eckart.Recipe(
        model=str(source), task="audio-xvector", data=(str(tmp_path / "data.safetensors"),), keep=0.6,
        of="linears",
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"tdnn\.0\.kernel: .* did not run .*leave it out with --exclude"):
        eckart.compress(str(source), recipe=recipe)
    _, result = eckart.compress(str(source), recipe=dataclasses.replace(recipe, exclude=("tdnn.*",)))
    assert not any("tdnn" in module.name for module in result.modules)
