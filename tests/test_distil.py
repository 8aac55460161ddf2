"""Laws of healing end to end."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from eckart import ConfigError, ModelError, StoreError, distil, models, training
from eckart.checkpoint import Checkpoint
from eckart.distil import Course
from eckart.healing import Train
from eckart.lessons import Lessons
from eckart.teacher import Teacher

from . import tiny, wards
from .conftest import logits
from .wards import LENGTH

NAMES = list(tiny.LINEAR)
adapters = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class _Stopped(Exception):
    """What the tests interrupt with."""


def _pair(name: str = "llama", rank: int = 8) -> tuple[Any, Any]:
    dense = tiny.build(name)
    return wards.cut(dense, rank), dense


def _judged(student: Any, dense: Any, lessons: Lessons) -> float:
    """Return the divergence by torch's own words."""
    rows = lessons.held_out
    own, other = (logits(model, rows)[:, :-1].log_softmax(-1).flatten(0, 1) for model in (student, dense))
    return float(functional.kl_div(own, other, log_target=True, reduction="batchmean"))


def _same(own: Course, other: Course) -> bool:
    """Tell whether two runs went alike, but for their seconds."""
    return (own.judged, own.best, own.gain, own.ended) == (other.judged, other.best, other.gain, other.ended)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_brings_every_architecture_closer(name: str) -> None:
    student, dense = _pair(name)
    lessons, before = wards.lessons(rows=40), wards.weights(dense)
    first = _judged(student, dense, lessons)
    course = distil.distil(student, dense, lessons, wards.settings(tokens=40 * LENGTH))
    assert course.start == pytest.approx(first, rel=1e-3)
    assert course.gain
    assert course.end < course.start
    assert course.end == pytest.approx(_judged(student, dense, lessons), rel=1e-3)
    assert course.tokens == 40 * LENGTH
    assert wards.equal(before, wards.weights(dense))


@pytest.mark.parametrize("rate", [1e-3, 3e-2, 3e-1])
def test_what_is_kept_is_the_best_that_was_judged_and_never_worse_than_the_start(rate: float) -> None:
    student, dense = _pair()
    lessons = wards.lessons()
    course = distil.distil(student, dense, lessons, wards.settings(rate=rate, evaluations=12))
    now = _judged(student, dense, lessons)
    assert now <= course.start * (1 + 1e-4)
    if course.gain:
        assert now == pytest.approx(min(found.held_out for found in course.judged), rel=1e-3)
    else:
        assert course.best == 0


def test_a_huge_rate_is_stopped_and_leaves_the_start_to_the_bit() -> None:
    student, dense = _pair()
    before = wards.weights(student)
    course = distil.distil(student, dense, wards.lessons(), wards.settings(rate=10.0, evaluations=12))
    assert course.diverged
    assert course.ended.startswith("diverged at step 1: ")
    assert course.ended.endswith("at the start; lower rate")
    assert course.tokens == LENGTH
    assert (course.best, course.gain) == (0, False)
    assert wards.equal(before, wards.weights(student))


def test_a_loss_that_is_not_finite_is_stopped_at_once() -> None:
    student, dense = _pair()
    before = wards.weights(student)
    course = distil.distil(student, dense, wards.lessons(), wards.settings(rate=1e30, evaluations=1))
    assert course.diverged
    assert course.judged[-1].step < 12
    assert wards.equal(before, wards.weights(student))


def test_patience_ends_a_run_that_gets_no_better() -> None:
    """A model that agrees already has no new best; only the second half of the twelve steps counts."""
    dense = tiny.build("llama")
    student = copy.deepcopy(dense)
    settings = wards.settings(rate=1e-6, evaluations=12, patience=3)
    course = distil.distil(student, dense, wards.lessons(), settings)
    assert course.ended == "no new best in 3 evaluations"
    assert [found.step for found in course.judged] == list(range(10))
    assert wards.equal(wards.weights(dense), wards.weights(student))


