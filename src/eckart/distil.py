"""Healing end to end: match the dense model's next-token distribution by gradient descent."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import measure, models
from .checkpoint import Checkpoint
from .divergence import divergence
from .errors import ConfigError
from .healing import Healing
from .lessons import Lessons
from .teacher import Teacher
from .training import adapted, around, precision, trained_names, training

_LOST = 1.5
"""A run whose held-out divergence is this many times what it was at the start has diverged."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the held-out text says after `step` steps: nats per token of divergence from the dense model."""

    step: int
    tokens: int
    held_out: float
    trained: float | None = None


@dataclass(slots=True)
class Course:
    """How a run went.

    Args:
        judged: at the start and after every evaluation.
        best: the step whose state is kept; 0 is the start.
        gain: whether the best is below the start by more than the standard error of the difference; if it
            is not, the start is what is kept.
        ended: why: all steps done, no new best, or diverged.
        seconds: of training, evaluations included.
    """

    judged: list[Judgement] = field(default_factory=list)
    best: int = 0
    gain: bool = False
    ended: str = ""
    seconds: float = 0.0

    @property
    def start(self) -> float:
        """Divergence before."""
        return self.judged[0].held_out

    @property
    def end(self) -> float:
        """Divergence of what is kept."""
        return next(found.held_out for found in self.judged if found.step == self.best)

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.judged[-1].tokens

    @property
    def diverged(self) -> bool:
        """Whether the run was stopped because it got much worse."""
        return self.ended.startswith("diverged")


def _rows(model: Any, window: Tensor) -> Tensor:
    """Return the logits (seq_len - 1, v) after each token of `window` but the last."""
    logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    return logits


@torch.no_grad()
def judge(model: Any, teacher: Teacher, windows: Tensor, healing: Healing) -> Tensor:
    """Return what `healing` minimises, on each of `windows` (k, seq_len): (k,) float64."""
    found = []
    for window in windows:
        with teacher.around():
            logits = _rows(model, window)
        target = teacher.chances(window)
        found.append(divergence(logits, target, window[1:], healing.temperature, healing.text_loss))
    return torch.stack(found).double().cpu()


def teacher_for(dense: Any, healing: Healing, place: torch.device, cache: Path | None = None) -> Teacher:
    """Return what `dense` predicts, as `healing` compares it, computed at `place` (where `dense` goes)."""
    kind = precision(healing, place)
    dense = dense.to(place)
    if kind == torch.bfloat16:
        # Weights that are stored as they are multiplied need not be converted in every step.
        dense = models.cast(copy.deepcopy(dense), kind)
    return Teacher(dense, healing.temperature, healing.largest, cache, around(healing, place), kind)


def distil(
    student: Any,
    teacher_model: Any,
    lessons: Lessons,
    healing: Healing,
    *,
    cache: Path | None = None,
    checkpoint: Checkpoint | None = None,
    watch: measure.Progress | None = None,
) -> Course:
    """Train `student`, in place, to predict what the dense model predicts; end in its best state.

    The best state is that with the least divergence on `lessons.held_out`, the start among them. With
    `checkpoint` an interrupted run goes on where its last evaluation was, to the same result.

    Under torchrun or accelerate launch every process takes its share of each batch.

    Raises:
        ConfigError: the batch does not divide among the processes.
        ModelError: nothing to train.
        StoreError: the checkpoint or the cache cannot be used.
    """
    accelerator = Accelerator(cpu=student.device.type == "cpu")
    if healing.batch % (accelerator.num_processes * healing.micro):
        raise ConfigError(
            f"batch {healing.batch} of micro {healing.micro} on {accelerator.num_processes} processes: must "
            "be a multiple of their product"
        )
    place = accelerator.device
    teacher = teacher_for(teacher_model, healing, place, cache)
    student.to(place)
    adapter = adapted(student, healing) if healing.train == "adapter" else contextlib.nullcontext(student)
    with adapter as model:
        names = (
            [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            if healing.train == "adapter"
            else trained_names(model, healing.train)
        )
        with training(model, names, healing) as parameters:
            run = _Run(accelerator, model, teacher, lessons, healing, parameters, checkpoint, watch)
            return run.go()


def _schedule(warmup: int, total: int) -> Callable[[int], float]:
    """Return the factor of the rate at each step: rising over `warmup` steps, then half a cosine down."""

    def factor(step: int) -> float:
        past = (step - warmup) / max(total - warmup, 1)
        return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * max(0.0, past)))

    return factor


