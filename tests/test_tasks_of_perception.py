"""Tasks of models that perceive or speak: from the command line to a folder that loads, and refusals."""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, ModelError, batches, samples, tasks
from eckart.cli import app
from eckart.losses import MeasuredLoss

from . import task_cases, task_checks
from .perception_cases import CASES

# Speech models of older transformers are scripted when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
# What has no gradient: heads of layers that do not end here, what says when to end, a frozen part.
LEFT_OUT = {
    "lightglue": ("match_assignment_layers.*", "token_confidence.*"), "codec": ("semantic_encoder.*",),
}  # fmt: skip
# The flows beside it keep matrices in parametrized convolutions.
NAMED = {"drawing": ("text_encoder.*",)}


def stored(name: str, folder: Path) -> Path:
    """Store a random model of the case `name`, with a file of its arguments beside it."""
    _, kind, config, options, data, _ = CASES[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    if name == "multimodal":
        options = task_cases.CASES["image-text-to-text"][2]
    return task_checks.store(kind, config, options, data, folder)


def outputs(model: Any, name: str) -> Tensor:
    model.eval()
    arguments: dict[str, Any] = {key: value[:1] for key, value in CASES[name][4].items()}
    if name == "drawing":
        arguments["output_hidden_states"] = True
    if name == "tdt":
        arguments["decoder_input_ids"] = arguments.pop("labels")
    with torch.no_grad():
        found = batches.call(model, arguments)
    compared = found if isinstance(found, Tensor) else found[CASES[name][5]]
    last: Tensor = compared[-1] if isinstance(compared, tuple) else compared
    return last


@pytest.mark.parametrize("name", CASES)
def test_the_command_compresses_and_the_auto_class_loads(name: str, tmp_path: Path) -> None:
    task, source = CASES[name][0], stored(name, tmp_path)
    command = [
        "compress", str(source), "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data.safetensors"),
        "--keep", "0.6", "--of", "linears", "--json", "--task", task,
    ]  # fmt: skip
    command += [part for pattern in LEFT_OUT.get(name, ()) for part in ("--exclude", pattern)]
    command += [part for pattern in NAMED.get(name, ()) for part in ("--include", pattern)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["task"] == task
    assert report["compressed"]["error"] > 1e-4
    task_checks.check_loads(tasks.get(task).loader, source, tmp_path / "out", partial(outputs, name=name))


@pytest.mark.parametrize("name", CASES)
def test_full_rank_computes_the_same(name: str, tmp_path: Path) -> None:
    source = stored(name, tmp_path)
    task = CASES[name][0]
    task_checks.check_full_rank(
        tasks.get(task).loader, source, task, partial(outputs, name=name),
        method="svd", exclude=LEFT_OUT.get(name, ()), include=NAMED.get(name, ()),
    )  # fmt: skip


def compressed(name: str, folder: Path, **changes: Any) -> Any:
    """Run the case `name` on other arguments: those in `changes`, None for none."""
    source = stored(name, folder)
    data = {key: value for key, value in (CASES[name][4] | changes).items() if value is not None}
    save_file(data, folder / "data.safetensors")
    recipe = eckart.Recipe(
        model=str(source),
        task=CASES[name][0],
        data=(str(folder / "data.safetensors"),),
        keep=0.6,
        of="linears",
    )
    return eckart.compress(str(source), recipe=recipe)[1]


def test_what_a_transducer_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a transducer needs what is said, labels"):
        compressed("tdt", tmp_path, labels=None)


@pytest.mark.skipif(bool(find_spec("torchaudio")), reason="with torchaudio it has its own loss")
def test_a_loss_of_another_package_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task rnnt: .*torchaudio.*give decoder_input_ids without labels"):
        compressed("rnnt", tmp_path, labels=task_cases.ids(3)[:4], decoder_input_ids=None)


def test_padding_of_what_is_said_counts_in_nothing(tmp_path: Path) -> None:
    """Samples that are padded give what they give without: each is run by itself, and cut."""
    model = transformers.AutoModelForTDT.from_pretrained(stored("tdt", tmp_path))
    data = CASES["tdt"][4]
    cut = samples.one_by_one(data, model.config, True)
    assert [len(call["labels"][0]) for call in cut[:2]] == [4, 2]
    assert [call["input_features"].shape[1] for call in cut[:2]] == [64, 48]
    assert cut[1]["decoder_input_ids"].tolist() == [
        [model.config.blank_token_id, *data["labels"][1, :2].tolist()]
    ]
    other = data | {"input_features": data["input_features"].clone()}
    other["input_features"][1::2, 48:] = 9.0
    for one, two in zip(cut, samples.one_by_one(other, model.config, True), strict=True):
        assert torch.equal(model(**one).loss, model(**two).loss)
    whole = {key: value[1:2] for key, value in other.items()} | {"labels": cut[1]["labels"]}
    whole["decoder_input_ids"] = cut[1]["decoder_input_ids"]
    whole["attention_mask"] = torch.ones_like(whole["attention_mask"])
    assert not torch.allclose(model(**whole).loss, model(**cut[1]).loss, rtol=1e-3)


def test_the_loss_of_a_transducer_is_per_label(tmp_path: Path) -> None:
    result = compressed("tdt", tmp_path)
    assert (result.dense.unit, result.dense.meaning) == ("label", "the model's own")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ctc_is_measured_per_label_whatever_the_model_reduces(reduction: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**task_cases._SOUND, ctc_loss_reduction=reduction, pad_token_id=0)
    model = transformers.Wav2Vec2ForCTC(config).eval()
    model.save_pretrained(tmp_path / "model")
    labels = torch.randint(3, 30, (task_cases.SAMPLES, 4))
    labels[1::2, 2:] = -100
    data = {"input_values": task_cases.noise(320), "labels": labels}
    save_file(data, tmp_path / "data.safetensors")
    recipe = eckart.Recipe(task="ctc", data=(str(tmp_path / "data.safetensors"),), keep=0.6, of="linears")
    measured = eckart.compress(str(tmp_path / "model"), recipe=recipe)[1].dense
    last = {key: value[-1:] for key, value in data.items()}
    last["labels"] = last["labels"][:, :2]
    loss = float(model(**last).loss.detach())
    assert isinstance(measured, MeasuredLoss)
    assert (measured.unit, measured.terms) == ("label", 2)
    assert measured.loss == pytest.approx(loss / (2 if reduction == "sum" else 1), rel=1e-4)


def test_what_has_convolutions_alone_is_refused_by_name(tmp_path: Path) -> None:
    points = transformers.SuperPointConfig(
        encoder_hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=16, descriptor_decoder_dim=32,
        keypoint_threshold=0.0,
    )  # fmt: skip
    transformers.SuperPointForKeypointDetection(points).save_pretrained(tmp_path)
    save_file({"pixel_values": task_cases.noise(3, 32, 32)}, tmp_path / "data.safetensors")
    recipe = eckart.Recipe(
        model=str(tmp_path), task="keypoint-detection", data=(str(tmp_path / "data.safetensors"),), keep=0.6
    )
    with pytest.raises(
        ModelError, match=r"SuperPointForKeypointDetection keeps .*convolutions; only nn\.Linear"
    ):
        eckart.compress(str(tmp_path), recipe=recipe)


class Generating(nn.Module):
    """Has no forward, as models that are made of others and only generate."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3)


def test_what_only_generates_is_refused_by_name() -> None:
    assert transformers.BarkModel.forward is nn.Module.forward
    calls = [{"input_ids": torch.ones(2, 3)}] * 2
    with pytest.raises(ConfigError, match="Generating has no forward: it generates only"):
        eckart.compress(Generating(), batches=calls, keep=0.5)


def test_a_version_without_an_auto_class_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "transformers", SimpleNamespace(__version__="5.16.0"))
    monkeypatch.setattr(tasks, "modeling_auto", SimpleNamespace())
    task = tasks.get("decision")
    assert task.classes() == {}
    with pytest.raises(ModelError, match=r"needs AutoModelForDecision, which transformers 5\.16\.0 does not"):
        _ = task.loader


def test_every_auto_class_has_a_task_and_the_page_has_every_task() -> None:
    named = {name for name in dir(transformers) if name.startswith(("AutoModel", "AutoBackbone"))}
    assert named == {task.auto for task in tasks.TASKS.values()} & named
    page = (Path(__file__).parents[1] / "docs" / "data-tasks.md").read_text()
    rows = dict(
        line.strip("| ").split(" | ")[:2]
        for line in page.splitlines()
        if line.startswith("| `") and "`--task`" not in line
    )
    assert rows == {f"`{task.name}`": task.auto for task in tasks.TASKS.values()}
