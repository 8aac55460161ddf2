"""The command line for every task: from text, arrays, pictures or rows to a folder that loads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, ModelError, hub, reading, samples, tasks
from eckart.cli import app
from eckart.losses import Batches
from eckart.recipe import Recipe

from . import others
from .test_other_models import TASK_OF, aligned, others_tokenizer, outputs

SMALL = ["--tokens", "320", "--gradient-tokens", "160", "--seq-len", "20", "--eval-tokens", "200"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    picks = torch.randint(3, 62, (1200,), generator=torch.Generator().manual_seed(4)).tolist()
    path.write_text(" ".join(f"w{pick}" for pick in picks))
    return path


def folder(where: Path, name: str, tokens: bool = True) -> Path:
    others.build(name).save_pretrained(where)
    if tokens:
        others_tokenizer(where, name).save_pretrained(where)
    return where


def check(found: Any, out: Path, name: str) -> dict[str, Any]:
    """Check that the command ended well, and that what it wrote is loaded by its class and by eckart."""
    assert found.exit_code == 0, found.output
    report: dict[str, Any] = json.loads((out / "eckart.json").read_text())
    assert report["task"] == TASK_OF[name]
    assert report["keep_linears"] <= 0.7
    auto = getattr(transformers, tasks.get(TASK_OF[name]).auto)
    loaded, again = aligned(auto.from_pretrained(out, dtype="auto")), aligned(eckart.load(out))
    batch = others.batch(name, 9)
    assert torch.equal(outputs(loaded, batch), outputs(again, batch))
    assert report["compressed"]["error"] > 1e-3
    return report


@pytest.mark.parametrize(
    ("name", "unit"),
    [("bert", "label"), ("roberta", "label"), ("t5", "label"), ("bert-encoder", "token"),
     ("bert-classes", "sample"), ("bert-tags", "token")],
)  # fmt: skip
def test_tasks_of_text(name: str, unit: str, words: Path, tmp_path: Path) -> None:
    source = folder(tmp_path / "dense", name)
    out = tmp_path / "out"
    arguments = ["--keep", 0.7, "--of", "linears", "--text", words, *SMALL]
    report = check(run("compress", source, *arguments, "--out", out), out, name)
    assert report["compressed"]["unit"] == unit
    assert report["calibration_tokens"] <= 320 + 40
    assert report["gradient_tokens"] <= 160 + 40
    assert (out / "tokenizer.json").is_file()
    assert "measured on the last" in (out / "README.md").read_text()


def test_a_task_may_be_chosen_and_planned(words: Path, tmp_path: Path) -> None:
    source = folder(tmp_path / "dense", "bert")
    out = tmp_path / "out"
    options = ["--task", "feature-extraction", "--keep", 0.7, "--of", "linears", "--text", words, *SMALL]
    found = run("compress", source, *options, "--dry-run")
    assert found.exit_code == 0, found.output
    assert "encoder.layer.0.attention.self.query" in found.output
    assert "bert.encoder" not in found.output
    assert run("compress", source, *options, "--out", out).exit_code == 0
    assert type(eckart.load(out)).__name__ == "BertModel"
    assert json.loads((out / "eckart.json").read_text())["recipe"]["task"] == "feature-extraction"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "maskedlm"], "task 'maskedlm': legal are auto, causal-lm, .* did you mean masked-lm?"),
        (
            ["--task", "image-classification"],
            "type 'bert', which transformers has no AutoModelForImage",
        ),
        (["--seq-len", 41], "seq_len 41: the model has 40 positions"),
        (["--data", "nothing.npy"], "got text and data: give one of them"),
    ],
)
def test_what_a_task_refuses(options: list[Any], message: str, words: Path, tmp_path: Path) -> None:
    import re

    source = folder(tmp_path / "dense", "bert")
    found = run("compress", source, "--keep", 0.7, "--text", words, "--out", tmp_path / "out", *options)
    assert found.exit_code == 2
    assert re.search(message, found.output), found.output
    assert not (tmp_path / "out").exists()


def loaded_as(name: str, task: str, where: Path) -> hub.Loaded:
    return hub.Loaded(others.build(name), others_tokenizer(where, name), "x", torch.float32, None, task)


def test_masks_and_labels_of_masked_lm(words: Path, tmp_path: Path) -> None:
    loaded = loaded_as("bert", "masked-lm", tmp_path)
    recipe = Recipe(keep=0.9, text=(str(words),), seq_len=20, tokens=1000, eval_tokens=300)
    first, again = (reading.read(recipe, loaded, []) for _ in range(2))
    assert isinstance(first.calibration, Batches)
    assert isinstance(again.calibration, Batches)
    counted = hidden = 0
    for one, other in zip(first.calibration.calls, again.calibration.calls, strict=True):
        assert isinstance(one, dict)
        assert isinstance(other, dict)
        assert all(torch.equal(one[key], other[key]) for key in one)
        ids, labels = one["input_ids"][0], one["labels"][0]
        assert (int(ids[0]), int(ids[-1])) == (0, 2)
        assert (int(labels[0]), int(labels[-1])) == (others.IGNORED, others.IGNORED)
        counted += int((labels != others.IGNORED).sum())
        hidden += int((ids == 62).sum())
        kept = labels == others.IGNORED
        assert bool((ids[kept] != 62).all())
    assert counted == len(first.calibration) * round(0.15 * 18)
    assert 0.6 * counted < hidden < 0.95 * counted


def test_prefix_and_continuation(words: Path, tmp_path: Path) -> None:
    loaded = loaded_as("t5", "seq2seq-lm", tmp_path)
    recipe = Recipe(keep=0.9, text=(str(words),), seq_len=20, tokens=10**6)
    found = reading.read(recipe, loaded, []).calibration
    assert isinstance(found, Batches)
    body = []
    for call in found.calls:
        assert isinstance(call, dict)
        body += [call["input_ids"][0, 1:-1], call["labels"][0, 1:-1]]
    tokens = loaded.tokenizer(words.read_text(), add_special_tokens=False)["input_ids"]
    assert torch.cat(body).tolist() == tokens[: len(torch.cat(body))]


def rows(path: Path, label: Any = None) -> Path:
    generator = torch.Generator().manual_seed(1)
    lines = []
    for index in range(24):
        picks = torch.randint(3, 62, (3 + index % 9,), generator=generator).tolist()
        row: dict[str, Any] = {"text": " ".join(f"w{pick}" for pick in picks)}
        if label is not None:
            row["label"] = label(index)
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("label", [None, lambda index: index % 3, lambda index: f"LABEL_{index % 3}"])
def test_rows_of_classification(label: Any, tmp_path: Path) -> None:
    source = folder(tmp_path / "dense", "bert-classes")
    out = tmp_path / "out"
    arguments = ["--keep", 0.7, "--of", "linears", "--text", rows(tmp_path / "rows.jsonl", label)]
    report = check(run("compress", source, *arguments, "--out", out), out, "bert-classes")
    assert report["compressed"]["unit"] == ("sample" if label is None else "label")
    # What is padding in the batches of eight is not among the tokens.
    assert report["calibration_tokens"] == sum(3 + index % 9 + 2 for index in range(16))


def test_rows_with_labels_that_are_none_are_refused(tmp_path: Path) -> None:
    model, tokenizer = others.build("bert-classes"), others_tokenizer(tmp_path, "bert")
    for label in (lambda index: 7, lambda index: "good"):
        source = str(rows(tmp_path / "rows.jsonl", label))
        with pytest.raises(ConfigError, match=r"label .* in a row: all rows need one of the model's, LAB"):
            samples.labelled([source], model, tokenizer, 20)


def test_vision_from_arrays_and_from_pictures(tmp_path: Path) -> None:
    from PIL import Image

    source = folder(tmp_path / "dense", "vit", tokens=False)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(source)
    generator = np.random.default_rng(0)
    np.save(tmp_path / "pixels.npy", generator.standard_normal((20, 3, 16, 16)).astype(np.float32))
    for index in range(18):
        place = tmp_path / "pictures" / f"LABEL_{index % 3}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")
    for data, unit in (("pixels.npy", "sample"), ("pictures", "label")):
        out = tmp_path / f"out-{unit}"
        options = ["--keep", 0.7, "--of", "linears", "--data", tmp_path / data]
        found = run("compress", source, *options, "--out", out)
        report = check(found, out, "vit")
        assert report["compressed"]["unit"] == unit
        assert report["calibration_unit"] == "samples"
        assert (out / "preprocessor_config.json").is_file()


def test_sound_and_pairs_from_tensors(tmp_path: Path) -> None:
    for name, unit in (("whisper", "label"), ("clip", "pair")):
        source = folder(tmp_path / name, name, tokens=False)
        many = [others.batch(name, seed, (9, 9, 9)) for seed in range(8)]
        tensors = {
            key: torch.cat([batch[key] for batch in many]).contiguous()
            for key, value in many[0].items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
        out, data = tmp_path / f"{name}-out", tmp_path / f"{name}.safetensors"
        found = run("compress", source, "--keep", 0.7, "--of", "linears", "--data", data, "--out", out)
        assert check(found, out, name)["compressed"]["unit"] == unit


def test_data_is_checked(tmp_path: Path) -> None:
    model = others.build("whisper")
    whisper = hub.Loaded(model, None, "x", torch.float32, None, "speech-seq2seq")
    np.save(tmp_path / "sound.npy", np.zeros((4, 8, 40), dtype=np.float32))
    recipe = Recipe(keep=0.9, data=(str(tmp_path / "sound.npy"),))
    with pytest.raises(ConfigError, match="task speech-seq2seq needs what is said: labels"):
        reading.read(recipe, whisper, [])
    (tmp_path / "x.safetensors").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    for source, message in (
        ("none", "no data at .*none: give a .safetensors"),
        ("x.safetensors", "is not a readable safetensors file"),
        ("empty", "holds no pictures"),
        ("sound.txt", "no data at"),
    ):
        with pytest.raises(ConfigError, match=message):
            samples.read([str(tmp_path / source)], model, None)
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "y.safetensors")
    with pytest.raises(ConfigError, match=r"tensors of \[2, 3\] samples"):
        samples.read([str(tmp_path / "y.safetensors")], model, None)
    with pytest.raises(ConfigError, match="task speech-seq2seq is not run on text: give --data"):
        reading.read(Recipe(keep=0.9, text=("a.txt",)), whisper, [])


def test_batches_of_data_lose_padding_that_all_share() -> None:
    ids = others.padded(others.ids((5, 9, 4, 6)), others.PAD)
    found = samples.batches({"input_ids": ids, "attention_mask": (ids != others.PAD).long()}, 2)
    assert [batch["input_ids"].shape[1] for batch in found] == [9, 6]


@pytest.mark.parametrize("name", list(TASK_OF))
def test_the_task_of_a_folder_is_what_it_was_stored_for(name: str, tmp_path: Path) -> None:
    others.build(name).save_pretrained(tmp_path)
    config = hub.load_config(str(tmp_path))
    assert hub.task_of(config, "x", "auto").name == TASK_OF[name]
    assert tasks.of_model(others.build(name)).name == TASK_OF[name]


class Unknown:
    """A config that no task has."""

    architectures = ("Elsewhere",)
    model_type = "elsewhere"


def test_a_class_that_no_task_has_is_refused() -> None:
    with pytest.raises(ModelError, match="x holds a Elsewhere, which none of the tasks .* eckart.compress"):
        tasks.of_config(Unknown(), "x")


def test_other_models_are_quantised_like_any(words: Path, tmp_path: Path) -> None:
    source = folder(tmp_path / "dense", "bert")
    out = tmp_path / "out"
    found = run("quantise", source, "--storage", "int8", "--text", words, *SMALL, "--out", out)
    assert found.exit_code == 0, found.output
    report = json.loads((out / "eckart.json").read_text())
    assert (report["task"], report["compressed"]["unit"]) == ("masked-lm", "label")
    assert abs(report["compressed"]["loss"] - report["dense"]["loss"]) < 0.05
    assert type(eckart.load(out)).__name__ == "BertForMaskedLM"
