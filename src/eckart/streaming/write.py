"""From choices to weight files, block by block, and through the blocks once more to measure what came out."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from .. import assemble, dimensions, kinds, models, running, selection, skeleton, storing
from ..calibrate import Calibrated
from ..choices import Choice
from ..declaration import EckartConfig, declare
from ..factorize import Decomposed
from ..quant.stored import StoredEmbedding
from ..recipe import FLOAT
from ..stats import Stats
from . import decompose
from .job import Job
from .passes import Track, Watch, losses

ENTRANCE, EXIT = "entrance", "exit"
SHARDS, DECLARED = "shards", "declared"


def trial_losses(
    job: Job, found: Decomposed, candidates: Sequence[Sequence[Choice]], watch: Watch
) -> list[Tensor]:
    """Return the losses of the windows to try on that each of `candidates` leads to, all in one pass."""
    stream = job.stream
    tracks = [job.track(f"trial{number}", job.texts.trial) for number in range(len(candidates))]
    with stream.entrance():
        for track in tracks:
            track.enter(stream)
    for index in range(job.count):
        with stream.block(index):
            for track, choices in zip(tracks, candidates, strict=True):
                own = of_step(job, selection.cheapened(choices), index)
                made = assemble.build_modules(stream.model, own, found, stream.dtype, _silent)
                with dimensions.swapped(stream.model, made):
                    track.advance(index, stream)
        watch(index + 1, job.count)
    with stream.exit():
        everywhere = job.team.gathered([losses(stream, track) for track in tracks])
    for track in tracks:
        track.delete(job.count)
    return [
        torch.tensor(decompose.in_order([own[number] for own in everywhere]), dtype=torch.float64)
        for number in range(len(candidates))
    ]


def _silent(done: int, total: int) -> None:
    """Watch nothing."""


def of_step(job: Job, choices: Iterable[Choice], index: int | None) -> list[Choice]:
    """Return those of `choices` that are of block number `index`, or of what lies outside."""
    names = {target.name for target in job.targets(index)}
    return [choice for choice in choices if choice.target.name in names]


def write(
    job: Job,
    found: Decomposed,
    choices: Sequence[Choice],
    dtype: torch.dtype,
    tracks: Sequence[Track],
    watch: Watch,
) -> dict[str, list[float]]:
    """Put the modules of `choices` into the model, write all of it, and return the losses of `tracks`.

    What is finished is skipped. The model ends with every module in place, on the meta device.

    Raises:
        NotFinite: a weight does not fit `dtype`.
        StoreError: a file cannot be written.
    """
    stream, count = job.stream, job.count
    finished = _finished(job, tracks)
    _write_entrance(job, found, choices, dtype, tracks, ENTRANCE in finished)
    for index in range(count):
        if str(index) in finished:
            _restore(job, str(index))
        else:
            with stream.block(index) as block:
                own = of_step(job, choices, index)
                _put(job, found, own, dtype, lambda index=index: decompose.in_block(job, index)[0])  # type: ignore[misc]
                kinds.fold(block)
                _store(job, str(index), stream.inside(index), dtype)
                models.cast(block, stream.dtype)
                for track in tracks:
                    if track.place(count) == index:
                        track.advance(index, stream)
        watch(index + 1, count)
    return _write_exit(job, found, choices, dtype, tracks)


def _finished(job: Job, tracks: Sequence[Track]) -> set[str]:
    """Return the steps that every process has behind it."""
    passed = min((track.place(job.count) for track in tracks), default=job.count)
    steps = {ENTRANCE: 0, **{str(index): index + 1 for index in range(job.count)}}
    own = {step for step, place in steps.items() if _written(job, step) and place <= passed}
    return set.intersection(*job.team.gathered(own))


def _written(job: Job, step: str) -> bool:
    return job.work.has(f"{DECLARED}/{step}.json")


def _in(name: str, prefix: str) -> bool:
    return name.startswith(f"{prefix}.")


def _outside(job: Job, tail: bool) -> list[str]:
    """Return the tensors outside of the blocks: those of an output head of its own, or all others."""
    stream = job.stream
    head = stream.head
    names = [n for n in stream.model.state_dict() if not any(_in(n, prefix) for prefix in stream.names)]
    return [name for name in names if (head is not None and _in(name, head)) == tail]


def _write_entrance(
    job: Job,
    found: Decomposed,
    choices: Sequence[Choice],
    dtype: torch.dtype,
    tracks: Sequence[Track],
    finished: bool,
) -> None:
    if finished:
        _restore(job, ENTRANCE)
        return
    stream = job.stream
    with stream.entrance():
        own = [c for c in of_step(job, choices, None) if c.target.name != stream.head]
        _put(job, found, own, dtype, lambda: decompose.at_ends(job))
        _store(job, ENTRANCE, _outside(job, tail=False), dtype)
        models.cast(stream.model, stream.dtype)
        for track in tracks:
            if track.place(job.count) == -1:
                track.enter(stream)


def _write_exit(
    job: Job, found: Decomposed, choices: Sequence[Choice], dtype: torch.dtype, tracks: Sequence[Track]
) -> dict[str, list[float]]:
    stream, head = job.stream, job.stream.head
    with stream.exit():
        _reload(job, ENTRANCE)
        own = [c for c in of_step(job, choices, None) if c.target.name == head]
        _put(job, found, own, dtype, lambda: decompose.at_ends(job))
        _store(job, EXIT, _outside(job, tail=True), dtype)
        models.cast(stream.model, stream.dtype)
        mine = {track.name: losses(stream, track) for track in tracks}
    everywhere = job.team.gathered(mine)
    return {name: decompose.in_order([own[name] for own in everywhere]) for name in mine}


def _put(
    job: Job,
    found: Decomposed,
    own: Sequence[Choice],
    dtype: torch.dtype,
    statistics: Callable[[], Calibrated],
) -> None:
    """Put the modules of the choices `own` into the model, rounded to few bits where that was chosen."""
    model = job.stream.model
    stored = [choice for choice in own if choice.storage != FLOAT]
    # They are those of the dense model, so they are gathered before anything is replaced.
    calibrated = statistics() if stored and job.recipe.statistics() else Calibrated(Stats(), 0, 0)
    made = assemble.build_modules(model, own, found, dtype, _silent)
    assemble.put(model, made)
    if stored:
        kept = [(choice, choice.target.name) for choice in own]
        storing.store(job.recipe, model, kept, found, calibrated, None, _silent)


def _store(job: Job, step: str, names: Sequence[str], dtype: torch.dtype) -> None:
    """Write the tensors `names` of the model, in `dtype`, and what is to be declared of them."""
    model = job.stream.model
    wanted = set(names)
    inside = {name: tensor for name, tensor in models.state_tensors(model).items() if name in wanted}
    for tensor in inside.values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    running.check_fits(inside, dtype)
    if job.team.rank == 0:
        # Some architectures are stored under other names than they have in memory.
        written = revert_weight_conversion(model, inside)
        if written:
            job.work.write_tensors(f"{SHARDS}/{step}", written, {"format": "pt"})
        owners = {name.rpartition(".")[0] for name in wanted}
        said = declare(model)
        job.work.write_json(
            f"{DECLARED}/{step}",
            {
                "modules": {n: spec for n, spec in said.modules.items() if _holds(n, owners)},
                "storage": {n: spec for n, spec in said.storage.items() if _holds(n, owners)},
                "unfolded": {n: spec for n, spec in said.unfolded.items() if _holds(n, owners)},
            },
        )


def _holds(name: str, owners: set[str]) -> bool:
    return name in owners or any(owner.startswith(f"{name}.") for owner in owners)


def _restore(job: Job, step: str) -> None:
    """Put the modules of a finished step into the model, on the meta device."""
    said = job.work.read_json(f"{DECLARED}/{step}")
    skeleton.build_skeleton(job.stream.model, EckartConfig(**said))


def _reload(job: Job, step: str) -> None:
    """Read what was written of a step back into its modules, in the dtype to compute in."""
    file = f"{SHARDS}/{step}"
    if job.work.has(f"{file}.safetensors"):
        tensors, _ = job.work.read_tensors(file)
        job.stream.shards.put(job.stream.model, tensors)
        job.stream.settle()
        for module in job.stream.model.modules():
            if isinstance(module, StoredEmbedding):
                module.rows_in(job.stream.dtype)
