"""Uploading: what is refused, listed and sent, against a hub that is not there."""

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest

from eckart import ConfigError, ModelError, StoreError, pushing

from .commanded import invoke


class FakeApi:
    """What eckart calls of HfApi, keeping what it was told."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload_folder", options))

        class Done:
            commit_url = "https://hub.example/owner/name/commit/1"

        return Done()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "error", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return FakeApi


@pytest.fixture
def folder(compressed_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(compressed_folder, tmp_path / "small")
    return tmp_path / "small"


def test_what_is_listed_is_what_is_sent(folder: Path, api: type[FakeApi]) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("x")
    found = invoke("push", folder, "owner/name", "--private", "--revision", "try", "--yes", "--json")
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert [name for name, _ in api.calls] == ["create_repo", "create_branch", "upload_folder"]
    (_, made), (_, branch), (_, sent) = api.calls
    assert made == {"repo_id": "owner/name", "private": True, "repo_type": "model", "exist_ok": True}
    assert branch["branch"] == sent["revision"] == "try"
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert sent["allow_patterns"] == [name for name, _ in values["files"]]
    assert sorted(sent["allow_patterns"]) == names
    assert values["bytes"] == sum((folder / name).stat().st_size for name in names)
    assert values["url"] == "https://hub.example/owner/name/commit/1"


def test_it_asks_first_and_no_is_no(folder: Path, api: type[FakeApi]) -> None:
    from typer.testing import CliRunner

    from eckart.cli import app

    for answer, code, calls in (("n\n", 1, 0), ("y\n", 0, 2)):
        found = CliRunner().invoke(app, ["push", str(folder), "owner/name"], input=answer)
        assert found.exit_code == code, found.output
        assert len(api.calls) == calls
        assert "model.safetensors" in found.stdout
        assert ("uploaded to https://hub.example" in found.stdout) == (code == 0)
        assert ("nothing was uploaded" in found.stderr) == (code == 1)
    refused = invoke("push", folder, "owner/name", "--json")
    assert refused.exit_code == 2
    assert "--json cannot ask" in refused.stderr
    assert refused.stdout == ""


def test_a_dry_run_sends_nothing_and_names_paths(folder: Path, api: type[FakeApi]) -> None:
    found = invoke("push", folder, "owner/name", "--dry-run")
    assert found.exit_code == 0, found.output
    assert api.calls == []
    words = " ".join(found.output.split())
    assert "recipe.yaml names paths of this machine" in words
    assert "the card states no licence" in words


def test_without_a_token_it_says_how_to_get_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token for the hub: run `hf auth login`, or set HF_TOKEN"):
        pushing.push(pushing.prepare(folder, "owner/name"))


def test_what_the_hub_says_is_one_line(
    folder: Path, api: type[FakeApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "error", OSError("403 Forbidden: you may not\nand more"))
    found = invoke("push", folder, "owner/name", "--yes")
    assert found.exit_code == 2
    assert "owner/name was not uploaded: 403 Forbidden: you may not" in " ".join(found.output.split())
    with pytest.raises(ModelError, match="was not uploaded"):
        pushing.push(pushing.prepare(folder, "owner/name"))


def test_foreign_unfinished_and_damaged_folders_are_refused(folder: Path, llama_folder: Path) -> None:
    def refused(what: Path, message: str, repo: str = "owner/name") -> None:
        with pytest.raises((StoreError, ConfigError), match=message):
            pushing.prepare(what, repo)

    pushing.prepare(folder, "owner/name")
    refused(folder, "repository 'name': give OWNER/NAME", "name")
    refused(folder / "nowhere", "no folder .*: give one that eckart wrote")
    refused(llama_folder, "is not a folder that eckart wrote")
    half = folder.with_name(".out.0a1b.partial")
    shutil.copytree(folder, half)
    refused(half, "is a run that is not finished")
    (folder / "x.partial").write_text("")
    refused(folder, r"holds x.partial, which is half written")
    (folder / "x.partial").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    refused(folder, "lacks model-2.safetensors, which model.safetensors.index.json names")
    index.unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(folder, r"model.safetensors is damaged")
    weights.unlink()
    refused(folder, "holds no weights")
