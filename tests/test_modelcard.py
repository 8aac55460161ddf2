"""Model cards: one for every output folder, true, complete, and their code runs."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import eckart
from eckart import ConfigError, environment, modelcard, origins
from eckart.measure import Perplexity

from . import tiny
from .commanded import WRITING, Commanded, invoke
from .conftest import logits

SCRATCH = ("pretrained",)
FROM_DENSE = [name for name in WRITING if name not in (*SCRATCH, "shared")]
RELATIONS = {
    "compressed": "quantized", "streamed": "quantized", "healed": "quantized", "quantised": "quantized",
    "shared": "quantized", "untied": None, "tied": "quantized", "exported": "quantized",
    "adapter": "adapter", "tuned": "finetune", "extracted": "adapter", "resized": "adapter",
    "merged": "quantized", "pretrained": None,
}  # fmt: skip


def card_of(commanded: Commanded, name: str) -> Any:
    return ModelCard.load(commanded.root / name / "README.md")


def test_every_writing_command_is_in_the_table() -> None:
    import inspect

    from eckart.cli import app

    writing = {
        info.name or info.callback.__name__
        for info in app.registered_commands
        if info.callback is not None and "out" in inspect.signature(info.callback).parameters
    }
    assert writing - {"spectrum", "curve", "sweep", "report", "compare"} == {
        arguments[0] for arguments in WRITING.values()
    }


@pytest.mark.parametrize("name", list(WRITING))
def test_a_card_has_metadata_and_all_parts(commanded: Commanded, name: str) -> None:
    card = card_of(commanded, name)
    data = card.data
    assert "eckart" in data.tags
    assert data.library_name == ("peft" if RELATIONS[name] == "adapter" else "transformers")
    assert data.pipeline_tag == "text-generation"
    assert getattr(data, "base_model_relation", None) == RELATIONS[name]
    assert card.content.count("\n# ") == 1
    assert f"\n# {name}\n" in card.content
    for words in ("## How to load", "## Not measured", "bias and safety"):
        assert card.content.count(words) == 1, words
    assert str(commanded.root) not in card.content
    report = json.loads((commanded.root / name / "eckart.json").read_text())["card"]
    kept = [(figure["on"], figure["metric"], figure["value"]) for figure in report["figures"]]
    shown = [(one.dataset_name, one.metric_type, one.metric_value) for one in data.eval_results or ()]
    assert shown == kept


@pytest.mark.parametrize("name", FROM_DENSE)
def test_base_model_licence_and_terms_are_carried_over(commanded: Commanded, name: str) -> None:
    card, folder = card_of(commanded, name), commanded.root / name
    assert card.data.base_model == "dense"
    assert (card.data.license, card.data.license_name) == ("other", "tiny-licence")
    assert card.data.license_link == "https://example.org/tiny"
    for file in ("LICENSE", "USE_POLICY.md"):
        assert (folder / file).read_text() == f"{file} of the dense model\n"
        assert f"`{file}`" in card.content


def test_what_was_done_before_stays_in_the_order_it_was_done(commanded: Commanded) -> None:
    for name, parts in (
        ("healed", ("## Compressed", "## Healed")),
        ("quantised", ("## Compressed", "## Compressed")),
        ("merged", ("## Compressed", "## Merged")),
        ("tied", ("## Embeddings untied", "## Embeddings tied")),
        ("resized", ("## Tuned", "## Resized")),
    ):
        text = card_of(commanded, name).content
        assert re.findall(
            r"^## (?:Compressed|Healed|Merged|Embeddings \w+|Tuned|Resized)$", text, re.M
        ) == list(parts)


def test_texts_stand_with_digest_and_licence(commanded: Commanded) -> None:
    import hashlib

    digest = hashlib.sha256((commanded.root / "text.txt").read_bytes()).hexdigest()
    for name, use in (("compressed", "calibration"), ("adapter", "training"), ("pretrained", "training")):
        assert f"| text.txt | {use} | CC0-1.0 | {digest} |" in card_of(commanded, name).content
    healed = card_of(commanded, "healed").content
    assert f"| text.txt | calibration | CC0-1.0 | {digest} |" in healed
    assert f"| text.txt | healing | CC0-1.0 | {digest} |" in healed
    assert "## Texts" not in card_of(commanded, "untied").content


@pytest.mark.parametrize("name", list(WRITING))
def test_the_code_of_a_card_loads_the_model(
    commanded: Commanded, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(
        r"## How to load\n\n```python\n(.*?)```", card_of(commanded, name).content, re.DOTALL
    )
    monkeypatch.chdir(commanded.root)
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT, on what transformers will rename
        exec(compile(code, f"{name}/README.md", "exec"), found)
    tokens = tiny.tokens()
    assert torch.equal(logits(found["model"].eval(), tokens), logits(eckart.load(name).eval(), tokens))
    assert ("tokenizer" in found) == (RELATIONS[name] != "adapter")
    config = Path(name, "config.json")
    compressed = config.is_file() and "quantization_config" in json.loads(config.read_text())
    assert ("import eckart" in code) == compressed


def test_the_licence_that_is_given_goes_before_what_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("words")
    assert origins.of_text(file, "calibration").licence == "not stated"
    assert origins.of_text(file, "calibration", "MIT").licence == "MIT"
    (tmp_path / "a.txt.license").write_text("SPDX-License-Identifier: CC-BY-SA-4.0\n")
    assert origins.of_text(file, "calibration").licence == "CC-BY-SA-4.0"
    assert origins.of_text(file, "calibration", "MIT").licence == "MIT"
    data = tmp_path / "data"
    data.mkdir()
    (data / "README.md").write_text("---\nlicense: [mit, cc0-1.0]\n---\n")
    assert origins.of_text(f"{data}:train", "calibration").licence == "mit, cc0-1.0"
    missing = origins.of_text("someone/unknown@part:train", "calibration")
    assert (missing.name, missing.licence, missing.sha256, missing.hub) == (
        "someone/unknown@part:train", "not stated", None, True,
    )  # fmt: skip


def test_a_model_without_a_card_states_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    assert origins.of_model(folder) == origins.Origin("bare")
    assert origins.of_model("someone/unknown") == origins.Origin("someone/unknown")
    (folder / "README.md").write_text("---\nlicense: [broken\n---\n")
    assert origins.of_model(folder).licence is None
    (folder / "config.json").write_text('{"_name_or_path": "someone/model"}')
    assert origins.of_model(folder).name == "someone/model"


def test_terms_of_two_models_do_not_overwrite_each_other(tmp_path: Path) -> None:
    found = []
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "LICENSE.txt").write_text("same" if name == "third" else name)
        (tmp_path / name / "NOTICE").write_text("shared by all")
        found.append(origins.of_model(tmp_path / name))
    out = tmp_path / "out"
    out.mkdir()
    names = origins.carry_terms(out, found)
    assert names == ["LICENSE.txt", "NOTICE", "LICENSE-second.txt", "LICENSE-third.txt"]
    assert (out / "LICENSE-second.txt").read_text() == "second"


def test_what_was_measured_is_not_listed_as_unmeasured(tmp_path: Path) -> None:
    found = Perplexity(12.5, 2.5, 0.1, 630, 10, 64, "float32", "cpu")
    figures = modelcard.perplexity_figure(["/a/b/held.txt"], found, "x")
    assert (figures[0].on, figures[0].value, figures[0].protocol["window"]) == ("held.txt", 12.5, 64)
    tmp_path.joinpath("config.json").write_text("{}")
    for own, listed in (((), "perplexity ("), (figures, "perplexity on text of another kind")):
        modelcard.write(tmp_path, "out", {"README.md": "## Done"}, modelcard.Facts("Made.", figures=own))
        text = (tmp_path / "README.md").read_text()
        assert f"- {listed}" in text
        assert ("contexts of more than 64 tokens" in text) == bool(own)
    meta = yaml.safe_load(text.split("---")[1])
    (result,) = meta["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 12.5
    assert result["dataset"]["args"]["predicted_tokens"] == 630


def test_figures_are_recorded_in_folders_of_eckart_alone(tmp_path: Path, llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="has no model card of eckart that figures can be recorded in"):
        modelcard.check_recordable(str(llama_folder))
    found = invoke("eval", llama_folder, "--text", "x.txt", "--record")
    assert found.exit_code == 2
    assert "has no model card of eckart" in found.output


def test_cards_name_files_and_not_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert environment.name_of(str(tmp_path / "text.txt")) == "text.txt"
    assert environment.name_of("../" + tmp_path.name + "/text.txt") == "text.txt"
    assert environment.name_of(str(tmp_path / "text.txt") + "=2") == "text.txt=2"
    assert environment.name_of("owner/model") == "owner/model"
