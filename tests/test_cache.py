"""The cache: what is taken from it is what would be made, to the bit, and nothing else is found there."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eckart import StoreError, decomposing, hub, identity, models, pipeline, shelf
from eckart.recipe import Recipe
from eckart.shelf import Shelf
from eckart.streaming.work import Work

from . import tiny

SMALL: dict[str, Any] = {"tokens": 1024, "gradient_tokens": 512, "seq_len": 64, "eval_tokens": 512}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was really computed: calibrations and decompositions."""
    seen: list[str] = []
    for name in ("statistics_of", "factor"):
        whole = getattr(decomposing, name)

        def counted(*given: Any, name: str = name, whole: Any = whole, **named: Any) -> Any:
            seen.append(name)
            return whole(*given, **named)

        monkeypatch.setattr(decomposing, name, counted)
    return seen


def compressed(
    tokenizer: Any, text: Path, cache: Shelf | None, model: Any = None, **options: Any
) -> tuple[dict[str, Tensor], Any]:
    own = model if model is not None else tiny.build("llama")
    loaded = hub.Loaded(own, tokenizer, "tiny", torch.float32, None)
    recipe = Recipe(**{"keep": 0.6, "of": "linears", "text": (str(text),), **SMALL, **options})
    made, result = pipeline.finish(recipe, pipeline.prepare(recipe, loaded, shelf=cache))
    return models.state_tensors(made), result


