"""extract, resize, merge and diff on the command line: what they write, print and refuse."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import eckart
from eckart.adapt import commands_adapters, store
from eckart.adapt.difference import diff
from eckart.cli import app

from . import adapters, tiny
from .adapters import differ
from .conftest import logits, reload

pytestmark = adapters.QUIET
SMALL = ["--tokens", 512, "--eval-tokens", 192, "--seq-len", 64]
COMMANDS = ("extract", "resize", "merge", "diff")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def words(output: str) -> str:
    """Return `output` without line breaks and the lines of tables."""
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", output).split())


def written(done: Any) -> Any:
    """Return the JSON on stdout; progress is on stderr."""
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Path, Path]:
    """A base, and the same with every tensor of its blocks moved."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny.build("llama")
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in other.named_parameters():
            if "layers" in name:
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
    for name, one in (("base", model), ("tuned", other)):
        one.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "base", folder / "tuned"


@pytest.fixture
def adapter(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    eckart.extract(*folders, rank=4, out=tmp_path / "adapter")
    return tmp_path / "adapter"


def test_from_a_tuned_model_to_an_adapter_and_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """At full rank the merged model is the tuned one."""
    base, tuned = folders
    done = run("extract", base, tuned, "--rank", 32, "--out", tmp_path / "adapter")
    assert done.exit_code == 0, done.output
    assert f"written to {tmp_path / 'adapter'}" in done.output
    done = run("merge", base, tmp_path / "adapter", "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert "14 updates merged exactly, to rounding in float32" in done.output
    tokens = tiny.tokens()
    wanted = logits(reload(tuned), tokens)
    assert differ(logits(reload(tmp_path / "merged"), tokens), wanted) < 2e-5
    assert differ(logits(adapters.load(reload(base), tmp_path / "adapter"), tokens), wanted) < 2e-5
    found = written(run("diff", tmp_path / "merged", tuned, "--json"))
    assert max(one["change"] for one in found["tensors"]) < 1e-6


def test_extract_says_what_it_found(folders: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    done = run("extract", *folders, "--params", 2000, "--text", text_file, *SMALL, "--out", out)
    assert done.exit_code == 0, done.output
    said = words(done.output)
    for part in ("at most 2,000 parameters", "error of outputs", "quality on held-out text", "KL",
                 "base and adapter", "14 matrices and 4 other tensors differ, 2 are equal", "on disk",
                 "12 of 14 are shown, largest error first", "note: ", "time: "):  # fmt: skip
        assert part in said, part
    assert sum(one.left.numel() + one.right.numel() for one in store.read(out).factors.values()) <= 2000


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--rank", 2], "rank at most 2"),
        (["--energy", 0.5], "energy 0.5"),
        (["--params", 900], "at most 900 parameters"),
        (["--noise"], "terms above the noise"),
    ],
)
def test_extract_has_a_rule_for_ranks(
    folders: tuple[Path, Path], tmp_path: Path, options: list[Any], rule: str
) -> None:
    done = run("extract", *folders, *options, "--carry", "none", "--json", "--out", tmp_path / "adapter")
    if rule == "terms above the noise":
        # The change is nothing but noise.
        assert done.exit_code == 2
        assert "every one of 14 differences has rank 0 by this rule" in words(done.output)
        return
    found = written(done)
    assert found["rule"] == rule
    assert found["environment"]
    assert not any(other["carried"] for other in found["others"])


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--rank", 2], "rank at most 2"),
        (["--energy", 0.6], "energy 0.6"),
        (["--params", 1500], "at most 1,500 parameters"),
        (["--size", "12KB"], "a file of at most 12,000 bytes"),
    ],
)
def test_resize_has_a_rule_for_ranks(adapter: Path, tmp_path: Path, options: list[Any], rule: str) -> None:
    done = run("resize", adapter, *options, "--out", tmp_path / "small")
    assert done.exit_code == 0, done.output
    said = words(done.output)
    for part in (rule, "sum of ranks", "weight file, on disk", "error of all updates together", "written to"):
        assert part in said, part
    found = store.read(tmp_path / "small")
    assert found.parameters < store.read(adapter).parameters
    report = json.loads((tmp_path / "small" / "eckart.json").read_text())
    assert report["resized"][0]["rule"] == rule
    assert report["extracted"]["rule"] == "rank at most 4"
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"LoRA resized by eckart: {rule}." in card
    again = written(run("resize", tmp_path / "small", "--rank", 1, "--json", "--out", tmp_path / "smaller"))
    assert {row["after"] for row in again["rows"]} == {1}
    assert len(json.loads((tmp_path / "smaller" / "eckart.json").read_text())["resized"]) == 2


