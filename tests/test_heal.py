"""Healing from end to end: the sequence of refinements, heal in a call, on the command line, in a recipe."""

import copy
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, ModelError, StoreError, commands_heal, measure, models, refine
from eckart.bars import Bars
from eckart.cli import app
from eckart.factors import FactoredLinear, NarrowLinear, PartialLinear, PivotedLinear
from eckart.healing import Healing, Refined
from eckart.lessons import Lessons

from . import tiny, wards
from .conftest import Compress, logits, reload

SMALL = wards.settings(
    steps=("closed", "logits"),
    seq_len=32,
    tokens=1280,
    fit_tokens=1024,
    hold_tokens=1024,
    text=(),
    rate=1e-4,
    evaluations=12,
    mixtures=(1.0,),
)
BASE = ["--seq-len", 32, "--tokens", 1280, "--fit-tokens", 1024, "--hold-tokens", 1024, "--rate", 1e-4,
        "--precision", "float32", "--mixture", 1]  # fmt: skip
OPTIONS = [*BASE, "--refine", "closed", "--refine", "logits"]


class _Stopped(Exception):
    """What the tests interrupt with."""


def _silent(stage: str, done: int, total: int) -> None:
    """Watch nothing."""


def _run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _kl(student: Any, dense: Any, lessons: Lessons) -> float:
    return measure.compare(student, dense, lessons.held_out).kl


STEPS = [("closed",), ("block",), ("logits",), ("ranks", "closed", "block", "logits")]


@pytest.mark.parametrize("steps", STEPS)
def test_refinements_bring_the_model_closer_one_after_another(steps: Any) -> None:
    dense, lessons = tiny.build("llama"), wards.lessons(rows=40, fit=24, held_out=16)
    student = wards.cut(dense, 8)
    size, before, untouched = (
        models.parameter_count(student),
        _kl(student, dense, lessons),
        wards.weights(dense),
    )
    settings = wards.settings(steps=steps, tokens=40 * 16, block_rate=1e-3)
    found = refine.heal(student, dense, lessons, settings, watch=_silent)
    assert [step.step for step in found] == list(steps)
    assert found[0].before == pytest.approx(before, rel=1e-3)
    for step in found:
        assert step.after < step.before if step.gain else step.after == step.before
        assert step.tokens > 0
    for first, second in itertools.pairwise(found):
        assert second.before == pytest.approx(first.after, rel=1e-5)
    assert any(step.gain for step in found)
    assert found[-1].after == pytest.approx(_kl(student, dense, lessons), rel=1e-3)
    assert _kl(student, dense, lessons) < before
    assert models.parameter_count(student) <= size
    assert wards.equal(wards.weights(dense), untouched)


@pytest.mark.parametrize("step", ["ranks", "closed", "block", "logits"])
def test_what_does_not_help_is_taken_back_to_the_bit(step: Any) -> None:
    """A student that agrees with its teacher cannot come closer."""
    teacher, lessons = wards.cut(tiny.build("llama"), 8), wards.lessons()
    dense = eckart.densify(copy.deepcopy(teacher))
    student = copy.deepcopy(teacher)
    before = wards.weights(student)
    settings = wards.settings(steps=(step,), rate=0.1, block_rate=0.1)
    (found,) = refine.heal(student, dense, lessons, settings, watch=_silent)
    assert not found.gain
    assert found.after == found.before == pytest.approx(0, abs=1e-6)
    assert wards.equal(wards.weights(student), before)


SEQUENCE = wards.settings(steps=("ranks", "closed", "block", "logits"), block_rate=1e-3, mixtures=(0.5, 1.0))


@pytest.fixture(scope="module", params=["factored", "pivoted"])
def uninterrupted(request: pytest.FixtureRequest) -> tuple[Any, Any, list[Refined]]:
    """A form, a student that was healed by a long sequence, and what that did."""
    dense = tiny.build("llama")
    student = wards.cut(dense, 8, request.param)
    done = refine.heal(student, dense, wards.lessons(fit=24), SEQUENCE, watch=_silent)
    return request.param, student, done


