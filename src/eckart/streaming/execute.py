"""The whole of a streamed compression: checks, passes, choices, files, result."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import (
    assemble,
    dimensions,
    hub,
    kinds,
    measure,
    memory,
    mend,
    models,
    planning,
    plugin,
    report,
    selection,
    windows,
)
from ..accounting import sizes, written_bytes
from ..choices import Choice
from ..construct import parse_size
from ..errors import ConfigError, ModelError
from ..factorize import Decomposed, shortages
from ..measure import Perplexity
from ..recipe import Recipe
from ..result import Quality, Result
from ..stages import Run, Watch, silent
from . import need, parts, publish, write
from .decompose import decompose, measured
from .job import Job, Texts, verified
from .passes import Track
from .shards import Shards, local, total_bytes
from .stream import Stream, skeleton
from .team import Team
from .work import Work

_PROBE = 16
"""Tokens to see how the blocks are called, where there is no text."""


def check(recipe: Recipe) -> None:
    """Raise ConfigError where `recipe` asks for what needs the whole model at once."""
    method = recipe.resolved_method()
    unfit = {
        "heal": recipe.heal is not None,
        "stock": recipe.stock,
        "depth": recipe.depth,
        "share_inputs": recipe.share_inputs,
        "correction": recipe.correction is not None,
        f"split {recipe.split!r}": recipe.split != "none",
        "form 'shared'": method.form == "shared",
        "max_ppl_increase": recipe.max_ppl_increase is not None,
        "form 'width'": method.form == "width",
        f"method {recipe.method!r}": method.target == "anchored",
    }
    if recipe.timed and (recipe.times is None or not Path(recipe.times).exists()):
        raise ConfigError(
            "a plan in time within memory needs its table of times in a file, so that an interrupted run "
            f"goes on to the same plan, and there is none at {recipe.times}: give times, and make the file "
            "by the same command with --dry-run, without memory"
        )
    found = [name for name, asked in unfit.items() if asked]
    if found:
        raise ConfigError(
            f"{found[0]} needs the whole model at once, and memory keeps one block: leave out one of them"
            + (", and heal what was written afterwards" if found[0] == "heal" else "")
        )


def compress_to(
    recipe: Recipe,
    out: str | Path,
    *,
    memory: int | str,
    work: str | Path | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> Result:
    """Compress a model that need not fit into memory, from folder to folder, one block at a time.

    The same recipe, to rounding the same result as `eckart.compress`. Finished parts are kept in a work
    folder, which is deleted at the end; an interrupted run goes on where it was, to the same bytes. Under
    torchrun all processes call it, with the same arguments and folders that all of them see.

    Args:
        recipe: with the model's name.
        out: the folder to write.
        memory: the bytes that may be used, such as "6GB": of the device, or else of the process.
        work: the work folder; default: beside `out`.
        overwrite: replace `out` if it is there.
        watch: called with (stage, done, total).

    Raises:
        ConfigError: the recipe asks for what needs the whole model, or `memory` is too little; the message
            says how much is needed.
        RankError: the budget cannot be reached.
        ModelError: the model cannot be read, or its blocks are no chain.
        NotFinite: a weight, a statistic or a logit is NaN or infinite.
        StoreError: a file cannot be read or written, or the work folder is that of another run.
    """
    out = Path(out)
    check(recipe)
    recipe.check_text()
    if recipe.model is None:
        raise ModelError("the recipe names no model: give a hub id or a folder")
    hub.check_output(out, overwrite, recipe.model)
    place = hub.device(recipe.device)
    team = Team.joined(place)
    run = Run(watch if watch and team.rank == 0 else silent)
    with run.stage("open"):
        job, written = _job(
            recipe, team, place, Path(work) if work else work_folder(out), parse_size(memory), run
        )
    found, choices = _chosen(job, run)
    dtype = planning.output_dtype(recipe, job.stored)
    before = replace(sizes(job.stream.model, job.found, dtype), bytes=written)
    after_tracks = _tracks(job, "after")
    with run.stage("write") as progress:
        after = write.write(job, found, choices, dtype, after_tracks, progress)
    result = _result(job, run, found, choices, dtype, before, after)
    team.wait()
    if team.rank == 0:
        with run.stage("finish"):
            _publish(job, dtype, out, overwrite, result)
            shutil.rmtree(job.work.folder, ignore_errors=True)
    team.wait()
    return result.with_file_bytes(hub.weight_bytes(out))


def work_folder(out: Path) -> Path:
    """Return where a run that writes `out` keeps what is finished."""
    return out.parent / f".{out.name}.work"


def _job(
    recipe: Recipe, team: Team, place: torch.device, work: Path, limit: int, run: Run
) -> tuple[Job, int]:
    """Open the model and the text, find what to treat, and refuse at once what cannot be done.

    Returns the job, and the bytes of the dense model in the output dtype.
    """
    assert recipe.model is not None
    memory.map_large_blocks()
    remote = recipe.trust_remote_code
    folder = local(recipe.model)
    stored = hub.stored_dtype(recipe.model, trust_remote_code=remote)
    model = skeleton(recipe.model, hub.compute_dtype(stored, place), trust_remote_code=remote)
    shards = Shards(model, folder)
    written = written_bytes(model, planning.output_dtype(recipe, stored))
    for name in models.block_names(model):
        kinds.unfold(model.get_submodule(name))
    tokenizer = hub.load_tokenizer(recipe.model, trust_remote_code=remote)
    texts = Texts.of(windows.read(recipe, tokenizer, run.warnings))
    measure.check_length(model, recipe.seq_len)
    found = planning.targets_of(recipe, model)
    suspected = dimensions.find(model, found) if recipe.resolved_method().narrows else []
    times = planning.times_of(recipe, model, found, stored)
    budget = planning.limit_of(recipe, model, found, stored, times)
    selection.unseen(recipe, budget, model, found, suspected)
    stream = Stream(model, shards, place)
    if team.rank == 0:
        Work.opened(work, _key(recipe, shards, model, texts, place, team))
    team.wait()
    job = Job(recipe, recipe.model, stream, stored, found, suspected, texts, Work(work), team)
    need.check(job, limit)
    stream.learn(sorted({rows.shape[1] for rows in texts.all().values()} or {_PROBE}))
    return replace(job, narrowable=verified(stream, suspected)), written


def _key(
    recipe: Recipe, shards: Shards, model: Any, texts: Texts, place: torch.device, team: Team
) -> Mapping[str, Any]:
    """Return everything that can change the result."""
    digests = {name: mend.hash_of(rows.tolist()) for name, rows in texts.all().items()}
    versions = {name: metadata.version(name) for name in ("eckart", "torch", "transformers")}
    return {
        **{f"recipe.{name}": value for name, value in asdict(recipe).items()},
        **{f"text.{name}": digest for name, digest in digests.items()},
        **{f"version.{name}": version for name, version in versions.items()},
        "weights": shards.fingerprint(),
        "config": mend.hash_of(model.config.to_json_string()),
        "device": str(place),
        "threads": torch.get_num_threads(),
        "processes": team.size,
    }


def _tracks(job: Job, when: str) -> list[Track]:
    """Return the tracks of the text to measure on."""
    texts = job.texts.all()
    return [job.track(f"{name}-{when}", texts[name]) for name in ("held_out", "foreign") if name in texts]


def _chosen(job: Job, run: Run) -> tuple[Decomposed, list[Choice]]:
    """Calibrate, decompose, and choose: the same choices as for a model in memory."""
    with run.stage("forward") as progress:
        measured(job, _tracks(job, "dense"), "dense", progress)
    with run.stage("decompose") as progress:
        decompose(job, progress)
    kept, short, said = parts.kept(job.work, job.steps())
    run.warnings.extend([*said, *shortages(job.recipe, short)])
    found = Decomposed(kept, job.narrowable, [], {})
    recipe, model = job.recipe, job.stream.model
    times = planning.times_of(recipe, model, job.found, job.stored)
    limit = planning.limit_of(recipe, model, job.found, job.stored, times)
    tried: dict[tuple[Choice, ...], Tensor] = {}
    rates = selection.exchange_rates(recipe, found)
    if len(rates) > 1 and job.texts.trial is not None:
        candidates = [selection.at_rate(recipe, limit, job.found, found, rate) for rate in rates]
        with run.stage("try") as progress:
            tried = _tried(job, found, candidates, progress)

    def losses(choices: Sequence[Choice]) -> Tensor:
        return tried[tuple(choices)]

    with run.stage("choose") as progress:
        choices = selection.choose(
            recipe, limit, model, job.found, found, losses if tried else None, progress
        )
    return found, choices


def _tried(
    job: Job, found: Decomposed, candidates: Sequence[list[Choice]], progress: measure.Progress
) -> dict[tuple[Choice, ...], Tensor]:
    """Return the losses that each of the different `candidates` leads to, from the work folder if known."""
    different = list(dict.fromkeys(tuple(choices) for choices in candidates))
    if not job.work.has("tried.json"):
        losses = write.trial_losses(job, found, different, progress)
        if job.team.rank == 0:
            job.work.write_json("tried", {"losses": [own.tolist() for own in losses]})
        job.team.wait()
    known = [torch.tensor(own, dtype=torch.float64) for own in job.work.read_json("tried")["losses"]]
    return dict(zip(different, known, strict=True))


def _result(
    job: Job,
    run: Run,
    found: Decomposed,
    choices: Sequence[Choice],
    dtype: torch.dtype,
    before: Any,
    after: Mapping[str, list[float]],
) -> Result:
    model = job.stream.model
    dense = {name.partition("-")[0]: losses for name, losses in job.work.read_json("dense").items()}
    now = {name.partition("-")[0]: losses for name, losses in after.items()}
    rows = job.texts.all()

    def perplexity(losses: Mapping[str, list[float]], name: str) -> Perplexity | None:
        if name not in losses:
            return None
        length = rows[name].shape[1]
        summed = measure.summary(model, torch.tensor(losses[name], dtype=torch.float64), length)
        return replace(summed, device=str(job.stream.place))

    modules = assemble.rows(choices, found)
    has_gradients = job.recipe.resolved_method().outputs == "gradient"
    tokens, gradient_tokens = job.tokens()
    return Result(
        recipe=job.recipe,
        source=job.source,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        modules=assemble.updated(modules, job.found, model),
        before=before,
        after=sizes(model, job.found, dtype),
        source_bytes=total_bytes(job.stream.shards.files),
        dense=perplexity(dense, "held_out"),
        compressed=perplexity(now, "held_out"),
        held_out=job.texts.own_text,
        predicted_increase=sum(module.loss for module in modules) if has_gradients else None,
        calibration_tokens=tokens,
        gradient_tokens=gradient_tokens,
        seconds=dict(run.seconds),
        peak_memory=memory.peak_bytes(job.stream.place),
        warnings=list(run.warnings),
        foreign=Quality.of(perplexity(dense, "foreign"), None, perplexity(now, "foreign")),
    )


def _publish(job: Job, dtype: torch.dtype, out: Path, overwrite: bool, result: Result) -> None:
    """Make the output folder of the finished parts."""
    model, work = job.stream.model, job.work
    plugin.mark(model)
    steps = [write.ENTRANCE, *map(str, range(job.count)), write.EXIT]
    shards = [work.folder / write.SHARDS / f"{step}.safetensors" for step in steps]
    guards = plugin.guard_tensors(model) if hasattr(model, "hf_quantizer") else {}
    if guards:
        work.write_tensors(
            f"{write.SHARDS}/guard", {n: torch.empty(0, dtype=dtype) for n in guards}, {"format": "pt"}
        )
        shards.append(work.folder / write.SHARDS / "guard.safetensors")
    with hub.new_folder(out, overwrite) as folder:
        publish.shards(folder, [file for file in shards if file.exists()])
        tokenizer = hub.load_tokenizer(job.source, trust_remote_code=job.recipe.trust_remote_code)
        publish.description(folder, model, dtype, tokenizer)
        measured_result = result.with_file_bytes(hub.weight_bytes(folder))
        for name, content in report.documents(measured_result, out.name).items():
            (folder / name).write_text(content, encoding="utf-8")