class _Run:
    """One run of gradient descent: what it holds, and what a checkpoint holds of it."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        teacher: Teacher,
        lessons: Lessons,
        healing: Healing,
        parameters: Mapping[str, nn.Parameter],
        checkpoint: Checkpoint | None,
        watch: measure.Progress | None,
    ) -> None:
        self.accelerator, self.teacher, self.healing = accelerator, teacher, healing
        self.parameters, self.checkpoint, self.watch = parameters, checkpoint, watch
        self.total = healing.total_steps()
        self.rows = lessons.rows.to(accelerator.device)
        self.held_out = lessons.held_out.to(accelerator.device)
        self.optimizer = torch.optim.AdamW(
            list(parameters.values()), betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.schedule = _schedule(math.ceil(healing.warmup * self.total), self.total)
        self.bare = model
        self.model = accelerator.prepare(model) if accelerator.num_processes > 1 else model
        self.course = Course()
        self.first: Tensor = torch.empty(0)
        self.found: Tensor = torch.empty(0)
        self.best: dict[str, Tensor] = {}
        self.step = 0

    def go(self) -> Course:
        """Train to the end, or to where the held-out text says."""
        clock = time.perf_counter()
        if not self._resumed():
            self.first = self.found = self._judge()
            self._note(None)
        marks = self._marks()
        lost, since = 0.0, 0
        while self.step < self.total and not self.course.ended:
            lost, since = lost + self._one(), since + 1
            if self.step in marks or not math.isfinite(lost):
                self._evaluate(lost / since)
                lost, since = 0.0, 0
                self.course.seconds += time.perf_counter() - clock
                clock = time.perf_counter()
                self._save()
        self.course.ended = self.course.ended or "all steps done"
        self._restore()
        return self.course

    def _marks(self) -> set[int]:
        count = min(self.healing.evaluations, self.total)
        return {(index + 1) * self.total // count for index in range(count)}

    def _one(self) -> float:
        """Do one step, and return the mean loss of its windows, over all processes."""
        healing, processes = self.healing, self.accelerator.num_processes
        batch = self.rows[self.step * healing.batch : (self.step + 1) * healing.batch]
        own = batch[self.accelerator.process_index :: processes]
        total = 0.0
        for start in range(0, len(own), healing.micro):
            last = start + healing.micro >= len(own)
            held = contextlib.nullcontext() if last or processes == 1 else self.model.no_sync()
            with held:
                loss = self._loss(own[start : start + healing.micro]) * (healing.micro / len(own))
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if processes > 1:  # they must agree on when to stop
            total = float(self.accelerator.reduce(torch.tensor(total, device=self.rows.device), "mean"))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), healing.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = healing.starting_rate(self.course.start) * self.schedule(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.watch:
            self.watch(self.step, self.total)
        return total

    def _loss(self, windows: Tensor) -> Tensor:
        with self.teacher.around():
            logits = self.model(input_ids=windows, use_cache=False).logits[:, :-1]
        how = (self.healing.temperature, self.healing.text_loss)
        losses = [
            divergence(own, self.teacher.chances(window), window[1:], *how)
            for own, window in zip(logits, windows, strict=True)
        ]
        return torch.stack(losses).mean()

    def _judge(self) -> Tensor:
        return judge(self.bare, self.teacher, self.held_out, self.healing)

    def _note(self, trained: float | None) -> None:
        tokens = self.step * self.healing.batch * self.rows.shape[1]
        self.course.judged.append(Judgement(self.step, tokens, float(self.found.mean()), trained))

    def _evaluate(self, trained: float) -> None:
        self.found = self._judge()
        self._note(trained)
        now, course = float(self.found.mean()), self.course
        if not (math.isfinite(now) and math.isfinite(trained)) or now > _LOST * course.start + 1e-3:
            course.ended = (
                f"diverged at step {self.step}: {now:.4g} nats from the dense model, {course.start:.4g} at "
                "the start; lower rate"
            )
        elif now < course.end:
            course.best, course.gain = self.step, measure.lower(self.found, self.first)
            self.best = {name: value.detach().clone() for name, value in self.parameters.items()}
        else:
            # While the rate is high, its noise hides what is gained: only its second half counts.
            late = max(course.best, self.total // 2)
            if len([found for found in course.judged if found.step > late]) >= self.healing.patience:
                course.ended = f"no new best in {self.healing.patience} evaluations"

    @torch.no_grad()
    def _restore(self) -> None:
        """Put the best state into the model; it is the start where the gain is within the noise."""
        if not self.course.gain:
            self.course.best, self.best = 0, self.start
        for name, value in self.best.items():
            self.parameters[name].copy_(value)

    def _resumed(self) -> bool:
        self.start = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.best = copy.copy(self.start)
        found = None if self.checkpoint is None else self.checkpoint.read()
        if found is None:
            return False
        state, tensors = found
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(tensors[f"now.{name}"])
                self.best[name] = tensors[f"best.{name}"].to(value.device)
                self.start[name] = tensors[f"start.{name}"].to(value.device)
        moments = self.optimizer.state_dict()
        moments["state"] = {
            int(index): {key: tensors[f"moment.{index}.{key}"] for key in keys}
            for index, keys in state["moments"].items()
        }
        self.optimizer.load_state_dict(moments)
        self.step = state["step"]
        self.first = tensors["first"]
        course = state["course"]
        self.course = Course(**course | {"judged": [Judgement(**found) for found in course["judged"]]})
        return True

    def _save(self) -> None:
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        moments = self.optimizer.state_dict()["state"]
        tensors = {"first": self.first}
        for name, value in self.parameters.items():
            tensors |= {
                f"now.{name}": value,
                f"best.{name}": self.best[name],
                f"start.{name}": self.start[name],
            }
        for index, values in moments.items():
            tensors |= {f"moment.{index}.{key}": value for key, value in values.items()}
        state = {
            "step": self.step,
            "moments": {index: list(values) for index, values in moments.items()},
            "course": asdict(self.course),
        }
        self.checkpoint.write(state, tensors)