OPTIONS: dict[str, dict[str, Any]] = {
    "eckart": {},
    "pivoted": {"form": "pivoted"},
    "width": {"form": "width"},
    "stock": {"stock": True, "multiple": 8},
    "depth": {"depth": True, "keep": 0.5},
    "svd": {"method": "svd"},
    "fwsvd": {"method": "fwsvd"},
    "shared": {"method": "basis-sharing"},
    "anchored": {"method": "aa-svd"},
    "int8": {"storage": "int8"},
    "size": {"keep": None, "size": "40KB"},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_from_the_cache_comes_the_same_model_to_the_bit(
    name: str, tokenizer: Any, text_file: Path, tmp_path: Path, runs: list[str]
) -> None:
    """Twice with a cache and once without; the second time nothing is calibrated or decomposed."""
    options, cache = OPTIONS[name], Shelf(tmp_path)
    without, expected = compressed(tokenizer, text_file, None, **options)
    compressed(tokenizer, text_file, cache, **options)
    runs.clear()
    again, result = compressed(tokenizer, text_file, cache, **options)
    assert runs == []
    assert without.keys() == again.keys()
    assert identity.of_tensors(without) == identity.of_tensors(again)
    assert (expected.modules, expected.dense, expected.compressed) == (
        result.modules, result.dense, result.compressed,
    )  # fmt: skip
    assert expected.warnings == result.warnings
    assert (expected.calibration_tokens, expected.gradient_tokens) == (
        result.calibration_tokens, result.gradient_tokens,
    )  # fmt: skip


CHANGES: dict[str, dict[str, Any]] = {
    "tokens": {"tokens": 512},
    "gradient tokens": {"gradient_tokens": 128},
    "windows": {"seq_len": 32},
    "seed": {"seed": 1},
    "labels": {"labels": "sampled"},
    "begin token": {"bos": True},
    "metrics": {"method": "svd-llm"},
    "damping": {"damp": 1e-2},
    "matrices": {"exclude": ("*down_proj",)},
    "landmarks": {"landmarks": "energy"},
    "rounding": {"storage": "int8"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_result_is_not_found(
    name: str, tokenizer: Any, text_file: Path, tmp_path: Path, runs: list[str]
) -> None:
    """And what comes out instead is what comes out without a cache."""
    cache = Shelf(tmp_path)
    compressed(tokenizer, text_file, cache)
    runs.clear()
    found, _ = compressed(tokenizer, text_file, cache, **CHANGES[name])
    assert "factor" in runs
    expected, _ = compressed(tokenizer, text_file, None, **CHANGES[name])
    assert identity.of_tensors(found) == identity.of_tensors(expected)


def test_other_weights_other_text_or_another_dtype_are_not_found(
    tokenizer: Any, text_file: Path, tmp_path: Path, runs: list[str]
) -> None:
    cache = Shelf(tmp_path / "cache")
    compressed(tokenizer, text_file, cache)
    other = tiny.build("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 2] += 1e-3
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text().replace("rank", "norm"))
    for given, model in ((text_file, other), (text, None), (text_file, tiny.build("llama", torch.float64))):
        runs.clear()
        compressed(tokenizer, given, cache, model)
        assert runs == ["statistics_of", "factor"]


OTHER_BUDGETS: list[dict[str, Any]] = [
    {"keep": 0.8}, {"of": "model", "keep": 0.9}, {"dtype": "bfloat16"},
    {"allocation": "uniform", "form": "mixed"},
]  # fmt: skip


@pytest.mark.parametrize("options", OTHER_BUDGETS)
def test_what_changes_nothing_of_it_is_found(
    options: dict[str, Any], tokenizer: Any, text_file: Path, tmp_path: Path, runs: list[str]
) -> None:
    compressed(tokenizer, text_file, Shelf(tmp_path))
    runs.clear()
    compressed(tokenizer, text_file, Shelf(tmp_path), **options)
    assert runs == []


def test_methods_share_what_is_equal(
    tokenizer: Any, text_file: Path, tmp_path: Path, runs: list[str]
) -> None:
    """Statistics where these are the same, decompositions where the metrics are."""
    cache = Shelf(tmp_path)
    seen = {}
    for method in ("svd-llm", "pifa", "basis-sharing", "eckart", "io-svd"):
        runs.clear()
        compressed(tokenizer, text_file, cache, method=method)
        seen[method] = list(runs)
    assert seen["svd-llm"] == seen["eckart"] == ["statistics_of", "factor"]
    assert seen["pifa"] == []
    assert seen["basis-sharing"] == seen["io-svd"] == ["factor"]


def test_a_model_is_the_same_wherever_it_lies_and_whatever_it_was_loaded_by() -> None:
    first, second = tiny.build("llama"), tiny.build("llama")
    second.config._name_or_path = "elsewhere"
    assert identity.of_model(first) == identity.of_model(second)
    second.config.rms_norm_eps = 1e-3
    assert identity.of_model(first)["config"] != identity.of_model(second)["config"]


KEY = {"source": "a model", "number": 1}


def fetched(cache: Shelf, make: Any, key: Any = KEY, size: int = 0, said: list[str] | None = None) -> Any:
    return cache.fetch(
        "numbers", key, make,
        lambda work, made: work.write_json("values", made),
        lambda work: work.read_json("values"),
        lambda made: size,
        warnings=[] if said is None else said,
    )  # fmt: skip


def never() -> Any:
    raise AssertionError("it is there")


def test_an_entry_is_there_for_its_key_and_for_no_other(tmp_path: Path) -> None:
    cache = Shelf(tmp_path)
    assert fetched(cache, lambda: {"a": 0.1}) == {"a": 0.1}
    assert cache.used == {"numbers": False}
    assert fetched(cache, never, {**KEY, "source": "the same under another name"}) == {"a": 0.1}
    assert cache.used == {"numbers": True}
    assert fetched(cache, lambda: {"a": 0.2}, {**KEY, "number": 2}) == {"a": 0.2}
    (new, old), size = cache.entries(), cache.bytes()
    assert {new.kind, old.kind} == {"numbers"}
    assert {new.source, old.source} == {"a model"}
    assert size == new.bytes + old.bytes > 0
    (tmp_path / "foreign-file").write_text("stays")
    assert cache.clear() == size
    assert cache.entries() == []
    assert (tmp_path / "foreign-file").exists()


def test_a_cache_that_is_only_read_stays_as_it_is(tmp_path: Path) -> None:
    cache = Shelf(tmp_path / "cache", writes=False)
    assert fetched(cache, lambda: {"a": 1}) == {"a": 1}
    assert not (tmp_path / "cache").exists()
    fetched(Shelf(tmp_path / "cache"), lambda: {"a": 1})
    assert fetched(cache, never) == {"a": 1}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_entry_is_not_there(tmp_path: Path, error: type[BaseException]) -> None:
    cache = Shelf(tmp_path)

    def torn(work: Work, made: Any) -> None:
        work.write_json("values", made)
        raise error

    with pytest.raises(error):
        cache.fetch("numbers", KEY, lambda: {"a": 1}, torn, lambda work: never(), warnings=[])
    assert cache.entries() == []
    assert fetched(cache, lambda: {"a": 2}) == {"a": 2}


def test_what_an_interrupted_process_left_goes_after_a_day(tmp_path: Path) -> None:
    old, new = (tmp_path / f".making-{name}" for name in ("old", "new"))
    for folder, age in ((old, 2 * 24 * 3600), (new, 60)):
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    fetched(Shelf(tmp_path), lambda: {})
    assert (old.exists(), new.exists()) == (False, True)


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    made, found = [], []

    def slow() -> Any:
        made.append(1)
        time.sleep(0.3)
        return {"a": 1}

    threads = [
        threading.Thread(target=lambda: found.append(fetched(Shelf(tmp_path), slow))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"a": 1}] * 3
    assert len(made) == 1


def test_without_room_or_rights_nothing_is_kept_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    assert fetched(Shelf(tmp_path / "full"), lambda: {"a": 1}, size=10**18, said=said) == {"a": 1}
    assert Shelf(tmp_path / "full").entries() == []
    assert "numbers of 1000000000.0 GB are not cached:" in said[0]
    assert "name another --cache, or pass --no-cache" in said[0]
    (tmp_path / "file").write_text("no folder")
    said.clear()
    assert fetched(Shelf(tmp_path / "file"), lambda: {"a": 1}, said=said) == {"a": 1}
    assert "nothing is cached" in said[0]


def test_an_entry_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    cache = Shelf(tmp_path)
    fetched(cache, lambda: {"a": 1})
    (tmp_path / cache.entries()[0].name / "values.json").write_text("{")
    with pytest.raises(StoreError, match=r"values\.json cannot be read .*: delete"):
        fetched(cache, never)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in (shelf.VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for system, parts in (("linux", (".cache",)), ("darwin", ("Library", "Caches")),
                          ("win32", ("AppData", "Local"))):  # fmt: skip
        monkeypatch.setattr(sys, "platform", system)
        assert shelf.default_folder() == tmp_path.joinpath(*parts, "eckart")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert shelf.default_folder() == tmp_path / "xdg" / "eckart"
    monkeypatch.setenv(shelf.VARIABLE, str(tmp_path / "own"))
    assert shelf.default_folder() == tmp_path / "own"