@pytest.mark.parametrize(
    ("stage", "stop"), [("heal: closed", 3), ("heal: block", 1), ("heal: logits", 1), ("heal: logits", 9)]
)
def test_an_interrupted_sequence_ends_like_one_that_was_not(
    stage: str, stop: int, uninterrupted: tuple[Any, Any, list[Refined]], tmp_path: Path
) -> None:
    form, whole, expected = uninterrupted
    dense, lessons, settings = tiny.build("llama"), wards.lessons(fit=24), SEQUENCE

    def interrupt(name: str, done: int, total: int) -> None:
        if (name, done) == (stage, stop):
            raise _Stopped

    work = tmp_path / "work"
    with pytest.raises(_Stopped):
        refine.heal(
            wards.cut(dense, 8, form), dense, lessons, settings, work=work, key="key", watch=interrupt
        )
    again = wards.cut(dense, 8, form)
    seen: set[str] = set()
    found = refine.heal(
        again, dense, lessons, settings,
        work=work, key="key", watch=lambda name, done, total: seen.add(name),
    )  # fmt: skip
    order = [f"heal: {step}" for step in settings.steps]
    assert seen == set(order[order.index(stage) :])
    assert [_timeless(step) for step in found] == [_timeless(step) for step in expected]
    assert wards.equal(wards.weights(again), wards.weights(whole))
    with pytest.raises(StoreError, match="is of a run with other settings, models or text"):
        refine.heal(again, dense, lessons, settings, work=work, key="other", watch=_silent)