def test_evaluations_are_spread_evenly_and_rates_rise_and_fall() -> None:
    student, dense = _pair()
    course = distil.distil(student, dense, wards.lessons(), wards.settings(evaluations=4))
    assert [found.step for found in course.judged] == [0, 3, 6, 9, 12]
    assert course.ended == "all steps done"
    factor = distil._schedule(4, 20)
    rates = [factor(step) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[20] == pytest.approx(0, abs=1e-12)
    assert rates[12] == pytest.approx(0.5)


@pytest.mark.parametrize("stop", [5, 9, 12])
@pytest.mark.parametrize("train", ["blocks", pytest.param("adapter", marks=adapters)])
def test_an_interrupted_run_ends_like_one_that_was_not(train: Train, stop: int, tmp_path: Path) -> None:
    lessons, settings = wards.lessons(), wards.settings(train=train, evaluations=3)
    whole, dense = _pair()
    expected = distil.distil(whole, dense, lessons, settings)

    def interrupt(done: int, total: int) -> None:
        if done == stop:
            raise _Stopped

    kept = Checkpoint(tmp_path / "run.safetensors", "key")
    student, _ = _pair()
    with pytest.raises(_Stopped):
        distil.distil(student, dense, lessons, settings, checkpoint=kept, watch=interrupt)
    assert kept.file.exists()
    seen: list[int] = []
    student, _ = _pair()
    course = distil.distil(
        student, dense, lessons, settings, checkpoint=kept, watch=lambda done, total: seen.append(done)
    )
    assert seen[0] == (stop - 1) // 4 * 4 + 1
    assert _same(course, expected)
    assert wards.equal(wards.weights(student), wards.weights(whole))
    shorter, _ = _pair()
    distil.distil(shorter, dense, Lessons(lessons.rows[4:], lessons.fit, lessons.held_out), settings)
    assert not wards.equal(wards.weights(shorter), wards.weights(whole))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "run.safetensors", "key")
    student, dense = _pair()
    first = distil.distil(student, dense, wards.lessons(), wards.settings(), checkpoint=kept)
    again, _ = _pair()
    seen: list[int] = []
    second = distil.distil(
        again, dense, wards.lessons(), wards.settings(),
        checkpoint=kept, watch=lambda done, total: seen.append(done),
    )  # fmt: skip
    assert seen == []
    assert _same(first, second)
    assert wards.equal(wards.weights(student), wards.weights(again))
    with pytest.raises(StoreError, match="is of a run with other settings"):
        distil.distil(
            again, dense, wards.lessons(), wards.settings(), checkpoint=Checkpoint(kept.file, "other")
        )


@pytest.mark.parametrize("train", ["factors", "blocks", "all"])
def test_only_what_is_named_changes(train: Train) -> None:
    student, dense = _pair("llama-bias-untied")
    # One matrix that was not made smaller: it is in a block, and it is not a factor.
    whole = "model.layers.1.mlp.up_proj"
    models.replace(student, whole, copy.deepcopy(models.find(dense, whole)))
    before = wards.weights(student)
    distil.distil(student, dense, wards.lessons(), wards.settings(train=train))
    found = wards.changed(before, wards.weights(student))
    assert found == set(training.trained_names(student, train))
    assert any("norm" in name for name in found) == (train != "factors")
    assert any(name.startswith(whole) for name in found) == (train != "factors")
    assert any("embed" in name or "lm_head" in name for name in found) == (train == "all")


@adapters
@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_an_adapter_is_merged_and_leaves_no_trace(form: Any) -> None:
    dense = tiny.build("llama-bias-untied")
    student = wards.cut(dense, 8, form)
    before, kinds = wards.weights(student), {name: type(m) for name, m in student.named_modules()}
    attributes = set(vars(student))
    course = distil.distil(student, dense, wards.lessons(), wards.settings(train="adapter"))
    assert course.gain
    after = wards.weights(student)
    assert {name: type(module) for name, module in student.named_modules()} == kinds
    assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in before.items()}
    found = wards.changed(before, after)
    assert found == {name for name in training.trained_names(student, "adapter") if "bias" not in name}
    assert set(vars(student)) == attributes
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert course.end == pytest.approx(_judged(student, dense, wards.lessons()), rel=1e-3)


@adapters
@pytest.mark.parametrize("train", ["factors", "adapter"])
def test_a_model_without_factors_is_refused(train: Train) -> None:
    dense = tiny.build("llama")
    with pytest.raises(ModelError, match="no module of the model is low-rank or narrow: .* 'blocks' or"):
        distil.distil(copy.deepcopy(dense), dense, wards.lessons(), wards.settings(train=train))


def test_how_a_batch_is_cut_does_not_matter() -> None:
    """Gradients are accumulated over micro-batches: the same sum in another order."""
    found = []
    for batch, micro in ((4, 1), (4, 4), (4, 2), (2, 2)):
        student, dense = _pair()
        # AdamW's first steps are signs of gradients, which rounding flips where they are near zero.
        settings = wards.settings(tokens=24 * LENGTH, batch=batch, micro=micro, evaluations=1, rate=1e-4)
        course = distil.distil(student, dense, wards.lessons(rows=24), settings)
        found.append((wards.weights(student), course.end))
    start = wards.weights(_pair()[0])
    moved = wards.distance(start, found[0][0])
    for other, end in found[1:3]:
        assert wards.distance(found[0][0], other) < 0.1 * moved
        assert end == pytest.approx(found[0][1], rel=1e-4)
    assert found[3][1] != pytest.approx(found[0][1], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_activations_give_the_same_bits(name: str) -> None:
    found = []
    for checkpointing in (False, True):
        student, dense = _pair(name)
        settings = wards.settings(tokens=4 * LENGTH, checkpointing=checkpointing, evaluations=1)
        course = distil.distil(student, dense, wards.lessons(rows=4), settings)
        found.append((wards.weights(student), course.judged))
    assert wards.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][1][0].held_out != found[0][1][-1].held_out


def test_activations_are_really_recomputed() -> None:
    for checkpointing, expected in ((False, 1), (True, 2)):
        student = tiny.build("llama")
        seen: list[int] = []
        settings = wards.settings(checkpointing=checkpointing)
        handle = student.model.layers[0].mlp.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(1)
        )
        with training.training(student, training.trained_names(student, "blocks"), settings):
            student(input_ids=tiny.tokens(), use_cache=False).logits.sum().backward()
            handle.remove()
        assert len(seen) == expected
        assert "forward" not in vars(student.model.layers[0])


