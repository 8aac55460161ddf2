"""From settings and text to a healed model: what compress and heal have in common."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import hub, kinds, lessons, measure, memory, models, refine, splitting, stores, teacher, text
from .errors import ConfigError, ModelError
from .healing import Healing, Refined
from .lessons import SELF, Lessons
from .quant import straight
from .result import Healed, Quality
from .stages import Watch, silent


@dataclass(frozen=True, slots=True)
class Ward:
    """Where a run keeps what it must not lose.

    Args:
        work: a folder for its state, to go on after an interruption; None keeps nothing.
        cache: a folder for the dense model's distributions; None computes them every time.
    """

    work: Path | None = None
    cache: Path | None = None


def run(
    student: Any,
    dense: Any,
    tokenizer: Any,
    healing: Healing,
    *,
    bos: bool = False,
    spare: float = 0.0,
    started: Sequence[object] = (),
    ward: Ward | None = None,
    watch: Watch,
) -> list[Refined]:
    """Heal `student`, in place, towards `dense` on the text of `healing`; return what each refinement did.

    What is stored in few bits is trained through its quantiser (eckart.quant.straight).

    Args:
        student: the compressed model, in the dtype to train in.
        dense: the model that it comes from, in the same dtype.
        tokenizer: of both.
        healing: the settings, with `text`.
        bos: begin windows with the begin-of-text token.
        spare: the share at the end of each source that is not looked at at all.
        started: what else decides the result, for the key of the state.
        ward: where state and cache are kept.
        watch: called with (stage, done, total).

    Raises:
        ModelError: the models do not have the same vocabulary, or there is no tokenizer.
        ConfigError: there is not enough text, windows are longer than the model takes, or a refinement
            cannot be applied to a model that is stored in few bits.
        StoreError: the state or the cache cannot be used.
    """
    _check(student, dense, tokenizer, healing)
    ward = ward or Ward()
    found = read(dense, tokenizer, healing, bos=bos, spare=spare, watch=watch)
    key = ""
    if ward.work is not None:
        rows = [tensor.tolist() for tensor in (found.rows, found.held_out)]
        key = refine.key_of(asdict(healing), teacher.digest(dense), hash_of(rows), *started)
    kinds.unfold(student)
    splitting.alike(dense, student)
    try:
        with straight.through(student, healing.seed):
            return refine.heal(
                student, dense, found, healing, work=ward.work, key=key, cache=ward.cache, watch=watch
            )
    finally:
        kinds.fold(student)
        kinds.fold(dense)


def _check(student: Any, dense: Any, tokenizer: Any, healing: Healing) -> None:
    if tokenizer is None:
        raise ModelError("text needs a tokenizer: pass tokenizer=")
    own, other = models.vocabulary(student), models.vocabulary(dense)
    if own != other:
        raise ModelError(
            f"the model has a vocabulary of {own} and the teacher of {other}: the teacher must be the dense "
            "model that the compressed one was made of"
        )
    measure.check_length(student, healing.seq_len)
    if stores.stored(student):
        _check_stored(healing)


def _check_stored(healing: Healing) -> None:
    """Refuse what solves for weights that are not on a grid."""
    solving = [step for step in healing.steps if step in ("ranks", "closed")]
    if solving:
        raise ConfigError(
            f"refinement {solving[0]} solves for float weights, and the model is stored in few bits: heal "
            "before storing, or use logits or block"
        )
    if "logits" in healing.steps and healing.train == "adapter":
        raise ConfigError(
            "train adapter: merged into weights of few bits, an adapter would be rounded away; use factors, "
            "blocks or all"
        )


def hash_of(values: object) -> str:
    """Return a digest of plain values."""
    return teacher.digest_bytes(repr(values).encode())


def read(dense: Any, tokenizer: Any, healing: Healing, *, bos: bool, spare: float, watch: Watch) -> Lessons:
    """Return the lessons; what the source `self` stands for is written by the dense model now."""
    shares = [lessons.parse(source) for source in healing.text]
    mine = sum(source.weight for source in shares if source.name == SELF)
    written: Tensor | None = None
    if mine:
        share = mine / sum(source.weight for source in shares)
        count = max(2, round(share * healing.total_steps() * healing.batch / (1 - lessons.HELD_OUT)))
        generator = torch.Generator().manual_seed(healing.seed)
        written = lessons.write(
            dense, count, healing.seq_len, generator, lambda done, total: watch("write text", done, total)
        )
    return lessons.read(healing.text, healing, tokenizer, written=written, bos=bos, spare=spare)


def healed(
    own: hub.Loaded,
    dense: hub.Loaded,
    healing: Healing,
    *,
    texts: tuple[Sequence[str], Sequence[str]],
    tokens: int,
    bos: bool,
    ward: Ward,
    dtype: torch.dtype,
    watch: Watch | None,
) -> tuple[Any, Healed]:
    """Heal a model that was loaded, and measure it before and after; it ends in `dtype`.

    Args:
        own: the compressed model, in float32.
        dense: the teacher, in the dtype that it computes in.
        healing: the settings, with `text`.
        texts: sources to measure on, of the same kind and of another.
        tokens: of each of the two.
        bos: begin windows with the begin-of-text token.
        ward: where state and cache are kept.
        dtype: of the output.
        watch: called with (stage, done, total).
    """
    show: Watch = watch or silent
    clock, model = time.perf_counter(), own.model
    tokenizer = own.tokenizer or dense.tokenizer
    _check(model, dense.model, tokenizer, healing)
    rows = [
        text.shares(sources, tokenizer, tokens, healing.seq_len, bos, "the text to measure on")
        for sources in texts
    ]

    def measured(stage: str, which: Any) -> list[measure.Perplexity | None]:
        return [
            None if part is None else measure.perplexity(which, part, lambda at, of: show(stage, at, of))
            for part in rows
        ]

    start = teacher.digest(model) if ward.work is not None else ""
    large, before = measured("measure dense", dense.model), measured("measure before", model)
    steps = run(model, dense.model, tokenizer, healing, bos=bos, started=(start,), ward=ward, watch=show)
    models.cast(models.cast(model, dtype), torch.float32)
    after = measured("measure healed", model)
    models.cast(model, dtype)
    found = [Quality.of(base, old, new) for base, old, new in zip(large, before, after, strict=True)]
    seconds = {f"heal: {step.step}": step.seconds for step in steps}
    return model, Healed(
        source=own.source,
        teacher=dense.source,
        settings=healing,
        steps=tuple(steps),
        quality=found[0],
        foreign=found[1],
        dtype=str(dtype).removeprefix("torch."),
        seconds=seconds | {"all": time.perf_counter() - clock},
        peak_memory=memory.peak_bytes(model.device),
    )
