"""Refinements one after another, each judged on held-out text, each kept only if it helps."""

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import blockwise, closed, distil, measure, models, reallocate
from .checkpoint import Checkpoint
from .healing import Healing, Refined, Refinement
from .lessons import Lessons
from .teacher import Teacher
from .training import around, is_main, trained_names, training

Watch = Callable[[str, int, int], None]


def heal(
    student: Any,
    dense: Any,
    lessons: Lessons,
    healing: Healing,
    *,
    metrics: closed.Metrics | None = None,
    work: Path | None = None,
    key: str = "",
    cache: Path | None = None,
    watch: Watch,
) -> list[Refined]:
    """Bring `student`, in place, closer to `dense` by the refinements that `healing` names, in order.

    Args:
        student: the compressed model, in the dtype to train in.
        dense: the model that it comes from, in the same dtype; it is not changed.
        lessons: windows to learn from, and to judge by.
        healing: the settings.
        metrics: of the outputs of the dense matrices for `closed`; default: measured.
        work: a folder to keep the state in, so that an interrupted run goes on to the same result.
        key: what the run was started with; a state with another key is refused.
        cache: a folder for the dense model's distributions.
        watch: called with (stage, done, total).

    Raises:
        ModelError: a refinement cannot be applied to this model.
        StoreError: the state or the cache cannot be used.
    """
    done: list[Refined] = []
    for place, step in enumerate(healing.steps):
        kept = None if work is None else Checkpoint(work / f"{place}-{step}.done.safetensors", key)
        found = None if kept is None else kept.read()
        if found is not None:
            state, tensors = found
            _load(student, tensors)
            done.append(_refined(state["refined"]))
            continue
        running = None if work is None else Checkpoint(work / f"{place}-{step}.safetensors", key)
        start = time.perf_counter()

        def progress(at: int, total: int, stage: str = f"heal: {step}") -> None:
            watch(stage, at, total)

        if step == "logits":
            made = _logits(student, dense, lessons, healing, running, cache, progress)
        elif step == "ranks":
            made = _ranks(student, dense, lessons, healing, start, progress)
        elif step == "closed":
            made = _closed(student, dense, lessons, healing, metrics, start, progress)
        else:
            made = _block(student, dense, lessons, healing, start, progress)
        done.append(made)
        if kept is not None and running is not None and is_main():
            kept.write({"refined": asdict(made)}, models.state_tensors(student))
            running.delete()
    return done


def _refined(values: Mapping[str, Any]) -> Refined:
    curve = tuple((int(step), float(value)) for step, value in values["curve"])
    return Refined(**{**values, "curve": curve})


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    reallocate.resize(model, tensors)
    with torch.no_grad():
        for name, tensor in models.state_tensors(model).items():
            tensor.copy_(tensors[name])


def _judged(student: Any, dense: Any, lessons: Lessons, healing: Healing) -> Tensor:
    place = student.device
    teacher = Teacher(dense, healing.temperature, around=around(healing, place))
    return distil.judge(student, teacher, lessons.held_out.to(place), healing)


def _logits(
    student: Any,
    dense: Any,
    lessons: Lessons,
    healing: Healing,
    checkpoint: Checkpoint | None,
    cache: Path | None,
    progress: measure.Progress,
) -> Refined:
    course = distil.distil(
        student, dense, lessons, healing, cache=cache, checkpoint=checkpoint, watch=progress
    )
    return Refined(
        step="logits",
        before=course.start,
        after=course.end,
        gain=course.gain,
        tokens=course.tokens,
        seconds=course.seconds,
        detail=f"best after {course.best} steps; {course.ended}",
        curve=tuple((found.tokens, found.held_out) for found in course.judged),
    )


