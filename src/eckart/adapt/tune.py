"""From settings to a tuned model or an adapter: everything that `eckart tune` does, in order."""

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from .. import hub, measure, memory, models, refine, teacher
from ..errors import ConfigError, ModelError, NotFinite, StoreError
from ..factors import LowRank
from ..scratch.persuade import Persuade
from ..stages import Watch, silent
from ..training import around, is_main, precision, processes, recomputed
from . import allocation, attach, batches, examples, footprint, store, targets, trainer
from .adalora import Allocation
from .attach import Attached
from .examples import Examples
from .judge import Judged, judge
from .tuned import Prospect, Tuned
from .tuning import Tuning

_KEY = "key.json"


def tune(
    loaded: hub.Loaded,
    tuning: Tuning,
    *,
    work: Path,
    callbacks: Sequence[TrainerCallback] = (),
    before: Callable[[Prospect], None] = lambda prospect: None,
    watch: Watch = silent,
) -> tuple[Attached, Tuned]:
    """Tune a model, in place; end in the best state on held-out data.

    A run that was interrupted goes on from its last evaluation, to the same result. Under torchrun or
    accelerate launch every process takes its share of each batch.

    Args:
        loaded: the base with its tokenizer, compressed or not.
        tuning: the settings.
        work: a folder for the state of the run; the caller deletes it.
        callbacks: for Trainer; what is an eckart.adapt.trainer.Part is saved with every checkpoint.
        before: called once, before the first step, with what is known then.
        watch: called with (stage, done, total).

    Raises:
        ConfigError: data, settings or packages do not fit.
        ModelError: nothing to adapt.
        RankError: a rank that the initialisation cannot have.
        NotFinite: the loss is NaN or infinite before any state was judged.
        StoreError: `work` holds the state of another run.
    """
    run = _Run(loaded, tuning, work, callbacks, watch)
    prospect = run.prospect()
    before(prospect)
    return run.attached, run.go(prospect)


