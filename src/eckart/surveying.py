"""Look at the spectra of a model's matrices before anything is cut."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import heads, hub, kinds, models, plugin, reading, routing, running, splitting, stores
from .api import Sources, loaded, loaded_for, resolve, sources
from .calibrate import Calibrated
from .errors import ModelError
from .factorize import by_block, matrix_metrics, shortages, statistics_of
from .heads import Cut
from .linalg import Metric, check_matrix
from .methods import shortage
from .models import Target
from .recipe import Recipe, Split
from .spectra import singular_values
from .stages import Run, Watch, silent
from .stats import Stats
from .streaming import matrices
from .streaming.shards import Shards, local
from .survey import Matrix, MetricName, Spectrum, Survey
from .survey import kinds as kinds_of

_BOTH: dict[MetricName, str] = {"activation": "svd-llm", "two-sided": "eckart"}
"""The metrics that text gives, by whose method they are those."""
Metrics = tuple[Metric, Metric]
"""H and C of one matrix."""
Weighed = tuple[Target, Tensor, Mapping[MetricName, Metrics]]


def spectrum(
    model: Any,
    *,
    text: Sources | None = None,
    data: Sources | None = None,
    include: Sources | None = None,
    exclude: Sources | None = None,
    ends: bool = False,
    split: Split | None = None,
    task: str | None = None,
    tokens: int | None = None,
    gradient_tokens: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    damp: float | None = None,
    bos: bool | None = None,
    device: str | None = None,
    trust_remote_code: bool | None = None,
    tokenizer: Any = None,
    watch: Watch | None = None,
) -> Survey:
    """Return the singular values of every matrix of the blocks, and what they say of its rank.

    Plain, and, with `text`, in the metrics of method svd-llm (inputs) and method eckart (inputs and output
    gradients): the values of C^1/2 W H^1/2, on the windows that `compress` would calibrate on, damped alike.
    float64; what is below 1e-7 to 1e-6 of the largest value is rounding (eckart.spectra.resolution).

    Without text, a folder or a hub id is read from its safetensors files one matrix at a time. Else the
    model is loaded; what is compressed is made dense first, unless it is a model in memory.

    Args:
        model: a hub id, a folder, a .gguf file, or a model, which stays as it is.
        text: sources of text to take second moments on; the last 5 % are left out, as by `compress`.
        data: files or folders instead, for models that do not read text.
        include: globs on module names that replace the default choice of matrices.
        exclude: globs on module names to leave out.
        ends: the embeddings and the output head as well.
        split: `fused`: queries, keys and values that are one matrix are looked at one by one.
        tokenizer: for a model given as an object, to read text with.
        watch: called with (stage, done, total).

    The others are explained in eckart.recipe.Recipe.

    Raises:
        ConfigError: an argument is not legal, or a text cannot be read or is too short.
        ModelError: the model cannot be read, or has no such matrices.
        StoreError: a weight file is damaged.
        NotFinite: a weight, a statistic or a logit is NaN or infinite.
    """
    given = {
        "keep": 1.0, "text": sources(text), "data": sources(data), "include": sources(include),
        "exclude": sources(exclude), "split": split, "task": task, "tokens": tokens,
        "gradient_tokens": gradient_tokens, "seq_len": seq_len, "seed": seed, "damp": damp, "bos": bos,
        "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if not given["text"] and not given["data"]:
        given["method"] = "svd"
    by_name = isinstance(model, (str, Path))
    if by_name:
        given["model"] = str(model)
    resolved = resolve(None, given, "spectrum")
    run = Run(watch or silent)
    if by_name and _in_parts(resolved):
        return _of_files(resolved, ends, run)
    return _of_model(resolved, _dense(resolved, model, tokenizer, run), ends, run)


def _in_parts(resolved: Recipe) -> bool:
    """Tell whether the matrices can be read one by one: nothing runs the model, and the files hold them."""
    assert resolved.model is not None
    if resolved.text or resolved.data or resolved.split != "none" or hub.is_gguf(resolved.model):
        return False
    config = hub.load_config(resolved.model, trust_remote_code=resolved.trust_remote_code)
    return getattr(config, "quantization_config", None) is None


def _dense(resolved: Recipe, model: Any, tokenizer: Any, run: Run) -> hub.Loaded:
    """Return the model, loaded where it is named, with plain matrices."""
    if resolved.model is None:
        found = loaded(model, tokenizer, None, None, False)
        if models.low_rank_modules(found.model) or stores.stored(found.model):
            raise ModelError("the model is low-rank or in few bits: eckart.densify it first")
        return found
    with run.stage("load"):
        found = loaded_for(resolved)
        return replace(found, model=plugin.densify(found.model))


def _targets(resolved: Recipe, model: Any, ends: bool) -> list[Target]:
    found = models.targets(model, resolved.include, resolved.exclude)
    return [*found, *models.ends(model, found, resolved.exclude)] if ends else found


def _of_files(resolved: Recipe, ends: bool, run: Run) -> Survey:
    """Look at one matrix after the other, as it is read from its file."""
    assert resolved.model is not None
    with run.stage("read names"):
        remote = resolved.trust_remote_code
        model = matrices.skeleton(resolved.model, task=resolved.task, trust_remote_code=remote)
        unfolded = matrices.unfolded(model)
        found, parts = _targets(resolved, unfolded, ends), heads.cuts(unfolded)
        shards = Shards(model, local(resolved.model))
    place = hub.device(resolved.device)
    with run.stage("spectra") as progress:
        read = matrices.each(model, shards, found)
        weighed: Iterator[Weighed] = ((target, weight.to(place), {}) for target, weight in read)
        looked_at = _looked_at(weighed, found, parts, progress)
    return Survey(
        resolved.model, ("plain",), looked_at, 0, 0, resolved.damp, "files",
        dict(run.seconds), tuple(run.warnings),
    )  # fmt: skip


def _of_model(resolved: Recipe, known: hub.Loaded, ends: bool, run: Run) -> Survey:
    """Look at a model in memory, on text where there is some; it is as before in the end."""
    model = known.model
    try:
        run.warnings.extend(splitting.unfold(model, resolved.split == "fused"))
        found, parts = _targets(resolved, model, ends), heads.cuts(model)
        for target in found:
            check_matrix(models.weight(model, target), target.name)
        calibrated = _calibrated(resolved, known, found, run)
        with run.stage("spectra") as progress:
            weighed = _in_memory(resolved, model, found, calibrated, run)
            looked_at = _looked_at(weighed, found, parts, progress)
    finally:
        kinds.fold(model)
    metrics: tuple[MetricName, ...] = ("plain", *(_BOTH if resolved.statistics() else ()))
    return Survey(
        known.source, metrics, looked_at, calibrated.tokens, calibrated.gradient_tokens,
        resolved.damp, "memory", dict(run.seconds), tuple(run.warnings),
    )  # fmt: skip


def _calibrated(resolved: Recipe, known: hub.Loaded, found: Sequence[Target], run: Run) -> Calibrated:
    """Return the statistics of both metrics, none without text."""
    if not resolved.statistics():
        return Calibrated(Stats(), 0, 0)
    with run.stage("read data"):
        material = reading.read(resolved, known, run.warnings)
        running.check(resolved, material, known.model)
    with run.stage("calibrate") as progress:
        names = [name for target in found for name in target.modules]
        calibrated = statistics_of(resolved, known.model, names, material.calibration, progress)
    run.warnings.extend(routing.fill(known.model, found, calibrated.stats))
    return calibrated


def _in_memory(
    resolved: Recipe, model: Any, found: Sequence[Target], calibrated: Calibrated, run: Run
) -> Iterator[Weighed]:
    """Yield every matrix with its metrics; the statistics of a block are freed behind it."""
    short: dict[str, int] = {}
    for group in by_block(model, found):
        shared: dict[str, Metric] = {}
        for target in group:
            metrics: dict[MetricName, Metrics] = {}
            for name, method in _BOTH.items() if resolved.statistics() else ():
                own = replace(resolved, method=method)
                metrics[name] = matrix_metrics(own, target, calibrated, shared)
            yield target, models.weight(model, target), metrics
            for kind in resolved.statistics():
                moment = calibrated.stats.moment(kind, target.name)
                if shortage(moment):
                    short[kind] = max(short.get(kind, 0), moment.total.shape[0])
        calibrated.stats.forget([name for target in group for name in target.modules])
    run.warnings.extend(shortages(resolved, short))


def _looked_at(
    weighed: Iterable[Weighed],
    found: Sequence[Target],
    parts: Mapping[str, Cut],
    progress: Callable[[int, int], None],
) -> tuple[Matrix, ...]:
    """Return what was found, in the order of `found`."""
    kind = kinds_of(target.name for target in found)
    made: dict[str, Matrix] = {}
    for target, weight, metrics in weighed:
        check_matrix(weight, target.name)
        cut = parts.get(target.name)
        each = () if cut is None else tuple(_of_heads(weight, metrics, cut))
        side = None if cut is None else cut.side
        made[target.name] = Matrix(target.name, kind[target.name], _spectrum(weight, metrics), each, side)
        progress(len(made), len(found))
    return tuple(made[target.name] for target in found)


def _spectrum(weight: Tensor, metrics: Mapping[MetricName, Metrics]) -> Spectrum:
    values: dict[MetricName, Tensor] = {"plain": singular_values(weight).cpu()}
    for name, own in metrics.items():
        values[name] = singular_values(weight, *own).cpu()
    return Spectrum.of((weight.shape[0], weight.shape[1]), values)


def _of_heads(weight: Tensor, metrics: Mapping[MetricName, Metrics], cut: Cut) -> Iterator[Spectrum]:
    """Yield the spectrum of what each head has of `weight` alone, in its part of the metrics."""
    for place in cut.slices():
        units = torch.arange(place.start, place.stop, device=weight.device)
        own: dict[MetricName, Metrics] = {}
        for name, (inputs, outputs) in metrics.items():
            if cut.side == "rows":
                own[name] = inputs, outputs.part(units)
            else:
                own[name] = inputs.part(units), outputs
        yield _spectrum(weight[place] if cut.side == "rows" else weight[:, place], own)