def test_merge_into_a_compressed_folder_says_what_it_cost(
    adapter: Path, text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    small = adapters.compressed(tmp_path / "small", tiny.build("llama"), tokenizer)
    options = ["--text", text_file, *SMALL, "--dtype", "bfloat16"]
    done = run("merge", small, adapter, *options, "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    said = words(done.output)
    for part in ("low-rank module", "truncated", "0 updates merged exactly, to rounding in bfloat16",
                 "14 merged at the rank of their module", "in the metric of the inputs",
                 "against the sum of base and adapter: KL", "12 of 14 are shown, largest"):  # fmt: skip
        assert part in said, part
    assert reload(tmp_path / "merged").dtype == torch.bfloat16
    found = written(run("merge", small, adapter, "--json", "--out", tmp_path / "again"))
    assert len(found["rows"]) == 14
    assert not found["weighted"]


def test_diff_shows_spectra(folders: tuple[Path, Path]) -> None:
    done = run("diff", *folders)
    assert done.exit_code == 0, done.output
    said = words(done.output)
    for part in ("stable rank", "rank at 50, 90, 99 %", "2 of 20 tensors of the same shape are equal"):
        assert part in said, part
    found = written(run("diff", *folders, "--json"))
    assert found["tensors"] == json.loads(json.dumps(diff(*folders).to_dict()))["tensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "{base}", "{tuned}"], "got no rule for ranks: give exactly one of rank, energy"),
        (["extract", "{base}", "{tuned}", "--rank", 1, "--noise"], "got rank and noise: give exactly one of"),
        (
            ["extract", "{base}", "{tuned}", "--rank", 1, "--carry", "most"],
            "carry 'most': legal are all, small",
        ),
        (["extract", "{base}", "{none}", "--rank", 1], "no model at"),
        (["extract", "{base}", "{base}", "--rank", 1], "no adapter comes of it: the two models are equal"),
        (["extract", "{base}", "{tuned}", "--rank", 1, "--text", "{none}", "--seq-len", 64], "no file"),
        (["resize", "{none}", "--rank", 1], "no adapter at"),
        (["resize", "{adapter}"], "got no rule for ranks"),
        (["resize", "{adapter}", "--size", "many"], "size 'many': write for example 200MB"),
        (["resize", "{adapter}", "--size", "100"], "size 100 bytes: "),
        (["merge", "{base}", "{base}"], "no adapter at"),
        (["merge", "{none}", "{adapter}"], "no model at"),
        (["merge", "{base}", "{adapter}", "--dtype", "int4"], "dtype 'int4': legal are float32, bfloat16"),
        (["merge", "{base}", "{adapter}", "--out", "{base}"], "exists: choose another --out"),
    ],
)
def test_mistakes_end_in_one_line_and_nothing_is_written(
    folders: tuple[Path, Path], adapter: Path, tmp_path: Path, arguments: list[Any], message: str
) -> None:
    places = {"base": folders[0], "tuned": folders[1], "adapter": adapter, "none": tmp_path / "none"}
    given = [str(one).format(**places) for one in arguments]
    out = tmp_path / "out"
    done = run(*given, *([] if "--out" in given else ["--out", out]))
    assert done.exit_code == 2
    assert message in words(done.output)
    assert "error: " in done.output
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_output_is_replaced_when_asked(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for rank in (3, 2):
        done = run("resize", adapter, "--rank", rank, "--out", out, "--overwrite")
        assert done.exit_code == 0, done.output
        assert {one.rank for one in store.read(out).factors.values()} == {rank}
    done = run("resize", adapter, "--rank", 1, "--out", out)
    assert done.exit_code == 2
    assert "exists: choose another --out, or pass --overwrite to replace it" in words(done.output)
    assert {one.rank for one in store.read(out).factors.values()} == {2}


def test_every_command_has_a_description_and_help_for_each_option() -> None:
    for name in COMMANDS:
        done = run(name, "--help")
        assert done.exit_code == 0
        command = getattr(commands_adapters, name)
        assert command.__doc__.split(".")[0].split(":")[0] in words(done.output)