class _Run:
    """What one run holds between its stages."""

    def __init__(
        self,
        loaded: hub.Loaded,
        tuning: Tuning,
        work: Path,
        callbacks: Sequence[TrainerCallback],
        watch: Watch,
    ) -> None:
        self.persuade = None if tuning.penalty is None else Persuade(tuning.penalty)
        self.callbacks = [*callbacks, *([self.persuade] if self.persuade else [])]
        model, self.tokenizer = loaded.model, loaded.tokenizer
        if self.tokenizer is None:
            raise ModelError("data needs a tokenizer: pass tokenizer=")
        trainer.check_optimizer(tuning.optimizer)  # now, not after the base was judged
        self.loaded, self.tuning, self.work, self.watch = loaded, tuning, work, watch
        self.place = model.device
        if tuning.tight and self.place.type == "cpu":
            memory.map_large_blocks()
        measure.check_length(model, tuning.seq_len)
        self.around = around(tuning, self.place)
        self.pad = batches.pad_token(self.tokenizer)
        self.data = examples.read(tuning, self.tokenizer)
        self.rows = self._rows(model, self.data)
        self.processes = processes()
        if tuning.batch % (tuning.micro * self.processes):
            raise ConfigError(
                f"batch {tuning.batch} of micro {tuning.micro} on {self.processes} processes: must be a "
                "multiple of their product"
            )
        self.plan = trainer.plan(tuning, len(self.rows), self.processes)
        self.key = self._key(model)
        self.base_parameters = models.parameter_count(model)
        self.start = self._judged(model, "judge base")
        self.memory: Mapping[str, Mapping[str, int]] = {}
        self.notes: list[str] = []
        self.attached = self._attach(model)

    def _rows(self, model: Any, data: Examples) -> list[dict[str, list[int]]]:
        if not self.tuning.packing:
            return batches.rows(data.train)
        batches.check_packing(model)
        return batches.packed(data.train, self.tuning.seq_len)

    def _key(self, model: Any) -> str:
        rows = teacher.digest_bytes(repr(self.rows).encode())
        return refine.key_of(str(self.tuning), teacher.digest(model), rows, self.plan.steps, self.processes)

    def _judged(self, model: Any, stage: str) -> Judged:
        return judge(
            model, self.data.held_out, self.pad,
            batch=self.tuning.micro, word_ids=self.data.word_ids, around=self.around,
            watch=lambda done, total: self.watch(stage, done, total),
        )  # fmt: skip

    def _attach(self, model: Any) -> Attached:
        tuning = self.tuning
        chosen = [] if tuning.method == "full" else targets.names(model, tuning.targets, tuning.exclude)
        seen = self._first()
        ranks = allocation.ranks(model, chosen, tuning, seen, self.around, self.watch)
        self._estimate(model, ranks)
        return attach.attach(
            model, tuning, ranks, seen,
            steps=self.plan.steps, passes=self.plan.passes * self.processes,
            compute=precision(tuning, self.place), around=self.around, watch=self.watch,
        )  # fmt: skip

    def _estimate(self, model: Any, ranks: Mapping[str, int]) -> None:
        """Estimate the memory of a step on the longest rows, as they may come together."""
        longest = sorted(self.rows, key=lambda row: -len(row["input_ids"]))[: self.tuning.micro]
        learned = sum(label != examples.IGNORED for row in longest for label in row["labels"])
        self.watch("estimate memory", 0, 1)
        try:
            self.memory = footprint.estimate(
                model, self.tuning, ranks, len(longest), len(longest[0]["input_ids"]),
                learned=learned, passes=self.plan.passes,
            )  # fmt: skip
        except ModelError as error:
            self.notes.append(str(error))
        self.watch("estimate memory", 1, 1)

    def _first(self) -> list[batches.Batch]:
        """Return the examples that initialisations look at, one a batch, so that none is padded."""
        count = min(len(self.data.train), self.tuning.first_batches * self.tuning.micro)
        picks = torch.randperm(
            len(self.data.train), generator=torch.Generator().manual_seed(self.tuning.seed)
        )
        chosen = [self.data.train[index] for index in picks[:count].tolist()]
        made = [batches.Collator(self.pad)(batches.rows([one])) for one in chosen]
        return [{key: value.to(self.place) for key, value in batch.items()} for batch in made]

    def prospect(self) -> Prospect:
        """Return what is known before the first step."""
        model = self.attached.model
        trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
        added = 0 if self.tuning.method == "full" else _added(model)
        return Prospect(
            source=self.loaded.source,
            tuning=self.tuning,
            trainable=trainable,
            total=self.base_parameters + added,
            base=self.base_parameters,
            steps=self.plan.steps,
            examples=len(self.data.train),
            rows=len(self.rows),
            held_out=len(self.data.held_out),
            cut=self.data.cut,
            dropped=self.data.dropped,
            start=self.start,
            memory=self.memory,
            notes=(*self.attached.notes, *self.notes),
        )

    def go(self, prospect: Prospect) -> Tuned:
        """Train to the end, or to where the held-out examples say."""
        model, tuning = self.attached.model, self.tuning
        moving = Allocation(model) if tuning.method == "adalora" else None
        course = trainer.Course(
            self.plan.marks, tuning.patience, lambda done, total: self.watch("train", done, total)
        )
        made = trainer.TuneTrainer(
            judged=lambda: self._judged(model, "judge"),
            allocation=moving,
            order=batches.Order(
                [len(row["input_ids"]) for row in self.rows], tuning.batch, tuning.seed, not tuning.packing
            ),
            model=model,
            args=trainer.arguments(
                tuning, self.plan, self.work, self.place, precision(tuning, self.place), self._inner()
            ),
            train_dataset=self.rows,
            eval_dataset=batches.rows(self.data.held_out),
            data_collator=batches.Collator(self.pad),
            callbacks=[course, *([moving] if moving else []), *self.callbacks],
        )
        made.remove_callback(PrinterCallback)
        again = recomputed(model) if tuning.checkpointing else contextlib.nullcontext()
        mark = memory.Watermark(self.place)
        with _without_cache(model), again:
            ended = self._train(made) or course.ended or "all steps done"
        peak = mark.peak()
        made.accelerator.unwrap_model(made.model_wrapped, keep_fp32_wrapper=False)
        end = self._judged(model, "judge end")
        history = made.state.log_history
        seconds = [value for _, value in trainer.curve(history, "seconds")]
        return Tuned(
            prospect=prospect,
            end=end,
            best=made.state.best_global_step or 0,
            done=made.state.global_step,
            ended=ended,
            curve=((0, self.start.loss), *trainer.curve(history, "eval_loss")),
            accuracy=trainer.curve(history, "eval_accuracy"),
            learned=trainer.curve(history, "loss"),
            ranks=moving.ranks() if moving else dict(self.attached.ranks),
            trajectory=tuple(moving.trajectory) if moving else (),
            error=self.attached.error,
            seconds=sum(seconds),
            per_step=statistics.median(seconds) if seconds else 0.0,
            peak=peak,
            resting=mark.resting,
            decline=self.persuade.decline.to_dict() if self.persuade else None,
        )

    def _inner(self) -> list[str]:
        """Return the linear maps in the blocks, factors too, where the optimizer projects gradients."""
        if self.tuning.optimizer == "adamw":
            return []
        model = self.attached.model
        blocks = models.block_names(model)
        return [name for name in models.linear_names(model) if models.owner(name, blocks)]

    def _train(self, made: trainer.TuneTrainer) -> str:
        """Train; return why it was stopped, if a loss was no number."""
        resumed = self._resumed()
        try:
            with trainer.readable(self.tuning):
                made.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except NotFinite as error:
            last = made.state.best_global_step
            kept = self.work / f"checkpoint-{last}"
            if not last or not kept.is_dir():
                raise NotFinite(
                    f"{error}, and no state was judged before: lower --rate, or train in float32"
                ) from error
            made.load(kept)
            return f"stopped: {error}; the best state before it is kept; lower --rate"
        return ""

    def _resumed(self) -> Path | None:
        """Return the checkpoint to go on from; a folder of another run is refused."""
        marker = self.work / _KEY
        found = trainer.checkpoint(self.work) if self.work.is_dir() else None
        if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != self.key:
            raise StoreError(
                f"{self.work} holds the state of a run with other settings, data or model: delete it to "
                "begin anew, or choose another --out"
            )
        if is_main():
            self.work.mkdir(parents=True, exist_ok=True)
            marker.write_text(json.dumps(self.key), encoding="utf-8")
        return found


