"""Tuning in one call and one command: folders, reports, errors, interruption, several processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import eckart
from eckart import hub
from eckart.adapt import session, store, trainer
from eckart.cli import app
from eckart.errors import ConfigError, ModelError, StoreError

from . import adapters, tiny, tuning

pytestmark = adapters.QUIET
SMALL = [
    "--steps", "4", "--batch", "4", "--micro", "2", "--evaluations", "2", "--seq-len", "32", "--hold", "0.2",
    "--precision", "float32", "--first-batches", "2",
]  # fmt: skip


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["tune", *(str(argument) for argument in arguments)])


def told(result: Any, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "full"])
def test_a_folder_that_loads_everywhere(
    method: str, llama_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    chosen = tuning.settings(tuning.data(tmp_path), method=method, steps=10, rank=2)
    model, done = eckart.tune(llama_folder, chosen, out=out)
    ids = tiny.tokens()
    expected = tuning.logits(model, ids)
    assert torch.allclose(tuning.logits(eckart.load(out), ids), expected, atol=1e-5)
    if method == "full":
        found = hub.load(str(out)).model
    else:
        found = adapters.load(hub.load(str(llama_folder)).model, out)
    assert torch.allclose(tuning.logits(found, ids), expected, atol=1e-5)
    assert hub.load_tokenizer(str(out)).get_vocab() == tokenizer.get_vocab()
    assert done.stored_bytes == hub.weight_bytes(out)
    assert not session.work_folder(out).exists()
    assert not list(tmp_path.glob("*.partial"))
    report = json.loads((out / "eckart.json").read_text())
    assert report["tuned"]["end"]["loss"] == done.end.loss
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert (out / "ranks.png").is_file() == (method == "adalora")
    card = (out / "README.md").read_text()
    assert f"base_model: {llama_folder.name}" in card
    assert f"{done.end.loss:.4f}" in card


def test_the_estimate_of_memory_stands_beside_the_measured_peak(llama_folder: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    chosen = tuning.settings(tuning.data(tmp_path), rank=2)
    _, done = eckart.tune(llama_folder, chosen, out=tmp_path / "out", before=seen.append)
    assert set(seen[0].memory) == {"full", "lora", "qlora"}
    for parts in seen[0].memory.values():
        assert parts["total"] > parts["weights"]
    assert done.peak >= done.resting > 0
    assert done.needed == done.prospect.memory["lora"]["weights"] + done.peak - done.resting


def test_a_model_in_memory(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tuning.data(tmp_path)
    options: dict[str, Any] = {"data": str(path), "steps": 2, "batch": 4, "micro": 4, "seq_len": 32}
    model, done = eckart.tune(llama, tokenizer=tokenizer, work=tmp_path / "work", **options)
    assert done.stored_bytes is None
    assert model.get_base_model() is llama
    with pytest.raises(ConfigError, match="neither out nor work"):
        eckart.tune(llama, tokenizer=tokenizer, **options)
    with pytest.raises(ConfigError, match="got tuning and steps: give one or the other"):
        eckart.tune(llama, tuning.settings(path), work=tmp_path / "work", steps=2)
    with pytest.raises(ModelError, match="got a int: give a hub id, a path or a transformers model"):
        eckart.tune(3, work=tmp_path / "work", **options)
    with pytest.raises(ConfigError, match=r"epocs.*epochs"):
        eckart.tune(llama, work=tmp_path / "work", epocs=2)


def test_the_output_is_checked_before_any_work(llama_folder: Path, tmp_path: Path) -> None:
    chosen = tuning.settings(tuning.data(tmp_path))
    with pytest.raises(StoreError, match="is where the model comes from"):
        eckart.tune(llama_folder, chosen, out=llama_folder, overwrite=True)
    (tmp_path / "taken").mkdir()
    with pytest.raises(StoreError, match="exists: choose another --out, or pass --overwrite"):
        eckart.tune("no/model", chosen, out=tmp_path / "taken")


def test_full_is_stored_as_the_source_was(llama_folder: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    hub.load(str(llama_folder)).model.to(torch.bfloat16).save_pretrained(narrow)
    hub.load_tokenizer(str(llama_folder)).save_pretrained(narrow)
    chosen = tuning.settings(tuning.data(tmp_path), method="full", rate=1e-2)
    eckart.tune(narrow, chosen, out=tmp_path / "out")
    assert eckart.load(tmp_path / "out").dtype == torch.bfloat16


def test_the_command(llama_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in tuning.rows()]
    path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    options = ["--data", path, "--columns", "prompt=q", "--columns", "completion=a", "--out", out, *SMALL]
    result = invoke(llama_folder, *options)
    assert result.exit_code == 0, result.output
    assert "activations" in result.stderr
    assert "trainable" in result.stderr
    assert "held-out loss, nats a token" in result.stdout
    assert "peak memory" in result.stdout
    assert f"written to {out}" in result.stdout
    store.read(out)
    # The same again is refused, and with --overwrite and --json it replaces the folder.
    assert "exists: choose another --out" in told(invoke(llama_folder, *options))
    result = invoke(llama_folder, *options, "--overwrite", "--json", "--rank", "auto", "--auto-rank", 2)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["prospect"]["tuning"]["rank"] == "auto"
    assert report["schema"] == 1


def test_the_command_by_a_recipe(llama_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    path = tuning.data(tmp_path)
    recipe.write_text(f"tune:\n  data: {path}\n  rank: 2\n  targets: [q_proj]\n  seq_len: 32\n")
    result = invoke(llama_folder, "--recipe", recipe, "--out", tmp_path / "out", *SMALL, "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["ranks"].values()) == {2}
    recipe.write_text("tune: [1]\n")
    assert "tune must be a mapping of settings" in told(
        invoke(llama_folder, "--recipe", recipe, "--out", tmp_path / "other")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no data: give at least one source to learn from"),
        (["--data", "DATA", "--method", "lor"], "method 'lor': legal are lora, dora, qlora, adalora, full"),
        (["--data", "DATA", "--rank", "x"], "rank 'x'"),
        (["--data", "DATA", "--targets", "q_prj"], "q_proj"),
        (["--data", "DATA", "--seq-len", "4000"], "4000"),
        (["--data", "DATA", "--columns", "prompt=question"], "'question'"),
        (["--data", "DATA", "--init", "pissa", "--rank", "40"], "lower the rank"),
    ],
)
def test_errors_end_with_code_2_and_write_nothing(
    options: list[str], message: str, llama_folder: Path, tmp_path: Path
) -> None:
    path = str(tuning.data(tmp_path))
    given = [path if option == "DATA" else option for option in options]
    out = tmp_path / "out"
    assert message in told(invoke(llama_folder, "--out", out, *SMALL, *given))
    assert not out.exists()
    assert not session.work_folder(out).exists()


def test_a_column_without_a_name(llama_folder: Path, tmp_path: Path) -> None:
    result = invoke(llama_folder, "--data", "x", "--out", tmp_path / "out", "--columns", "prompt")
    assert result.exit_code == 2
    assert "expected NAME=COLUMN" in result.stderr


def test_an_interrupted_command_goes_on(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options = [llama_folder, "--data", tuning.data(tmp_path), "--out", out, *SMALL]
    true = trainer.Course.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        true(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Course, "on_step_end", interrupt)
        message = told(invoke(*options), 130)
    assert f"the state is kept in {session.work_folder(out)}" in message
    assert not out.exists()
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    whole = tmp_path / "whole"
    assert invoke(*options[:3], "--out", whole, *SMALL).exit_code == 0
    own, other = (load_file(folder / store.WEIGHTS) for folder in (out, whole))
    assert all(torch.equal(value, other[name]) for name, value in own.items())


def test_an_adapter_without_its_base(llama_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama_folder, base)
    out = tmp_path / "out"
    eckart.tune(base, tuning.settings(tuning.data(tmp_path)), out=out)
    model = hub.load(str(base)).model
    model.resize_token_embeddings(300)
    model.save_pretrained(base)
    eckart.load(out)  # of other embeddings, which it does not touch
    tiny.build("llama", hidden_size=64).save_pretrained(base)
    with pytest.raises(ModelError, match="the adapter does not belong to this LlamaForCausalLM: 14 of its"):
        eckart.load(out)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=r"out is an adapter for .*base, which cannot be loaded"):
        eckart.load(out)
    config = json.loads((out / store.CONFIG).read_text())
    (out / store.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not say what it was trained on"):
        eckart.load(out)


SCRIPT = """
import sys
from pathlib import Path
import eckart
from tests import tuning
folder = Path(sys.argv[1])
chosen = tuning.settings(folder / "rows.jsonl", method=sys.argv[2], rank=2, steps=10, rate=1e-3, micro=2)
eckart.tune(sys.argv[3], chosen, out=folder / "two", watch=lambda *done: None)
"""


@pytest.mark.parametrize("method", ["adalora", "full"])
def test_two_processes_do_what_one_does(method: str, llama_folder: Path, tmp_path: Path) -> None:
    tuning.data(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "script.py"), str(tmp_path), method, str(llama_folder)]  # fmt: skip
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    chosen = tuning.settings(tmp_path / "rows.jsonl", method=method, rank=2, steps=10, rate=1e-3, micro=2)
    eckart.tune(llama_folder, chosen, out=tmp_path / "one")
    ids = tiny.tokens()
    start, one, two = (
        tuning.logits(eckart.load(folder), ids)
        for folder in (llama_folder, tmp_path / "one", tmp_path / "two")
    )
    assert float((one - two).norm()) < 0.1 * float((one - start).norm())
