"""Sweeps: rows are what compress gives, stay, and go on; what fails says so and stops nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, StoreError, decomposing, sweep_group
from eckart.cli import app
from eckart.sweeps import Combination, Row, Sweep

from . import tiny
from .conftest import Compress

SMALL: dict[str, Any] = {"tokens": 512, "gradient_tokens": 256, "seq_len": 64, "eval_tokens": 256}


def sweep(model: Any, text: Path, tmp_path: Path, **options: Any) -> Sweep:
    given = {"methods": ("svd", "svd-llm", "pifa"), "keeps": (0.8, 0.6), "of": "linears", **SMALL, **options}
    return eckart.sweep(model, text, out=tmp_path / "sweep", **{"cache": tmp_path / "cache", **given})


def test_rows_are_what_compress_gives(
    llama_folder: Path, text_file: Path, tmp_path: Path, compress: Compress
) -> None:
    found = sweep(llama_folder, text_file, tmp_path, storages=("float", "int8"), methods=("svd-llm",))
    assert [(row.storage, row.keep) for row in found.rows] == [
        ("float", 0.8), ("float", 0.6), ("int8", 0.8), ("int8", 0.6),
    ]  # fmt: skip
    for row in found.rows:
        stored = {} if row.storage == "float" else {"storage": row.storage}
        recipe = eckart.Recipe(keep=1.0, eval_tokens=256)
        _, result = compress(tiny.build("llama"), of="linears", method="svd-llm", keep=row.keep, tokens=512,
                             gradient_tokens=256, recipe=recipe, **stored)  # fmt: skip
        assert (row.bytes, row.parameters) == (result.after.bytes, result.after.model)
        assert row.perplexity == result.compressed.perplexity
        assert row.dense_perplexity == result.dense.perplexity
    written = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert written["rows"] == found.to_dict()["rows"]
    assert "4 measured, 0 failed" in str(found)


def test_a_sweep_goes_on_and_shares_calibration(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for name in ("statistics_of", "factor"):
        whole = getattr(decomposing, name)

        def counted(*given: Any, name: str = name, whole: Any = whole, **named: Any) -> Any:
            ran.append(name)
            return whole(*given, **named)

        monkeypatch.setattr(decomposing, name, counted)
    whole_row, stop_at = sweep_group._row, Combination("svd-llm", 0.6)

    def interrupted(settings: Any, combination: Combination, *rest: Any) -> Row:
        if combination == stop_at:
            raise KeyboardInterrupt
        return whole_row(settings, combination, *rest)

    with monkeypatch.context() as stopping:
        stopping.setattr(sweep_group, "_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(llama_folder, text_file, tmp_path)
    rows = sorted(path.name for path in (tmp_path / "sweep" / "rows").iterdir())
    assert rows == ["svd-llm_0.8_float.json", "svd_0.6_float.json", "svd_0.8_float.json"]
    before = {name: (tmp_path / "sweep" / "rows" / name).stat().st_mtime_ns for name in rows}
    found = sweep(llama_folder, text_file, tmp_path)
    assert len(found.rows) == 6
    assert all(row.ok for row in found.rows)
    assert {n: (tmp_path / "sweep" / "rows" / n).stat().st_mtime_ns for n in rows} == before
    # svd has no statistics (an empty set each time), svd-llm is decomposed once, pifa has the same metrics.
    assert ran.count("factor") == 2
    ran.clear()
    assert sweep(llama_folder, text_file, tmp_path) == found
    assert ran == []


def test_other_inputs_are_refused(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    sweep(llama_folder, text_file, tmp_path, methods=("svd",))
    for changed in ({"seed": 3}, {"of": "model"}, {"tokens": 256}):
        with pytest.raises(StoreError, match=f"differs in {next(iter(changed))}"):
            sweep(llama_folder, text_file, tmp_path, **{"methods": ("svd",), **changed})
    text = tmp_path / "other.txt"
    text.write_text(text_file.read_text() + " more")
    with pytest.raises(StoreError, match="differs in text"):
        sweep(llama_folder, text, tmp_path, methods=("svd",))
    assert len(sweep(llama_folder, text_file, tmp_path, methods=("svd", "pifa")).rows) == 4


def test_one_at_a_time(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    sweep(llama_folder, text_file, tmp_path, methods=("svd",), keeps=(0.8,))
    with (
        FileLock(tmp_path / "sweep" / ".lock"),
        pytest.raises(StoreError, match="another process is at work"),
    ):
        sweep(llama_folder, text_file, tmp_path, methods=("svd",), keeps=(0.8,))


def test_what_fails_has_a_row_and_stops_nothing(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    found = sweep(
        llama_folder, text_file, tmp_path, methods=("eckart/stock", "svd"), keeps=(0.8, 0.05), of="model",
        storages=("float", "int8"),
    )  # fmt: skip
    failed = {(row.method, row.keep, row.storage): row.error for row in found.rows if not row.ok}
    assert "stock needs no eckart to load" in str(failed["eckart/stock", 0.8, "int8"])
    assert str(failed["svd", 0.05, "float"]).startswith("RankError: keep 0.05 of the model cannot be reached")
    assert [row.keep for row in found.rows if row.method == "svd" and row.ok] == [0.8, 0.8]
    assert "failed: svd, keep 0.05, float: RankError" in str(found).replace("\n", " ")


def test_errors_that_are_not_eckarts_end_it(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> Row:
        raise ZeroDivisionError

    monkeypatch.setattr(sweep_group, "_row", broken)
    with pytest.raises(ZeroDivisionError):
        sweep(llama_folder, text_file, tmp_path, methods=("svd",))


def test_what_is_refused_before_anything_runs(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"methods": ("swd",)}, "method 'swd': legal are svd, .*each alone or with /FORM"),
        ({"methods": ("eckart/round",)}, "method 'eckart/round': legal behind the / are factored"),
        ({"keeps": (0,)}, r"keep 0: must lie in \(0, 1\]"),
        ({"storages": ("int1",)}, "storage 'int1': legal are float, "),
        ({"jobs": 0}, "jobs 0, devices none: give a number of jobs of at least 1, or devices"),
        ({"jobs": 2, "devices": ("cpu",)}, "jobs 2, devices cpu"),
        ({"jobs": 2, "speed": True}, "speed is measured by one process at a time"),
    ):
        with pytest.raises(ConfigError, match=words):
            sweep(llama_folder, text_file, tmp_path, **options)
    with pytest.raises(ConfigError, match="several processes each load the model"):
        sweep(tiny.build("llama"), text_file, tmp_path, jobs=2)
    assert not (tmp_path / "sweep").exists()


def test_a_model_in_memory_with_its_speed(text_file: Path, tmp_path: Path, tokenizer: Any) -> None:
    found = sweep(
        tiny.build("llama"), text_file, tmp_path, methods=("svd",), keeps=(0.8,), speed=True, cache=False,
        tokenizer=tokenizer,
    )  # fmt: skip
    assert (found.rows[0].decode_tokens_per_second or 0) > 0
    assert "decode tok/s" in str(found)


def test_processes_give_the_same_rows(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    apart = CliRunner().invoke(app, [
        "sweep", str(llama_folder), "--text", str(text_file), "--out", str(tmp_path / "apart"), "--jobs", "2",
        "--methods", "svd,svd-llm", "--keeps", "0.8", "--of", "linears", "--tokens", "512",
        "--gradient-tokens", "256", "--seq-len", "64", "--eval-tokens", "256", "--json",
        "--cache", str(tmp_path / "cache"),
    ])  # fmt: skip
    assert apart.exit_code == 0, apart.output
    here = sweep(llama_folder, text_file, tmp_path, methods=("svd", "svd-llm"), keeps=(0.8,), cache=False)
    rows = json.loads(apart.stdout)["rows"]
    for own, row in zip(here.to_dict()["rows"], rows, strict=True):
        assert own["bytes"] == row["bytes"]
        assert own["perplexity"] == pytest.approx(row["perplexity"], rel=1e-6)


def test_a_process_that_ends_early_is_named(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eckart.sweeping, "_START", "import sys; sys.exit('out of memory')")
    with pytest.raises(
        eckart.ModelError, match=r"ended early, .* rows are kept: svd, float \(1\): out of memory"
    ):
        sweep(llama_folder, text_file, tmp_path, methods=("svd",), jobs=2)
    assert (tmp_path / "sweep" / "key.json").is_file()


def test_the_front_counts_the_dense_model() -> None:
    dense = {"dense_perplexity": 10.0, "dense_bytes": 100, "dense_parameters": 50}

    def row(keep: float, size: int, perplexity: float) -> Row:
        return Row("svd", keep, "float", "ok", bytes=size, perplexity=perplexity, **dense)  # type: ignore[arg-type]

    rows = [row(0.9, 90, 11.0), row(0.8, 95, 12.0), row(0.7, 70, 30.0), row(0.6, 120, 10.5)]
    rows.append(Row("svd", 0.5, "float", "failed", "why"))
    found = Sweep.of("model", "out", {"of": "model"}, rows)
    assert [one.on_front for one in found.rows] == [True, False, True, False, False]
    assert found.dense_on_front
    better = Sweep.of("model", "out", {"of": "model"}, [row(0.9, 90, 9.0)])
    assert not better.dense_on_front