def _added(model: Any) -> int:
    """Return the parameters of the adapter, trained or not."""
    return sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)


@contextlib.contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Turn the cache off, which training has no use for."""
    wanted, model.config.use_cache = model.config.use_cache, False
    try:
        yield
    finally:
        model.config.use_cache = wanted


def factors(attached: Attached) -> dict[str, LowRank]:
    """Return the updates of an adapter to the base as it was given, the scale in the left factor.

    Where the initialisation took something out of the base, that is taken out of the update: twice the
    rank, the same function.
    """
    now = attach.updates(attached.model, list(attached.ranks))
    if not attached.start:
        return now
    return {
        name: LowRank(
            torch.cat([own.left, -attached.start[name].left], 1),
            torch.cat([own.right, attached.start[name].right]),
        )
        for name, own in now.items()
    }


def write_adapter(folder: Path, attached: Attached, source: str, tuning: Tuning) -> None:
    """Write a PEFT adapter that loads on the base as it was given, without eckart."""
    model = attached.model
    config = model.peft_config[attach.ADAPTER]
    config.base_model_name_or_path = source
    if tuning.method != "adalora" and not attached.start:
        # Whoever loads it must not initialise it from data again.
        config.init_lora_weights, config.eva_config, config.corda_config = True, None, None
        with attach.known_warnings():
            model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        return
    found = {
        name: store.Factors(value.left.contiguous(), value.right.contiguous())
        for name, value in factors(attached).items()
    }
    kept: Mapping[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "lora_dropout": tuning.dropout,
    }
    store.write(folder, store.Adapter(found, config=kept))
