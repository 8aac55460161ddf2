"""The command line: what it writes, prints and refuses."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import eckart
from eckart import hub
from eckart.cli import app

from . import tiny
from .conftest import logits, reload

SMALL = ["--tokens", "1024", "--gradient-tokens", "512", "--seq-len", "64"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, text_file: Path
) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("cli") / "out"
    options = ["--keep", 0.7, "--of", "linears", "--text", text_file, *SMALL]
    found = run("compress", llama_folder, "--out", out, *options)
    assert found.exit_code == 0, found.output
    return out, found.output


def test_compress_writes_a_folder_and_says_what_it_cost(written: tuple[Path, str]) -> None:
    out, output = written
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert {"README.md", "recipe.yaml", "eckart.json"} <= names
    for words in ("parameters of the linears", "parameters of the model", "FLOPs per token", "on disk",
                  "against the input file", "perplexity on ", "peak memory: ",
                  "measured on the last 5 %", f"written to {out}"):  # fmt: skip
        assert words in output, words


def test_the_report_is_measured(written: tuple[Path, str], text_file: Path, tokenizer: Any) -> None:
    out, _ = written
    report = json.loads((out / "eckart.json").read_text())
    model = reload(out)
    assert report["file_bytes"] == report["after"]["bytes"] == hub.weight_bytes(out)
    assert report["after"]["model"] == sum(p.numel() for p in model.parameters())
    text = text_file.read_text()
    held_out = tokenizer(text, add_special_tokens=False)["input_ids"][len(text) - int(len(text) * 0.05) :]
    windows = torch.tensor(held_out[: len(held_out) // 64 * 64]).reshape(-1, 64)
    again = eckart.measure.perplexity(model, windows)
    assert report["compressed"]["loss"] == pytest.approx(again.loss, rel=1e-5)
    assert set(report["environment"]) == {"date", "python", "versions", "machine"}


def test_the_saved_recipe_repeats_the_run(written: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = written
    found = run("compress", "--recipe", out / "recipe.yaml", "--out", tmp_path / "again")
    assert found.exit_code == 0, found.output
    tokens = tiny.tokens()
    assert torch.equal(logits(reload(tmp_path / "again"), tokens), logits(reload(out), tokens))
    assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())["keep"] == 0.7


def test_dry_run_prints_the_plan_and_writes_nothing(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["compress", llama_folder, "--rank", 4, "--text", text_file, "--out", out, "--dry-run"]
    found = run(*arguments)
    assert found.exit_code == 0
    assert re.search(r"model.layers.0.self_attn.q_proj .* 32 x 32 .* 4 .* 1,024", found.output)
    assert not out.exists()
    plan = json.loads(run(*arguments, "--json").stdout)
    assert plan["exact"]
    assert {module["rank"] for module in plan["modules"]} == {4}
    found = run("compress", llama_folder, "--keep", 0.8, "--dry-run")
    assert "what text shows will redistribute it" in found.output
    found = run("compress", llama_folder, "--energy", 0.9, "--dry-run")
    assert "the ranks follow from spectra" in found.output
    assert "dense" not in found.output


def test_eval_prints_and_compares(written: tuple[Path, str], llama_folder: Path, text_file: Path) -> None:
    out, _ = written
    arguments = ["eval", out, "--text", text_file, "--tokens", 640, "--seq-len", 64]
    found = run(*arguments, "--against", llama_folder)
    assert found.exit_code == 0, found.output
    for words in (
        "630 tokens predicted in 10 windows of 64",
        "KL(reference || model)",
        "top-1 agreement",
        "(paired)",
    ):
        assert words in found.output
    values = json.loads(run(*arguments, "--json").stdout)
    assert values["result"]["predicted"] == 630
    assert (values["tokens"], values["seq_len"], values["bos"]) == (640, 64, False)
    assert values["environment"]["versions"]["eckart"] == eckart.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "2"], r"keep 2.0: must lie in \(0, 1\]"),
        (["--keep", "0.5", "--rank", "3"], "got keep and rank: give exactly one"),
        (["--keep", "0.5", "--include", "qproj"], "did you mean q_proj"),
        (["--keep", "0.1"], "cannot be reached: .* the least is keep"),
        (["--keep", "0.5", "--method", "best"], "method 'best': legal are svd"),
        (["--keep", "0.5", "--text", "nowhere.txt"], "no file nowhere.txt"),
        (["--keep", "0.5", "--device", "abacus"], "device 'abacus' is not usable here"),
        (["--keep", "0.5", "--recipe", "none.yaml"], "no recipe at none.yaml"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    arguments: list[str], message: str, llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    text = [] if "--text" in arguments else ["--text", text_file]
    found = run("compress", llama_folder, *text, "--out", tmp_path / "out", *arguments)
    assert found.exit_code == 2
    assert re.search(message, found.output), found.output
    assert "Traceback" not in found.output
    assert list(tmp_path.iterdir()) == []


def test_a_bad_output_is_refused_before_any_work(llama_folder: Path, text_file: Path) -> None:
    for out, message in (
        (text_file / "x", "is not a folder that can be written to"),
        (llama_folder, "is where the model comes from"),
    ):
        found = run("compress", llama_folder, "--keep", 0.5, "--text", text_file, "--out", out, "--overwrite")
        assert found.exit_code == 2
        assert message in found.output
        assert "calibrate" not in found.output


def test_missing_pieces_are_named(llama_folder: Path, text_file: Path, written: tuple[Path, str]) -> None:
    for arguments, message in (
        (["compress", llama_folder, "--keep", 0.5, "--text", text_file], "no --out"),
        (["compress", llama_folder, "--keep", 0.5, "--out", "x"], "give text to calibrate on"),
        (["compress", "--keep", 0.5, "--text", text_file, "--dry-run"], "no MODEL"),
        (["compress", "--keep", 0.5, "--text", text_file, "--out", "x"], "no MODEL"),
        (
            ["compress", llama_folder, "--keep", 0.5, "--text", text_file, "--out", written[0]],
            "exists: choose",
        ),
        (["eval", "./nowhere", "--text", text_file], "no model at ./nowhere"),
    ):
        found = run(*arguments)
        assert found.exit_code == 2
        assert message in found.output


def test_interrupted_runs_leave_nothing(
    llama_folder: Path, text_file: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    aside = tmp_path_factory.mktemp("log")
    # Enough to calibrate on for the signal to come in the middle of it, however busy the machine is.
    log, long = aside / "stderr", aside / "long.txt"
    long.write_text(text_file.read_text() * 20)
    command = [sys.executable, "-m", "eckart.cli", "compress", str(llama_folder), "--keep", "0.6", "--of",
               "linears", "--text", str(long), "--out", str(tmp_path / "out"), "--tokens", "200000",
               "--gradient-tokens", "200000", "--seq-len", "8"]  # fmt: skip
    # Jobs in the background of a shell ignore the signal, and so would what they start.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with (
        log.open("w") as stream,
        subprocess.Popen(command, stderr=stream, stdout=stream, **heard) as process,  # type: ignore[call-overload]
    ):
        deadline = time.monotonic() + 120
        while "calibrate" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
    assert process.returncode == 130, log.read_text()
    assert "interrupted: nothing was written" in log.read_text()
    assert list(tmp_path.iterdir()) == []


def test_version_and_help() -> None:
    assert run("--version").output == f"eckart {eckart.__version__}\n"
    assert "compress" in run("--help").output


def test_quantise_writes_a_folder_or_says_what_to_do(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = ["--text", text_file, "--tokens", 512, "--gradient-tokens", 256, "--seq-len", 64]
    found = run("quantise", llama_folder, "--storage", "nf4-dq", *text, "--out", out)
    assert found.exit_code == 0, found.output
    assert "nf4-dq" in found.output
    assert f"written to {out}" in found.output
    for arguments, message in (
        ([llama_folder, "--storage", "int9", "--out", tmp_path / "x"], "storage 'int9': legal are"),
        ([llama_folder, "--storage", "int8", "--out", tmp_path / "x"], "give text to calibrate on"),
        ([llama_folder, *text, "--out", tmp_path / "x"], "name a storage for the matrices"),
        ([out, "--storage", "int8", *text, "--out", tmp_path / "x"], "stored in few bits already"),
        ([llama_folder, "--storage", "int8", *text, "--out", out], "exists: choose another --out"),
    ):
        found = run("quantise", *arguments)
        assert found.exit_code == 2
        assert message in " ".join(found.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