def _closed(
    student: Any,
    dense: Any,
    lessons: Lessons,
    healing: Healing,
    metrics: closed.Metrics | None,
    start: float,
    progress: measure.Progress,
) -> Refined:
    """Try every mixture from the same start, and keep the best if it is better than the start."""
    names = [name for block in models.block_names(student) for name in closed.linears(student, block)]
    before = best = _judged(student, dense, lessons, healing)
    # All at once: what modules share stays shared.
    first = copy.deepcopy({name: student.get_submodule(name) for name in names})
    kept, share = first, None
    fit = lessons.fit.to(student.device)
    total = len(healing.mixtures) * len(models.block_names(student))
    if metrics is None:
        metrics = closed.Metrics.measured(dense, names, fit[: max(1, len(fit) // 2)])
    for number, mixture in enumerate(healing.mixtures):
        _put(student, copy.deepcopy(first))

        def shown(done: int, blocks: int, number: int = number) -> None:
            progress(number * blocks + done, total)

        closed.refit(
            student, dense, fit, mixture, metrics=metrics,
            watch=shown,
        )  # fmt: skip
        found = _judged(student, dense, lessons, healing)
        if float(found.mean()) < float(best.mean()):
            best, share = found, mixture
            kept = {name: student.get_submodule(name) for name in names}
    gain = measure.lower(best, before)
    _put(student, kept if gain else first)
    detail = f"mixture {share:g}" if gain and share is not None else "no mixture is better than none"
    return _outcome("closed", before, best, gain, lessons.fit.numel(), start, detail)


def _ranks(
    student: Any,
    dense: Any,
    lessons: Lessons,
    healing: Healing,
    start: float,
    progress: measure.Progress,
) -> Refined:
    """Move rank between matrices, and keep that if it is better."""
    before = _judged(student, dense, lessons, healing)
    fit = lessons.fit[: max(1, len(lessons.fit) // 2)]
    moved = reallocate.reallocated(student, dense, fit, watch=progress)
    kept = {name: student.get_submodule(name) for name in moved}
    _put(student, moved)
    after = _judged(student, dense, lessons, healing)
    gain = bool(moved) and measure.lower(after, before)
    if not gain:
        _put(student, kept)
    detail = f"{len(moved)} matrices get another rank"
    return _outcome("ranks", before, after, gain, fit.numel(), start, detail)


def _outcome(
    step: Refinement, before: Tensor, after: Tensor, gain: bool, tokens: int, start: float, detail: str
) -> Refined:
    """Return what a refinement did, from what each held-out window said; without a gain it was taken back."""
    return Refined(
        step=step,
        before=float(before.mean()),
        after=float((after if gain else before).mean()),
        gain=gain,
        tokens=tokens,
        seconds=time.perf_counter() - start,
        detail=detail,
    )


def _put(student: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        models.replace(student, name, module)


def _block(
    student: Any,
    dense: Any,
    lessons: Lessons,
    healing: Healing,
    start: float,
    progress: measure.Progress,
) -> Refined:
    before = _judged(student, dense, lessons, healing)
    fit = lessons.fit.to(student.device)
    names = trained_names(student, "blocks" if healing.train == "all" else healing.train)
    first = {name: student.get_parameter(name).detach().clone() for name in names}
    with training(student, names, healing):
        better = blockwise.refine(
            student, dense, fit, lessons.held_out, healing,
            metrics=blockwise.costs(dense, fit[: max(1, len(fit) // 2)]), trained=names, watch=progress,
        )  # fmt: skip
    after = _judged(student, dense, lessons, healing)
    gain = measure.lower(after, before)
    if not gain:
        with torch.no_grad():
            for name, value in first.items():
                student.get_parameter(name).copy_(value)
    detail = f"{better} of {len(models.block_names(student))} blocks better"
    return _outcome("block", before, after, gain, healing.block_epochs * lessons.fit.numel(), start, detail)


def key_of(*parts: object) -> str:
    """Return one text that says everything in `parts`, for a checkpoint."""
    return json.dumps(parts, default=str, sort_keys=True)


def tokens_learned(steps: Sequence[Refined]) -> int:
    """Return how many tokens were learned from in all, repeats counted."""
    return sum(step.tokens for step in steps)
