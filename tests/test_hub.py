from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from eckart import ConfigError, ModelError, StoreError, hub

from . import tiny


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere.gguf"])
def test_a_missing_model_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match=r"no model at .*: give a folder, a .gguf file or a hub id"):
        hub.load(source)


def test_a_mistyped_folder_beside_others_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError, match="no model at models/nowhere"):
        hub.load("models/nowhere")


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    for kind, message in (
        ("T5", "is a T5, an encoder-decoder"),
        ("ViT", "is a ViT, which transformers has no"),
    ):
        getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path / kind)
        with pytest.raises(ModelError, match=message):
            hub.skeleton(str(tmp_path / kind))
        with pytest.raises(ModelError, match=message):
            hub.load(str(tmp_path / kind))


def test_a_write_that_fails_is_one_error(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match="out cannot be written: .*no space"),
        hub.new_folder(tmp_path / "out"),
    ):
        raise OSError("no space")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file: give a folder"):
        hub.load(str(tmp_path / "weights.bin"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot read the config of"):
        hub.load(str(tmp_path / "empty"))


def test_pickles_are_never_read(llama_folder: Path, tmp_path: Path) -> None:
    for file in llama_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(tiny.build("llama").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot load .*model.safetensors"):
        hub.load(str(tmp_path))


def test_compressed_and_quantised_sources_are_refused(compressed_folder: Path) -> None:
    with pytest.raises(ModelError, match="already stored as 'eckart': eckart.densify it first"):
        hub.load(str(compressed_folder), low_rank=False)
    with pytest.raises(ModelError, match="already stored as 'eckart'"):
        hub.skeleton(str(compressed_folder))


def test_dtypes_and_devices() -> None:
    with pytest.raises(ConfigError, match="dtype 'int3': legal are float32, bfloat16, float16"):
        hub.dtype("int3")
    with pytest.raises(ConfigError, match="device 'abacus' is not usable here"):
        hub.device("abacus")
    assert hub.compute_dtype(torch.bfloat16, torch.device("cpu")) is torch.float32
    assert hub.compute_dtype(torch.bfloat16, torch.device("meta")) is torch.bfloat16


def test_a_bfloat16_folder_stays_bfloat16(tmp_path: Path, tokenizer: Any) -> None:
    tiny.build("llama", torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = hub.load(str(tmp_path))
    assert (loaded.stored, loaded.model.dtype) == (torch.bfloat16, torch.float32)
    assert loaded.bytes == (tmp_path / "model.safetensors").stat().st_size


def test_output_appears_by_rename_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for failure in (ValueError, KeyboardInterrupt):
        with pytest.raises(failure), hub.new_folder(out) as folder:  # noqa: PT012
            (folder / "config.json").write_text("{}")
            raise failure
        assert list(tmp_path.iterdir()) == []
    with hub.new_folder(out) as folder:
        (folder / "config.json").write_text("{}")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_output_is_kept_unless_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"out exists: choose another --out, or pass --overwrite"):
        hub.check_output(out, overwrite=False)
    with pytest.raises(StoreError, match="is not a model folder: --overwrite will not replace it"):
        hub.check_output(out, overwrite=True)
    (out / "config.json").write_text("old")
    with hub.new_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
