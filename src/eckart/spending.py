"""What a recipe treats of a model, and what there is to spend on it: parameters, bytes or measured time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import dimensions, hub, latency, losses, mixtures, models
from . import timed as in_time
from .choices import Budget, fixed_bytes, settle
from .errors import ModelError
from .latency import Timing
from .models import Target
from .recipe import FLOAT, Recipe
from .speed import passing, timetable
from .stages import Run, Watch
from .timed import Timed


def targets_of(recipe: Recipe, model: nn.Module) -> list[Target]:
    """Return the matrices that `recipe` treats, with those that it only stores."""
    found = models.targets(model, recipe.include, recipe.exclude)
    models.check_patterns([t.name for t in found], [override.match for override in recipe.overrides])
    stored = recipe.embeddings_storage != FLOAT
    return [*found, *models.ends(model, found, recipe.exclude)] if stored else found


def by_heads(recipe: Recipe) -> bool:
    """Tell whether heads may be made narrower: mixed does better with ranks, and no stock config says it."""
    return recipe.resolved_method().form == "width" and not recipe.stock


def output_dtype(recipe: Recipe, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of the output: the recipe's, or the source's."""
    return hub.dtype(recipe.dtype) if recipe.dtype else stored


def timed(
    recipe: Recipe,
    model: nn.Module,
    found: Sequence[Target],
    stored: torch.dtype,
    watch: Watch | None = None,
    known: Timed | None = None,
) -> Timed | None:
    """Return the times that decide, None where none do: from the recipe's file, or measured now.

    Args:
        recipe: workload, times, multiple, form.
        model: the dense model, or its skeleton.
        found: its targets.
        stored: dtype of the source.
        watch: (stage, done, total).
        known: what was had before, and is taken again where it fits.

    Raises:
        ModelError: a target is no map that every token passes once.
        ConfigError: the file's times are of another place.
        StoreError: the file cannot be read or written.
    """
    if not recipe.timed:
        return None
    tokens = latency.tokens(recipe.workload)
    if known is not None and (known.tokens, known.multiple) == (tokens, recipe.multiple):
        return known
    _refuse_experts(model, found)
    method = recipe.resolved_method()
    suspected = dimensions.find(model, found) if method.narrows else []
    own = in_time.wanted(found, method.low_rank, suspected)
    place = losses.device_of(model)
    if place.type == "meta":
        place = hub.device(recipe.device)
    dtype = hub.compute_dtype(output_dtype(recipe, stored), place)
    table = timetable.obtain(recipe.times, own, tokens, place, dtype, watch)
    return Timed.of(table, tokens, recipe.multiple)


def _refuse_experts(model: nn.Module, found: Sequence[Target]) -> None:
    lists = mixtures.expert_lists(model, models.all_blocks(model))
    inside = next((t.name for t in found if models.owner(t.name, lists) is not None), None)
    if inside is not None:
        raise ModelError(
            f"{inside} belongs to an expert, which runs for some tokens only, so its time per token is not "
            "that of its shape: give keep or size without an objective, or leave experts out (exclude)"
        )


def limit_of(
    recipe: Recipe,
    model: nn.Module,
    found: Sequence[Target],
    stored: torch.dtype,
    times: Timed | None = None,
) -> Budget:
    """Return what there is to spend on `found`; `times` as `timed` gave them."""
    if times is not None and recipe.latency is not None:
        return in_time.in_time(times, latency.parse(recipe.latency), found)
    itemsize = output_dtype(recipe, stored).itemsize
    attentions = dimensions.find(model, found) if by_heads(recipe) else []
    fixed = fixed_bytes(
        model, found, recipe.resolved_method().low_rank, itemsize, attentions, itemised=recipe.stores
    )
    budget = settle(recipe, found, models.parameter_count(model), fixed, itemsize)
    return budget if times is None else in_time.within(times, recipe.resolved_objective, budget, found)


def measured(times: Timed | None, model: Any, found: Sequence[Target], run: Run) -> float | None:
    """Return the seconds of a pass through the maps `found` of `model`, None where no times decide."""
    if times is None:
        return None
    with run.stage("time the model") as progress:
        names = [target.name for target in found]
        return passing.seconds([model.get_submodule(name) for name in names], times.tokens, progress)


def with_measured(
    timing: Timing | None, before: float | None, model: Any, found: Sequence[Target], run: Run
) -> Timing | None:
    """Return `timing` with what the maps `found` of the finished `model` take, beside what they took."""
    if timing is None or before is None:
        return timing
    with run.stage("time the model") as progress:
        modules = [model.get_submodule(target.name) for target in found]
        after = passing.seconds(modules, timing.tokens, progress)
    return replace(timing, measured_dense=before, measured=after)