def _timeless(step: Refined) -> tuple[Any, ...]:
    return step.step, step.before, step.after, step.gain, step.tokens, step.detail, step.curve


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "factored": ({"form": "factored"}, FactoredLinear),
    "pivoted": ({"form": "pivoted"}, PivotedLinear),
    "mixed": ({"form": "mixed"}, None),
    "width": ({"form": "width", "keep": 0.7}, (NarrowLinear, PartialLinear)),
    "partial": ({"form": "width", "keep": 0.5}, PartialLinear),
    "stock": ({"stock": True, "keep": 0.7}, None),
}


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, "llama") for kind in KINDS), ("pivoted", "llama-bias-untied")]
)
def test_every_kind_of_model_heals_saves_and_loads(
    kind: str, name: str, compress: Compress, tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    dense = tiny.build(name)
    options, module = KINDS[kind]
    if kind == "stock":
        options = {**options, "recipe": eckart.Recipe(keep=0.7, stock=True, multiple=4, text=("x",))}
    student, result = compress(copy.deepcopy(dense), **{"keep": 0.6, "of": "linears"} | options)
    if module is not None:
        assert any(isinstance(found, module) for found in student.modules())
    before, untouched = wards.weights(student), wards.weights(dense)
    kinds = {inner: type(found) for inner, found in student.named_modules()}
    healed, done = eckart.heal(student, dense, text_file, settings=SMALL, tokenizer=tokenizer)
    assert healed is student
    after = wards.weights(healed)
    assert {inner: type(found) for inner, found in healed.named_modules()} == kinds
    assert {key: value.shape for key, value in after.items()} == {n: v.shape for n, v in before.items()}
    assert models.parameter_count(healed) == result.after.model
    assert done.steps[-1].after < done.steps[0].before
    assert wards.changed(before, after)
    assert wards.equal(wards.weights(dense), untouched)
    eckart.save(healed, tokenizer, tmp_path / "out", done)
    again = reload(tmp_path / "out")
    assert torch.equal(logits(again, tiny.tokens()), logits(healed, tiny.tokens()))
    assert not torch.equal(logits(again, tiny.tokens()), logits(dense, tiny.tokens()))
    shown = str(done)
    for words in ("refinement", "closed", "logits", "KL before", "healed towards"):
        assert words in shown


def test_perplexity_is_measured_before_and_after(tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    dense = tiny.build("llama")
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely; 0123456789. " * 40)
    student = wards.cut(dense, 8)
    before = copy.deepcopy(student)
    healed, done = eckart.heal(
        student, dense, f"{text_file}=2", settings=SMALL,
        eval_text=text_file, foreign_text=[other], eval_tokens=640, tokenizer=tokenizer,
    )  # fmt: skip
    for found, file in ((done.quality, text_file), (done.foreign, other)):
        assert found is not None
        for own, model in ((found.dense, dense), (found.one_shot, before), (found.compressed, healed)):
            expected = eckart.evaluate(model, file, tokens=640, seq_len=32, tokenizer=tokenizer)
            assert isinstance(expected, measure.Perplexity)
            assert own.loss == pytest.approx(expected.loss, rel=1e-4)
    shown = str(done)
    assert "own text" in shown
    assert "foreign text" in shown
    assert json.loads(json.dumps(done.to_dict()))["quality"]["dense"]["perplexity"] > 0


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_model_stays_in_its_dtype_or_gets_the_one_that_is_asked_for(
    dtype: str | None, tokenizer: Any, text_file: Path
) -> None:
    dense = tiny.build("llama")
    student: Any = models.cast(wards.cut(dense, 8), torch.bfloat16)
    healed, done = eckart.heal(student, dense, text_file, settings=SMALL, tokenizer=tokenizer, dtype=dtype)
    assert str(healed.dtype) == f"torch.{dtype or 'bfloat16'}"
    assert done.dtype == (dtype or "bfloat16")
    assert bool(torch.isfinite(logits(healed, tiny.tokens()).float()).all())


def test_what_the_teacher_writes_can_be_learned_from(tokenizer: Any) -> None:
    dense = tiny.build("llama")
    student = wards.cut(dense, 8)
    stages: list[str] = []
    _, done = eckart.heal(
        student, dense, "self", settings=SMALL,
        tokenizer=tokenizer, watch=lambda stage, at, of: stages.append(stage),
    )  # fmt: skip
    assert "write text" in stages
    assert done.settings.text == ("self",)
    assert done.steps[-1].after < done.steps[0].before


def test_models_that_do_not_belong_together_are_refused(llama: Any, tokenizer: Any, text_file: Path) -> None:
    student = wards.cut(llama, 8)
    before = wards.weights(student)

    def heal(**changes: Any) -> None:
        options = {"text": text_file, "settings": SMALL, "tokenizer": tokenizer}
        eckart.heal(student, **{"teacher": tiny.build("llama")} | options | changes)

    wide = tiny.build("llama", vocab_size=300)
    for extra in ({}, {"eval_text": text_file}):
        with pytest.raises(
            ModelError, match="a vocabulary of 258 and the teacher of 300: the teacher must be"
        ):
            heal(teacher=wide, **extra)
        with pytest.raises(ModelError, match="text needs a tokenizer: pass tokenizer="):
            heal(tokenizer=None, **extra)
        with pytest.raises(ConfigError, match="seq_len 200: the model has 128 positions"):
            heal(settings=wards.settings(seq_len=200), **extra)
    with pytest.raises(ModelError, match="the model has 2 blocks and the dense one 3: whole blocks"):
        heal(teacher=tiny.build("llama", num_hidden_layers=3))
    with pytest.raises(ConfigError, match="healing needs text: give at least one source"):
        heal(text=())
    with pytest.raises(ConfigError, match=r"no file nowhere\.txt"):
        heal(text="nowhere.txt")
    with pytest.raises(ModelError, match="got a int: give a hub id"):
        heal(teacher=3)
    with pytest.raises(ConfigError, match="dtype 'int8': legal are"):
        heal(dtype="int8")
    assert wards.equal(wards.weights(student), before)


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, compressed_folder: Path, llama_folder: Path, text_file: Path
) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("heal") / "out"
    found = _run(
        "heal", compressed_folder, "--teacher", llama_folder, "--text", text_file, "--out", out, *OPTIONS,
        "--eval-text", text_file, "--eval-tokens", 640,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    return out, found.output


def test_heal_writes_a_folder_and_says_what_it_did(
    written: tuple[Path, str], compressed_folder: Path, llama_folder: Path, text_file: Path
) -> None:
    out, output = written
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for words in ("closed", "logits", "KL before", "own text", "peak memory", f"written to {out}"):
        assert words in output, words
    card, report = (out / "README.md").read_text(), json.loads((out / "eckart.json").read_text())
    old = json.loads((compressed_folder / "eckart.json").read_text())
    assert 0 < card.index("## Compressed") < card.index("## Healed")
    assert str(out.parent) not in card
    assert {key: report[key] for key in old if key not in ("environment", "card")} == {
        k: v for k, v in old.items() if k not in ("environment", "card")
    }
    (healed,) = report["healed"]
    assert [step["step"] for step in healed["steps"]] == ["closed", "logits"]
    own, before, dense = (reload(folder) for folder in (out, compressed_folder, llama_folder))
    assert models.parameter_count(own) == models.parameter_count(before)
    assert type(own) is type(before)
    expected = eckart.evaluate(out, text_file, tokens=640, seq_len=32)
    assert isinstance(expected, measure.Perplexity)
    assert healed["quality"]["compressed"]["loss"] == pytest.approx(expected.loss, rel=1e-4)
    rows = wards.lessons(held_out=8).held_out
    assert measure.compare(own, dense, rows).kl < measure.compare(before, dense, rows).kl


def test_the_command_is_the_call(
    written: tuple[Path, str], compressed_folder: Path, llama_folder: Path, text_file: Path
) -> None:
    model, _ = eckart.heal(compressed_folder, llama_folder, text_file, settings=SMALL)
    assert wards.equal(wards.weights(model), wards.weights(reload(written[0])))


def test_a_healed_folder_can_be_healed_again(
    written: tuple[Path, str], llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    found = _run(
        "heal", written[0], "--teacher", llama_folder, "--text", text_file, "--out", tmp_path / "again",
        *BASE, "--refine", "closed", "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    printed = json.loads(found.stdout)
    assert [step["step"] for step in printed["steps"]] == ["closed"]
    report = json.loads((tmp_path / "again" / "eckart.json").read_text())
    assert len(report["healed"]) == 2
    assert (tmp_path / "again" / "README.md").read_text().count("## Healed") == 2


@pytest.mark.parametrize(("stage", "stop"), [("heal: closed", 1), ("heal: logits", 25)])
def test_an_interrupted_command_goes_on_to_the_same_weights(
    stage: str,
    stop: int,
    written: tuple[Path, str],
    compressed_folder: Path,
    llama_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    command = ["heal", compressed_folder, "--teacher", llama_folder, "--text", text_file, "--out", out]
    seen: list[tuple[str, int]] = []

    class Interrupting(Bars):
        def watch(self, stage_now: str, done: int, total: int) -> None:
            seen.append((stage_now, done))
            if (stage_now, done) == (stage, stop):
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(commands_heal, "Bars", Interrupting)
        found = _run(*command, *OPTIONS)
    assert found.exit_code == 130
    state = tmp_path / ".out.healing"
    assert not out.exists()
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == ({".out.healing"} if stage == "heal: logits" else set())
    there = f"the state is kept in {state}, the same command goes on from there"
    assert (there if kept else "nothing was written") in found.output
    if kept:
        other = _run(*command, *OPTIONS, "--seed", 3)
        assert other.exit_code == 2
        assert "is of a run with other settings, models or text" in other.output
    first = len(seen)
    with monkeypatch.context() as patch:
        patch.setattr(commands_heal, "Bars", Interrupting)
        stop = -1
        found = _run(*command, *OPTIONS)
    assert found.exit_code == 0, found.output
    assert ("heal: closed" in {name for name, _ in seen[first:]}) == (stage == "heal: closed")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert wards.equal(wards.weights(reload(out)), wards.weights(reload(written[0])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--refine": "magic"}, "refinement 'magic': legal are"),
        ({"--train": "none"}, "train 'none': legal are factors, blocks, all, adapter"),
        ({"--batch": 4, "--micro": 3}, "batch 4: must be a multiple of micro = 3"),
        ({"--text": "nowhere.txt"}, "no file nowhere.txt"),
        ({"--text": "x=0"}, "text 'x=0': the weight 0 must be above 0"),
        ({"--teacher": "./nowhere"}, "no model at ./nowhere"),
        ({"--seq-len": 200}, "seq_len 200: the model has 128 positions"),
        ({"--recipe": "none.yaml"}, "no recipe at none.yaml"),
        ({"--device": "abacus"}, "device 'abacus' is not usable here"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    changes: dict[str, Any],
    message: str,
    compressed_folder: Path,
    llama_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    options: dict[Any, Any] = dict(zip(OPTIONS[::2], OPTIONS[1::2], strict=True))
    options |= {"--teacher": llama_folder, "--text": text_file, "--out": tmp_path / "out"} | changes
    found = _run("heal", compressed_folder, *[part for option in options.items() for part in option])
    assert found.exit_code == 2
    assert re.search(re.escape(message), found.output), found.output
    assert "Traceback" not in found.output
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_teacher_and_a_bad_output_are_refused(
    written: tuple[Path, str], compressed_folder: Path, llama_folder: Path, text_file: Path, tmp_path: Path,
    tokenizer: Any,
) -> None:  # fmt: skip
    other = tmp_path / "other"
    tiny.build("llama", vocab_size=300).save_pretrained(other)
    tokenizer.save_pretrained(other)
    text = ["--text", text_file, *OPTIONS]
    for arguments, message in (
        (["--teacher", other, "--out", tmp_path / "out"], "and the teacher of 300: the teacher must be"),
        (["--teacher", llama_folder, "--out", written[0]], "exists: choose another --out"),
        (
            ["--teacher", llama_folder, "--out", compressed_folder, "--overwrite"],
            "is where the model comes from",
        ),
        (["--teacher", llama_folder, "--out", llama_folder, "--overwrite"], "is where the model comes from"),
        (["--teacher", llama_folder, "--out", text_file / "x"], "is not a folder that can be written to"),
    ):
        found = _run("heal", compressed_folder, *arguments, *text)
        assert found.exit_code == 2
        assert message in found.output
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    assert (
        _run("heal", compressed_folder, "--teacher", llama_folder, "--out", tmp_path / "out").exit_code == 2
    )


def test_the_heal_section_of_a_recipe_is_taken_and_options_go_over_it(
    compressed_folder: Path, llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    section = {"steps": ["closed"], "mixtures": [1.0], "seq_len": 32, "hold_tokens": 512, "fit_tokens": 512}
    recipe.write_text(yaml.safe_dump({"keep": 0.5, "heal": section}))
    found = _run(
        "heal", compressed_folder, "--teacher", llama_folder, "--text", text_file, "--out", tmp_path / "out",
        "--recipe", recipe, "--fit-tokens", 640, "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    settings = json.loads(found.stdout)["settings"]
    assert settings["steps"] == ["closed"]
    assert settings["mixtures"] == [1.0]
    assert (settings["fit_tokens"], settings["hold_tokens"]) == (640, 512)
    assert settings["text"] == [str(text_file)]


def test_a_cache_of_the_teacher_serves_later_runs(
    compressed_folder: Path, llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    found = []
    for out in ("first", "second"):
        command = ["heal", compressed_folder, "--teacher", llama_folder, "--text", text_file, "--out"]
        options = [*BASE, "--refine", "logits", "--cache", tmp_path / "cache"]
        done = _run(*command, tmp_path / out, *options)
        assert done.exit_code == 0, done.output
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
        found.append((wards.weights(reload(tmp_path / out)), files))
    assert wards.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert len(found[0][1]) > 40


def test_compress_heals_at_the_end(
    compress: Compress, text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    dense = tiny.build("llama")
    plain, one_shot = compress(copy.deepcopy(dense))
    model, result = compress(copy.deepcopy(dense), heal=SMALL, foreign_text=text_file)
    assert result.one_shot is not None
    assert result.one_shot.loss == pytest.approx(one_shot.compressed.loss, rel=1e-5)
    assert [step.step for step in result.healing] == ["closed", "logits"]
    assert result.healing[-1].after < result.healing[0].before
    assert result.after.model == models.parameter_count(model) == one_shot.after.model
    assert result.foreign is not None
    assert {"heal: closed", "heal: logits"} <= set(result.seconds)
    rows = wards.lessons(held_out=8).held_out
    assert measure.compare(model, dense, rows).kl < measure.compare(plain, dense, rows).kl
    for words in ("closed", "logits", "foreign text"):
        assert words in str(result)
    eckart.save(model, tokenizer, tmp_path / "out", result)
    assert torch.equal(logits(reload(tmp_path / "out"), tiny.tokens()), logits(model, tiny.tokens()))
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert saved["heal"]["seq_len"] == 32
    assert one_shot.one_shot is None
    assert one_shot.healing == ()


def test_text_that_is_measured_on_is_not_learned_from(
    compress: Compress, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Lessons] = []

    def watched(student: Any, dense: Any, lessons: Lessons, healing: Healing, **options: Any) -> Any:
        seen.append(lessons)
        return []

    monkeypatch.setattr(refine, "heal", watched)
    settings = wards.settings(steps=("closed",), seq_len=32, fit_tokens=10**6, hold_tokens=10**6)
    for options in ({}, {"eval_text": text_file}):
        compress(tiny.build("llama"), heal=replace(settings, text=()), method="svd", **options)
    sizes = [len(lessons.fit) + len(lessons.held_out) for lessons in seen]
    tokens = len(text_file.read_text())
    assert sizes[0] == pytest.approx(0.95 * tokens / 32, abs=2)
    assert sizes[1] == pytest.approx(tokens / 32, abs=2)


def test_a_recipe_with_a_heal_section_runs_from_the_command_line(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    section = {
        "steps": ["closed", "logits"],
        "seq_len": 32,
        "tokens": 320,
        "hold_tokens": 256,
        "fit_tokens": 256,
    }
    base = {"keep": 0.7, "of": "linears", "tokens": 1024, "gradient_tokens": 512, "seq_len": 64}
    recipe.write_text(yaml.safe_dump(base | {"text": [str(text_file)], "heal": section}))
    out = tmp_path / "out"
    found = _run("compress", llama_folder, "--recipe", recipe, "--out", out)
    assert found.exit_code == 0, found.output
    assert "logits" in found.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]
    assert models.low_rank_modules(reload(out))
    again = _run("compress", "--recipe", out / "recipe.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert wards.equal(wards.weights(reload(out)), wards.weights(reload(tmp_path / "again")))