@adapters
@pytest.mark.parametrize("train", ["blocks", "adapter"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_is_given_back_as_it_was(train: Train, checkpointing: bool) -> None:
    student, dense = _pair()
    student.train()
    student.model.layers[0].mlp.eval()
    frozen = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.up.weight"]
    for name in frozen:
        student.get_parameter(name).requires_grad_(False)
    modes = {name: module.training for name, module in student.named_modules()}
    distil.distil(student, dense, wards.lessons(), wards.settings(train=train, checkpointing=checkpointing))
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert [name for name, value in student.named_parameters() if not value.requires_grad] == frozen
    assert all(value.grad is None for value in student.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in student.modules())


def test_dropout_stays_off() -> None:
    """Otherwise two runs would not be the same, and OPT drops out by default."""
    found = []
    for seed in (0, 1):
        student, dense = _pair("opt")
        student.train()
        torch.manual_seed(seed)
        distil.distil(student, dense, wards.lessons(), wards.settings())
        found.append(wards.weights(student))
    assert wards.equal(*found)


def test_the_seed_of_the_user_is_left_alone() -> None:
    student, dense = _pair()
    torch.manual_seed(1)
    expected = torch.randn(1)
    torch.manual_seed(1)
    distil.distil(student, dense, wards.lessons(), wards.settings())
    assert torch.equal(torch.randn(1), expected)


def test_the_text_itself_can_be_learned() -> None:
    """With text_loss 1 nothing of the teacher is left in what is minimised: it may be any model."""
    found, lessons = [], wards.lessons()
    for name in ("llama", "mistral"):
        student = _pair()[0]
        distil.distil(student, tiny.build(name), lessons, wards.settings(text_loss=1.0))
        found.append(wards.weights(student))
    assert wards.distance(*found) < 1e-6
    student, dense = _pair()
    distil.distil(student, dense, lessons, wards.settings())
    assert wards.distance(found[0], wards.weights(student)) > 1e-4
    judged = distil.judge(student, Teacher(dense), lessons.held_out, wards.settings(text_loss=1.0))
    rows = lessons.held_out
    own = functional.cross_entropy(logits(student, rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert float(judged.mean()) == pytest.approx(float(own), rel=1e-4)
    assert judged.dtype == torch.float64


def test_a_cache_gives_the_same_run_cold_and_warm(tmp_path: Path) -> None:
    found, forwards = [], []
    for cache in (tmp_path, tmp_path, None):
        student, dense = _pair()
        seen: list[int] = []
        handle = dense.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(1))
        distil.distil(student, dense, wards.lessons(), wards.settings(), cache=cache)
        handle.remove()
        found.append(wards.weights(student))
        forwards.append(len(seen))
    assert wards.equal(found[0], found[1])
    assert not wards.equal(found[0], found[2])
    assert forwards[:2] == [18, 0]


def test_bfloat16_is_close_to_float32_and_is_not_it() -> None:
    ends, lessons = [], wards.lessons(rows=40)
    for precision in ("float32", "bfloat16"):
        student, dense = _pair()
        distil.distil(student, dense, lessons, wards.settings(precision=precision, tokens=40 * LENGTH))
        assert student.dtype == torch.float32
        ends.append(_judged(student, dense, lessons))
    assert ends[0] != ends[1]
    assert 3 * abs(ends[1] - ends[0]) < _judged(*_pair(), lessons) - ends[0]


def test_a_batch_has_to_divide_among_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    class _Two:
        num_processes = 2

        def __init__(self, **options: Any) -> None:
            pass

    monkeypatch.setattr(distil, "Accelerator", _Two)
    student, dense = _pair()
    message = "batch 2 of micro 2 on 2 processes: must be a multiple of their product"
    with pytest.raises(ConfigError, match=message):
        distil.distil(student, dense, wards.lessons(), wards.settings(batch=2, micro=2))


SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from eckart import distil
from tests import test_distil, wards
course, student = test_distil.distributed()
place = torch.distributed.get_rank()
save_file(wards.weights(student), f"{sys.argv[1]}/{place}.safetensors", {"end": str(course.end)})
torch.distributed.destroy_process_group()
"""


def distributed() -> tuple[Course, Any]:
    """Run what the processes share."""
    student, dense = _pair()
    settings = wards.settings(batch=4, tokens=24 * LENGTH, evaluations=2, rate=1e-4)
    return distil.distil(student, dense, wards.lessons(rows=24), settings), student


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "script.py"), str(tmp_path)]  # fmt: skip
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{place}.safetensors") for place in (0, 1))
    assert wards.equal(first, second)
    course, student = distributed()
    alone = wards.weights(student)
    moved = wards.distance(wards.weights(_pair()[0]), alone)
    assert course.gain
    assert math.isfinite(moved)
    assert wards.distance(first, alone) < 0.1 * moved
