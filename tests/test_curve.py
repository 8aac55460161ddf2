"""Budget curves: what is predicted is what compress predicts, what is measured is what compress measures."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, RankError, Recipe, decomposing, identity, models, points, shelf
from eckart.cli import app
from eckart.curves import Point, completed
from eckart.measure import Perplexity
from eckart.streaming.execute import compress_to

from . import tiny
from .conftest import Compress

SMALL: dict[str, Any] = {"tokens": 1024, "gradient_tokens": 512, "seq_len": 64, "eval_tokens": 512}
OPTIONS = ["--tokens", 1024, "--gradient-tokens", 512, "--seq-len", 64, "--eval-tokens", 512]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def curve(tokenizer: Any, text_file: Path) -> Callable[..., Any]:
    def made(model: Any = None, **options: Any) -> Any:
        own = tiny.build("llama") if model is None else model
        given = {"text": text_file, "of": "linears", "cache": False, **SMALL, **options}
        return eckart.curve(own, tokenizer=tokenizer, **given)

    return made


def test_a_curve_is_what_compress_gives_at_each_keep(curve: Any, compress: Compress) -> None:
    """Form pivoted has one rate, so that predictions are of the same choices, too."""
    found = curve(form="pivoted", keeps=(1.0, 0.8, 0.6), measure=(0.8,))
    assert [row.keep for row in found.rows] == [1.0, 0.8, 0.6]
    for row in found.rows:
        _, result = compress(tiny.build("llama"), keep=row.keep, of="linears", form="pivoted",
                             recipe=Recipe(keep=1.0, eval_tokens=512))  # fmt: skip
        assert row.predicted_increase == pytest.approx(result.predicted_increase, abs=1e-12)
        assert (row.parameters, row.keep_linears) == (result.after.model, result.keep_linears)
        assert row.keep_model == result.keep_model
        assert result.after.bytes <= row.bytes <= result.after.bytes + 20_000
        if row.keep == 0.8:
            assert row.bytes == result.after.bytes
            assert row.measured_perplexity == result.compressed.perplexity
            assert row.measured_increase == result.compressed.loss - result.dense.loss
            assert found.dense == result.dense
    losses = [row.predicted_increase for row in found.rows]
    assert losses[0] == 0
    assert losses == sorted(losses)


def test_the_model_stays_as_it_is(curve: Any) -> None:
    model = tiny.build("gpt2")
    before, tree = identity.of_tensors(models.state_tensors(model)), str(model)
    curve(model, keeps=(0.8,), measure=(0.7,), dtype="bfloat16")
    assert (identity.of_tensors(models.state_tensors(model)), str(model)) == (before, tree)


def test_corrections_rise_with_size_cut_and_errors_are_shown(curve: Any) -> None:
    found = curve(keeps=(1.0, 0.7, 0.5, 0.3), measure=(0.7, 0.3))
    measured = found.measured
    assert [row.keep for row in measured] == [0.7, 0.3]
    for row in measured:
        assert row.error == row.measured_increase - row.predicted_increase
        assert row.predicted_perplexity == pytest.approx(
            found.dense.perplexity * math.exp(row.predicted_increase)
        )
    corrected = [row.corrected_increase for row in found.rows]
    assert corrected == sorted(corrected)
    text = str(found)
    for words in ("keep of the linears", "corrected", "the prediction, checked", "measured on the last 5 %"):
        assert words in text, words


def test_measured_points_correct_those_between_them() -> None:
    dense = Perplexity(10.0, math.log(10), None, 63, 1, 64, "float32", "cpu")
    given = [(1.0, 0.0, None), (0.8, 0.1, 0.2), (0.6, 0.2, None), (0.4, 0.4, 1.6)]
    points_ = [
        Point(keep, keep, keep, 1, 1, predicted_increase=low, measured_increase=high)
        for keep, low, high in given
    ]
    rows, correction = completed(points_, dense)
    # Ratios 2 and 4 at 0.1 and 0.4: half way in the logarithm, at 0.2, their geometric mean.
    assert [row.corrected_increase for row in rows] == pytest.approx([0.0, 0.2, 0.2 * 8**0.5, 1.6])
    assert [row.left_out_increase for row in rows] == [
        None, pytest.approx(0.4), None, pytest.approx(0.8),
    ]  # fmt: skip
    assert rows[1].corrected_perplexity == pytest.approx(10 * math.exp(0.2))
    assert [place for place, _ in correction.knots] == [0.1, 0.4]
    assert [level for _, level in correction.knots] == pytest.approx([0.2, 1.6])


def test_json_and_frame_hold_every_row(curve: Any) -> None:
    pytest.importorskip("pandas")
    found = curve(keeps=(0.9, 0.5), measure=(0.5,))
    values = json.loads(json.dumps(found.to_dict()))
    assert [row["keep"] for row in values["rows"]] == [0.9, 0.5]
    assert values["rows"][1]["error"] == found.rows[1].error
    table = found.to_frame()
    assert list(table["keep"]) == [0.9, 0.5]
    assert list(table["bytes"]) == [row.bytes for row in found.rows]


def test_without_gradients_nothing_is_predicted_and_that_is_said(curve: Any) -> None:
    found = curve(method="svd-llm", keeps=(0.8, 0.5), measure=(0.8,))
    assert [row.predicted_increase for row in found.rows] == [None, None]
    assert found.rows[0].measured_perplexity is not None
    assert "method svd-llm has no gradients" in str(found)


def test_what_cannot_be_reached_is_left_out_and_named(curve: Any) -> None:
    found = curve(of="model", keeps=(0.9, 0.05))
    assert [row.keep for row in found.rows] == [0.9]
    assert "keep 0.05 cannot be reached: left out" in found.warnings


def test_what_a_curve_refuses(curve: Any) -> None:
    with pytest.raises(ConfigError, match=r"keep 1.5: must lie in \(0, 1\]"):
        curve(keeps=(1.5,))
    with pytest.raises(ConfigError, match="points are measured on text: give text or eval_text"):
        curve(text=None, method="svd", measure=(0.5,))
    with pytest.raises(ConfigError, match="looks at data: give text"):
        curve(text=None)
    with pytest.raises(ConfigError, match="1 points from keep 1 to 0.3: give at least 2"):
        eckart.curving.evenly(1)


def test_evenly_spread_keeps() -> None:
    assert eckart.curving.evenly(15) == points.KEEPS
    assert eckart.curving.evenly(3, 0.5) == (1.0, 0.75, 0.5)


INCREASE = "20%"


@pytest.mark.parametrize("method", ["eckart", "svd-llm"])
def test_the_smallest_keep_within_a_perplexity(method: str, compress: Compress) -> None:
    model, result = compress(tiny.build("llama"), of="linears", max_ppl_increase=INCREASE, method=method)
    found, keep = result.search, result.recipe.keep
    assert result.recipe.max_ppl_increase is None
    assert result.compressed.perplexity <= 1.2 * result.dense.perplexity
    steps = {step.keep: step for step in found.steps}
    assert steps[keep].within
    assert steps[keep].perplexity == result.compressed.perplexity
    below = [step for step in found.steps if step.keep == pytest.approx(keep - found.resolution)]
    # Either the next smaller one was measured to be too small, or evaluations ran out, or there is none.
    if below:
        assert not below[0].within
    elif len(found.steps) < points.EVALUATIONS:
        with pytest.raises(RankError, match="cannot be reached"):
            compress(tiny.build("llama"), of="linears", keep=keep - found.resolution, method=method)
    assert all((step.increase <= math.log(1.2)) == step.within for step in found.steps)
    # It is what compress gives at that keep.
    again, _ = compress(tiny.build("llama"), of="linears", keep=keep, method=method)
    own, other = (identity.of_tensors(models.state_tensors(one)) for one in (model, again))
    assert own == other
    # What was chosen and measured on the way is not again.
    assert not {"choose", "measure compressed"} & result.seconds.keys()
    assert "the smallest keep within 20 %" in str(result)


def test_max_ppl_increase_is_a_budget_with_clear_errors(
    compress: Compress, text_file: Path, tmp_path: Path, llama_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="got keep and max_ppl_increase: give exactly one of"):
        Recipe(keep=0.5, max_ppl_increase="3%")
    for wrong in ("3", "0%", "-1%", "much%", "inf%", 0.03):
        with pytest.raises(ConfigError, match="is not a percentage above 0, write for example 3%"):
            Recipe(max_ppl_increase=wrong)  # type: ignore[arg-type]
    assert Recipe(max_ppl_increase="3 %").increase() == pytest.approx(0.03)
    with pytest.raises(ConfigError, match="before anything is healed: leave out heal"):
        Recipe(max_ppl_increase="3%", heal=eckart.Healing())
    with pytest.raises(ConfigError, match="is measured on text, and there is none: give text"):
        Recipe(max_ppl_increase="3%", method="svd").check_text()
    with pytest.raises(ConfigError, match="is found by measuring, and a plan measures nothing"):
        eckart.planning.plan(Recipe(max_ppl_increase="3%"), tiny.build("llama"), torch.float32)
    recipe = Recipe(model=str(llama_folder), max_ppl_increase="3%", form="pivoted", text=(str(text_file),))
    with pytest.raises(ConfigError, match="max_ppl_increase needs the whole model at once"):
        compress_to(recipe, tmp_path / "out", memory="8GB")
    batches = [{"input_ids": tiny.tokens()} for _ in range(4)]
    with pytest.raises(ConfigError, match="perplexity is measured on text, by a causal language model"):
        eckart.compress(tiny.build("llama"), batches=batches, max_ppl_increase="3%")


def test_a_perplexity_that_no_keep_reaches(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "EVALUATIONS", 2)
    with pytest.raises(RankError, match=r"1e-9% cannot be reached at any keep by method svd: dense "):
        compress(tiny.build("llama"), of="linears", method="svd", max_ppl_increase="1e-9%")


def test_curve_then_compress_from_the_users_cache(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user does it: nothing is calibrated the second time, the folder has the same bytes."""
    monkeypatch.setenv(shelf.VARIABLE, str(tmp_path / "cache"))
    common = ["--text", text_file, "--of", "linears", *OPTIONS]
    done = run("compress", llama_folder, "--keep", 0.6, "--out", tmp_path / "before", *common)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "cache").exists()
    out = tmp_path / "curve.json"
    done = run("curve", llama_folder, *common, "--keep", "1,0.6", "--measure", 0.6, "--out", out)
    assert done.exit_code == 0, done.output
    assert f"cache: {tmp_path / 'cache'}" in done.output.replace("\n", "")
    assert [row["keep"] for row in json.loads(out.read_text())["rows"]] == [1.0, 0.6]

    def never(*given: Any, **named: Any) -> Any:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(decomposing, "statistics_of", never)
    monkeypatch.setattr(decomposing, "factor", never)
    again = json.loads(run("curve", llama_folder, *common, "--points", 3, "--json").stdout)
    assert all(again["cache"]["found"].values())
    done = run("compress", llama_folder, "--keep", 0.6, "--out", tmp_path / "after", *common)
    assert done.exit_code == 0, done.output
    files = [tmp_path / name / "model.safetensors" for name in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()
    listed = json.loads(run("cache", "--json").stdout)
    assert {entry["kind"] for entry in listed["entries"]} == {"dense", "statistics", "decompositions"}
    assert "decompositions" in run("cache").output
    assert "deleted from" in run("cache", "--clear").output
    assert json.loads(run("cache", "--json").stdout)["entries"] == []


def test_what_the_commands_refuse(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    common = ["curve", llama_folder, "--text", text_file]
    for given, words in (
        (["--points", 5, "--keep", 0.5], "got points and keep: give one of them"),
        (["--measure", "many"], "--measure many: write numbers such as 0.9,0.6"),
        (["--cache", tmp_path, "--no-cache"], "and no cache: give one of them"),
        (["--out", tmp_path], "exists: name a file"),
    ):
        done = run(*common, *given)
        assert done.exit_code == 2
        assert words in done.output.replace("\n", " "), done.output
    done = run(
        "compress", llama_folder, "--max-ppl-increase", 3, "--text", text_file, "--out", tmp_path / "o"
    )
    assert (done.exit_code, "write for example 3%" in done.output) == (2, True)
    assert "give one of them" in run("cache", "--list", "--clear").output
