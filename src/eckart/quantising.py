"""Store a model that is there already, dense or compressed, in few bits: ranks and widths stay."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from . import (
    accounting,
    assemble,
    correcting,
    hub,
    kinds,
    losses,
    memory,
    mixtures,
    models,
    plugin,
    reading,
    routing,
    running,
    storing,
)
from .accounting import sizes, written_bytes
from .calibrate import Calibrated
from .embeddings import FactoredEmbedding, FactoredHead
from .errors import ConfigError, ModelError
from .factorize import matrix_metrics, statistics_of
from .joint import JointLinear
from .linalg import Metric
from .models import LowRankModule, Target
from .recipe import AUTO, FLOAT, Recipe
from .result import Measured, Module, Quality, Result
from .stages import Watch, silent
from .stores import stored
from .windows import Windows

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Held:
    """A module to store: its name, the storage, and whether it is an embedding table (with its tied head)."""

    target: Target
    storage: str
    form: str
    rank: int


def holdings(model: nn.Module, recipe: Recipe) -> list[Held]:
    """Return what `recipe` stores of `model`: the low-rank modules and nn.Linear of the blocks, and the ends.

    Raises:
        ModelError: the model is stored in few bits already.
    """
    if stored(model):
        raise ModelError(
            "the model is stored in few bits already: eckart.densify it first, or take its source"
        )
    blocks = models.all_blocks(model)
    routers = mixtures.routers(model, blocks)
    found: list[Held] = []
    for name, module in model.named_modules():
        inside = any(models.owner(name, [held.target.name]) for held in found[-1:])
        plain = type(module) is nn.Linear and name not in routers
        treated = plain or isinstance(module, LowRankModule)
        if models.owner(name, blocks) and treated and not inside:
            assert not isinstance(module, FactoredEmbedding | FactoredHead)
            if isinstance(module, JointLinear):
                raise ModelError(
                    f"{name} has its right factor in common with other matrices of its input, which is "
                    "stored in the output dtype only: compress again without --share-inputs, or "
                    "eckart.densify it first"
                )
            rank = getattr(module, "rank", min(module.out_features, module.in_features))
            target = Target(name, (module.out_features, module.in_features))
            skipped = models.match_one(name, recipe.exclude) is not None
            kind = FLOAT if skipped else recipe.matrices_storage
            found.append(Held(target, kind, str(getattr(module, "kind", "dense")), int(rank)))
    if recipe.embeddings_storage == FLOAT:
        return found
    kind = recipe.embeddings_storage
    ends = models.ends(model, [held.target for held in found], recipe.exclude)
    return [
        *found,
        *(Held(end, kind, "factored", rank) for end, rank in _factored_ends(model, recipe)),
        *(Held(end, kind, "dense", min(end.shape)) for end in ends),
    ]


def _factored_ends(model: nn.Module, recipe: Recipe) -> list[tuple[Target, int]]:
    """Return the factored embeddings, with the head that is tied to them, and their rank."""
    parts = models.low_rank_modules(model)
    heads = {id(module.up.weight): name for name, module in parts.items() if isinstance(module, FactoredHead)}
    return [
        (Target(name, shape, True, heads.get(id(module.up.weight)), False), module.rank)
        for name, module in parts.items()
        if isinstance(module, FactoredEmbedding) and models.match_one(name, recipe.exclude) is None
        for shape in [(module.embedding_dim, module.num_embeddings)]
    ]


def quantise(
    recipe: Recipe, loaded: hub.Loaded, watch: Watch | None = None, material: Windows | None = None
) -> tuple[Any, Result]:
    """Store the model in place, in the metric of the recipe's method on its text, and measure it.

    `material` is what to run it on; default: what the recipe names.

    Raises:
        ConfigError: no storage, or text is missing.
        ModelError: as `holdings`.
        NotFinite: a weight, a statistic or a logit is NaN or infinite.
    """
    check(recipe)
    model, dtype = loaded.model, hub.dtype(recipe.dtype) if recipe.dtype else loaded.stored
    written = written_bytes(model, dtype)
    kinds.unfold(model)
    try:
        _, found = _quantised(recipe, loaded, watch or silent, material)
    finally:
        plugin.mark(kinds.fold(model))
    # Files hold the stock modules.
    before = replace(found.before, bytes=written)
    return model, replace(found, before=before, after=replace(found.after, bytes=written_bytes(model, dtype)))


def _quantised(
    recipe: Recipe, loaded: hub.Loaded, show: Watch, material: Windows | None
) -> tuple[Any, Result]:
    """Store a model whose matrices are all nn.Linear, or low-rank."""
    model, warnings, clock = loaded.model, list[str](), time.perf_counter()
    found = holdings(model, recipe)
    targets = [held.target for held in found]
    texts = running.remembered(model, material or reading.read(recipe, loaded, warnings))
    dtype = hub.dtype(recipe.dtype) if recipe.dtype else loaded.stored
    before = sizes(model, targets, dtype)

    def measured(stage: str) -> list[Measured | None]:
        both = (texts.held_out, texts.foreign)
        return [None if rows is None else running.quality(model, rows, partial(show, stage)) for rows in both]

    dense = measured("measure before")
    names = [name for target in targets for name in target.modules]
    calibrated = statistics_of(
        recipe, model, names, texts.calibration, lambda done, total: show("calibrate", done, total)
    )
    warnings.extend(routing.fill(model, targets, calibrated.stats))
    _store(recipe, model, found, calibrated, lambda done, total: show("round", done, total))
    plugin.mark(model)
    with accounting.rounded(model, targets, dtype) as after:
        now = measured("measure after")
    return model, Result(
        recipe=recipe,
        source=loaded.source,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        modules=assemble.updated([_row(held) for held in found], targets, model),
        before=before,
        after=after,
        source_bytes=loaded.bytes,
        dense=dense[0],
        compressed=now[0],
        held_out=texts.own_text,
        predicted_increase=None,
        calibration_tokens=calibrated.tokens,
        gradient_tokens=calibrated.gradient_tokens,
        calibration_unit=running.unit(texts),
        task=loaded.task,
        seconds={"all": time.perf_counter() - clock},
        peak_memory=memory.peak_bytes(losses.device_of(model)),
        warnings=warnings,
        foreign=Quality.of(dense[1], None, now[1]),
    )


def _store(
    recipe: Recipe, model: nn.Module, found: Sequence[Held], calibrated: Calibrated, progress: Progress
) -> None:
    """Store all of `found`, those that are whole with corrections where the recipe has them."""
    wanted = [held for held in found if held.storage != FLOAT]
    whole: list[correcting.Whole] = []
    if recipe.correction is not None:
        whole = [
            correcting.Whole(held.target, held.target.name, held.storage)
            for held in wanted
            if held.form == "dense" and held.target.ranked
        ]
        storing.check_corrected(recipe, whole)
        correcting.correct(recipe, model, whole, calibrated, progress)
    corrected = {one.name for one in whole}
    others = [held for held in wanted if held.target.name not in corrected]
    for done, held in enumerate(others, 1):
        inputs, outputs = _metrics(recipe, calibrated, held.target)
        storing.round_module(model, held.target.name, held.storage, inputs, outputs)
        progress(done, len(others))


def check(recipe: Recipe) -> None:
    """Raise ConfigError unless `recipe` names storages, and text where its method looks at data."""
    if AUTO in (recipe.matrices_storage, recipe.embeddings_storage) or not recipe.stores:
        raise ConfigError("name a storage for the matrices or the embeddings: here ranks stay as they are")
    recipe.check_text()


def _row(held: Held) -> Module:
    size = held.target.size
    return Module(
        held.target.name, held.target.shape, held.form, held.rank, size, size, 1.0, 0.0, held.storage
    )


def _metrics(recipe: Recipe, calibrated: Calibrated, target: Target) -> tuple[Metric, Metric]:
    inputs, outputs = matrix_metrics(recipe, target, calibrated, {})
    return (outputs, inputs) if target.embedding else (inputs, outputs)
