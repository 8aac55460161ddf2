"""Refinements one after another, each judged on held-out text, each kept only if it helps."""

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import blockwise, closed, distil, measure, models, reallocate
from .checkpoint import Checkpoint
from .healing import Healing, Refined, Refinement
from .lessons import Lessons
from .stages import Watch
from .training import is_main, trained_names, training


def heal(
    student: Any,
    dense: Any,
    lessons: Lessons,
    healing: Healing,
    *,
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

        def progress(at: int, total: int, stage: str = f"heal: {step}") -> None:
            watch(stage, at, total)

        if step == "logits":
            made = _logits(student, dense, lessons, healing, running, cache, progress)
        else:
            made = _tried(step, _Case(student, dense, lessons, healing), progress)
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


@dataclass(frozen=True, slots=True)
class _Case:
    """A model to refine, the one that it comes from, and what is known and wanted."""

    student: Any
    dense: Any
    lessons: Lessons
    healing: Healing

    @property
    def fit(self) -> Tensor:
        """The windows to fit to, where the model is."""
        return self.lessons.fit.to(self.student.device)

    @property
    def few(self) -> Tensor:
        """Half of them, for gradients."""
        return self.fit[: max(1, len(self.lessons.fit) // 2)]

    def judged(self) -> Tensor:
        """Return what each held-out window says."""
        place = self.student.device
        teacher = distil.teacher_for(self.dense, self.healing, place)
        return distil.judge(self.student, teacher, self.lessons.held_out.to(place), self.healing)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What came of one: the judgements of what is best, the tokens it took, and how to take it back."""

    after: Tensor
    tokens: int
    detail: str
    undo: Callable[[], None]


def _tried(step: Refinement, case: _Case, progress: measure.Progress) -> Refined:
    """Do one refinement, and take it back unless it is better by more than the standard error."""
    start, before = time.perf_counter(), case.judged()
    attempts = {"ranks": _ranks, "closed": _closed, "block": _block}
    found = attempts[step](case, before, progress)
    gain = measure.lower(found.after, before)
    if not gain:
        found.undo()
    return Refined(
        step=step,
        before=float(before.mean()),
        after=float((found.after if gain else before).mean()),
        gain=gain,
        tokens=found.tokens,
        seconds=time.perf_counter() - start,
        detail=found.detail,
    )


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


def _closed(case: _Case, before: Tensor, progress: measure.Progress) -> _Attempt:
    """Try every mixture from the same start, and leave the best."""
    student, mixtures = case.student, case.healing.mixtures
    names = [name for block in models.block_names(student) for name in closed.linears(student, block)]
    # All at once: what modules share stays shared.
    first = copy.deepcopy({name: student.get_submodule(name) for name in names})
    best, kept, detail = before, first, "no mixture is better than none"
    metrics = closed.Metrics.measured(case.dense, names, case.few)
    for number, mixture in enumerate(mixtures):
        _put(student, copy.deepcopy(first))

        def shown(done: int, blocks: int, number: int = number) -> None:
            progress(number * blocks + done, len(mixtures) * blocks)

        closed.refit(student, case.dense, case.fit, mixture, metrics=metrics, watch=shown)
        found = case.judged()
        if float(found.mean()) < float(best.mean()):
            best, detail = found, f"mixture {mixture:g}"
            kept = {name: student.get_submodule(name) for name in names}
    _put(student, kept)
    return _Attempt(best, case.fit.numel(), detail, lambda: _put(student, first))


def _ranks(case: _Case, before: Tensor, progress: measure.Progress) -> _Attempt:
    """Move rank between matrices."""
    student = case.student
    moved = reallocate.reallocated(student, case.dense, case.few, watch=progress)
    first = {name: student.get_submodule(name) for name in moved}
    _put(student, moved)
    detail = f"{len(moved)} matrices get another rank"
    return _Attempt(
        case.judged() if moved else before, case.few.numel(), detail, lambda: _put(student, first)
    )


def _block(case: _Case, before: Tensor, progress: measure.Progress) -> _Attempt:
    """Match the output of every block."""
    student, healing = case.student, case.healing
    names = trained_names(student, "blocks" if healing.train == "all" else healing.train)
    first = {name: student.get_parameter(name).detach().clone() for name in names}
    with training(student, names, healing):
        better = blockwise.refine(
            student, case.dense, case.fit, case.lessons.held_out, healing,
            metrics=blockwise.costs(case.dense, case.few), trained=names, watch=progress,
        )  # fmt: skip

    @torch.no_grad()
    def undo() -> None:
        for name, value in first.items():
            student.get_parameter(name).copy_(value)

    detail = f"{better} of {len(models.block_names(student))} blocks better"
    return _Attempt(case.judged(), healing.block_epochs * case.fit.numel(), detail, undo)


def _put(student: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        models.replace(student, name, module)


def key_of(*parts: object) -> str:
    """Return one text that says everything in `parts`, for a checkpoint."""
    return json.dumps(parts, default=str, sort_keys=True)
