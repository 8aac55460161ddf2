"""Trainer of transformers with exact held-out loss, checkpoints of what is trained, and a stop at NaN."""

import contextlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError, NotFinite
from . import losses
from .adalora import Allocation
from .batches import Order
from .judge import Judged
from .tuning import Tuning

_TRAINED = "trained.safetensors"
_STATE = "trainer_state.json"
CHOSEN = "eval_chosen"
"""What the best state is chosen by: the held-out loss, infinite before ranks are settled."""


@runtime_checkable
class Part(Protocol):
    """Something beside the weights that a run moves, and that a checkpoint must hold."""

    @property
    def settled(self) -> int:
        """The step from which on states may be chosen."""

    def save(self, folder: Path) -> None:
        """Write its state into the checkpoint `folder`."""

    def load(self, folder: Path) -> None:
        """Take up the state in `folder`, before the weights are."""


class TuneTrainer(Trainer):  # type: ignore[misc]
    """Trains what requires a gradient.

    A checkpoint holds the trained parameters under the model's own names, for every method alike; PEFT's
    files of an AdaLoRA adapter have the shapes of its present ranks and cannot be trained on.
    """

    def __init__(
        self,
        *,
        judged: Callable[[], Judged],
        allocation: Allocation | None,
        order: Order,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        super().__init__(compute_loss_func=self._loss, callbacks=list(callbacks), **options)
        self.judged, self.allocation, self.order = judged, allocation, order
        self.parts = [part for part in callbacks if isinstance(part, Part)]
        self.spent = 0.0

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Do one backward pass; stop at a loss that is no number, before it reaches the weights."""
        began = time.perf_counter()
        places = losses.before(inputs["labels"].to(self.args.device))
        with losses.head_at(self.model, places):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        worst = loss.detach()
        if self.accelerator.num_processes > 1:  # they must stop together
            worst = self.accelerator.reduce(worst, "sum")
        if not bool(torch.isfinite(worst)):
            raise NotFinite(f"the loss is {float(worst)} at step {self.state.global_step + 1}")
        self.spent += time.perf_counter() - began
        return loss

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss per learned token of the whole step, of which this is a part."""
        found = losses.learned_losses(outputs["logits"], labels)
        mean = found.mean() if num_items_in_batch is None else found.sum() / num_items_in_batch
        return mean if self.allocation is None else mean + self.allocation.penalty()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep the seconds of a step beside its loss."""
        if "loss" in logs:
            logs["seconds"], self.spent = self.spent, 0.0
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Judge the model on the held-out examples, by the token."""
        found = self.judged()
        settled = all(self.state.global_step >= part.settled for part in self.parts)
        metrics = {"eval_loss": found.loss, CHOSEN: found.loss if settled else math.inf}
        if found.accuracy is not None:
            metrics["eval_accuracy"] = found.accuracy
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters, and the state of what else moves, into a checkpoint."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: value.detach().contiguous() for name, value in self._parameters().items()}
        save_file(values, folder / _TRAINED)
        for part in self.parts:
            part.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.load(Path(self.state.best_model_checkpoint))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Put the state of the checkpoint `folder` into the model."""
        for part in self.parts:
            part.load(folder)
        values = load_file(folder / _TRAINED)
        for name, parameter in self._parameters().items():
            parameter.copy_(values[name])


class Course(TrainerCallback):  # type: ignore[misc]
    """Evaluates at given steps, stops early, and shows progress.

    Args:
        marks: steps after which the held-out examples are judged and the state is saved.
        patience: evaluations without a new best after which it stops.
        watch: called with (done, total).
    """

    def __init__(self, marks: Sequence[int], patience: int, watch: Callable[[int, int], None]) -> None:
        self.marks, self.patience, self.watch = frozenset(marks), patience, watch
        self.ended = ""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for an evaluation and a checkpoint where they are due."""
        self.watch(state.global_step, state.max_steps)
        control.should_log = True
        if state.global_step in self.marks:
            control.should_evaluate = control.should_save = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *rest: Any, **kwargs: Any
    ) -> None:
        """Stop after `patience` evaluations in a row that are no new best."""
        values = [entry[CHOSEN] for entry in state.log_history if CHOSEN in entry]
        settled = [value for value in values if value < math.inf]
        if settled and len(settled) - 1 - settled.index(min(settled)) >= self.patience:
            self.ended = f"no new best in {self.patience} evaluations"
            control.should_training_stop = True


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a run: how many, how many backward passes each, and where it is judged."""

    steps: int
    passes: int
    marks: tuple[int, ...]


def plan(tuning: Tuning, examples: int, processes: int) -> Plan:
    """Return the steps that `tuning` means for so many rows."""
    steps = tuning.total_steps(examples)
    count = min(tuning.evaluations, steps)
    marks = tuple(sorted({(index + 1) * steps // count for index in range(count)}))
    return Plan(steps, tuning.batch // (tuning.micro * processes), marks)


def arguments(
    tuning: Tuning,
    plan: Plan,
    work: Path,
    device: torch.device,
    precision: torch.dtype,
    inner: Sequence[str] = (),
) -> TrainingArguments:
    """Return Trainer's arguments; `work` is where its checkpoints go, `inner` names what GaLore projects.

    Raises:
        ConfigError: as `check_optimizer`.
    """
    paged = device.type == "cuda" and tuning.method == "qlora" and tuning.paged is not False
    return TrainingArguments(
        output_dir=str(work),
        max_steps=plan.steps,
        per_device_train_batch_size=tuning.micro,
        gradient_accumulation_steps=plan.passes,
        learning_rate=tuning.starting_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(tuning.warmup * plan.steps),
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.clip,
        optim="paged_adamw_32bit" if paged else check_optimizer(tuning.optimizer),
        optim_args=tuning.optimizer_args,
        optim_target_modules=list(inner) if inner else None,
        bf16=precision == torch.bfloat16,
        eval_strategy="steps",
        eval_steps=plan.steps,
        save_strategy="steps",
        save_steps=plan.steps,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=CHOSEN,
        greater_is_better=False,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        logging_nan_inf_filter=False,
        logging_strategy="steps",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=tuning.seed,
        data_seed=tuning.seed,
    )


def check_optimizer(name: str) -> str:
    """Return what Trainer calls the optimizer `name` of a Tuning.

    Raises:
        ConfigError: its package is missing.
    """
    if name == "adamw":
        return "adamw_torch"
    if importlib.util.find_spec("galore_torch") is None:
        raise ConfigError(f"optimizer {name!r} needs GaLore: pip install galore-torch")
    return name


@contextlib.contextmanager
def readable(tuning: Tuning) -> Iterator[None]:
    """Let states of the optimizer be read again: GaLore keeps objects of its own class among them."""
    if tuning.optimizer == "adamw":
        yield
        return
    from galore_torch.galore_projector import GaLoreProjector

    with torch.serialization.safe_globals([GaLoreProjector]):
        yield


def checkpoint(work: Path) -> Path | None:
    """Return the newest whole checkpoint in `work`."""
    found = [(int(path.name.rpartition("-")[2]), path) for path in work.glob("checkpoint-*")]
    for _, path in sorted(found, reverse=True):
        if (path / _TRAINED).is_file() and _readable(path / _STATE):
            return path
    return None


def _readable(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError):
        return False


def curve(history: Sequence[Mapping[str, float]], key: str) -> tuple[tuple[int, float], ...]:
    """Return (step, value) of what Trainer logged as `key`."""
    return tuple((int(entry["step"]), float(entry[key])) for entry in history if key in entry)
