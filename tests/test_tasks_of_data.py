"""Tasks whose inputs come as the model's own arguments: from the command line to a folder that loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, hub, tasks
from eckart.cli import app

from .others import _TEXT, _VISION, VOCABULARY

SAMPLES, IMAGE = 10, VOCABULARY - 1
_SOUND = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 32, "num_labels": 3,
}  # fmt: skip
GENERATOR = torch.Generator().manual_seed(0)


def ids(*shape: int) -> Tensor:
    return torch.randint(3, IMAGE, (SAMPLES, *shape), generator=GENERATOR)


def noise(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=GENERATOR)


def classes(count: int) -> Tensor:
    return torch.randint(count, (SAMPLES,), generator=GENERATOR)


def padded(tokens: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(tokens)
    mask[1::2, -2:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def with_picture() -> dict[str, Tensor]:
    text = ids(8)
    places = torch.full((SAMPLES, 16), IMAGE)
    labels = torch.cat([torch.full((SAMPLES, 16), -100), text], dim=1)
    whole = torch.cat([places, text], dim=1)
    return {
        "input_ids": whole, "attention_mask": torch.ones_like(whole), "pixel_values": noise(3, 16, 16),
        "labels": labels,
    }  # fmt: skip


def page() -> dict[str, Tensor]:
    boxes = torch.randint(9, (SAMPLES, 8, 4), generator=GENERATOR).sort(-1).values
    ends = torch.ones(SAMPLES, dtype=torch.int64)
    return padded(ids(8)) | {"bbox": boxes, "start_positions": ends, "end_positions": ends + 2}


CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {
    "multiple-choice": (
        "BertForMultipleChoice", "BertConfig", _TEXT, {"input_ids": ids(3, 8), "labels": classes(3)},
    ),
    "next-sentence-prediction": (
        "BertForNextSentencePrediction", "BertConfig", _TEXT, padded(ids(8)) | {"labels": classes(2)},
    ),
    "visual-question-answering": (
        "ViltForQuestionAnswering", "ViltConfig", _TEXT | _VISION | {"num_labels": 5},
        {"input_ids": ids(8), "pixel_values": noise(3, 16, 16)},
    ),
    "document-question-answering": (
        "LayoutLMForQuestionAnswering", "LayoutLMConfig", _TEXT | {"max_2d_position_embeddings": 64}, page(),
    ),
    "video-classification": (
        "VideoMAEForVideoClassification", "VideoMAEConfig",
        _VISION | {"num_frames": 4, "tubelet_size": 2, "num_labels": 3},
        {"pixel_values": noise(4, 3, 16, 16), "labels": classes(3)},
    ),
    "masked-image-modeling": (
        "ViTForMaskedImageModeling", "ViTConfig", _VISION | {"encoder_stride": 4},
        {"pixel_values": noise(3, 16, 16)},
    ),
    "audio-frame-classification": (
        "Wav2Vec2ForAudioFrameClassification", "Wav2Vec2Config", _SOUND, {"input_values": noise(160)},
    ),
    "image-text-to-text": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"vision_config": CLIPVisionConfig(**_VISION, projection_dim=16),
         "text_config": LlamaConfig(**_TEXT), "image_token_index": IMAGE, "image_token_id": IMAGE,
         "vision_feature_layer": -1},
        with_picture(),
    ),
}  # fmt: skip


def stored(task: str, folder: Path) -> Path:
    """Store a random model for `task`, with a file of its arguments beside it."""
    kind, config, options, data = CASES[task]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    model.save_pretrained(folder / "model")
    save_file(data, folder / "data.safetensors")
    return folder / "model"


def outputs(model: Any, task: str) -> Tensor:
    model.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    torch.manual_seed(0)  # ViLT draws the order of its patches
    with torch.no_grad():
        found = model(**CASES[task][3])
    return next(
        value for key, value in found.items() if key != "loss" and isinstance(value, Tensor) and value.ndim
    )


@pytest.mark.parametrize("task", CASES)
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
    small, dense = (auto.from_pretrained(folder) for folder in (tmp_path / "out", source))
    assert type(small) is type(dense)
    assert hub.weight_bytes(tmp_path / "out") < hub.weight_bytes(source)
    expected, found = outputs(dense, task), outputs(small, task)
    assert not torch.equal(found, expected)
    assert torch.equal(outputs(eckart.load(tmp_path / "out"), task), found)


@pytest.mark.parametrize("task", CASES)
def test_full_rank_computes_the_same(task: str, tmp_path: Path) -> None:
    source = stored(task, tmp_path)
    recipe = eckart.Recipe(
        model=str(source), task=task, data=(str(tmp_path / "data.safetensors"),), energy=1.0
    )
    small, result = eckart.compress(str(source), recipe=recipe)
    assert all(module.rank == min(module.shape) for module in result.modules)
    dense = getattr(transformers, tasks.get(task).auto).from_pretrained(source)
    expected = outputs(dense, task)
    assert torch.allclose(outputs(small, task), expected, atol=1e-4 * float(expected.abs().max()))


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
