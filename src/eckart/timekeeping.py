"""The times that decide over a recipe: from a file or measured, and those of the model before and after."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import dimensions, latency, mixtures, models
from . import timed as in_time
from .errors import ModelError
from .latency import Timing
from .models import Target
from .recipe import Recipe
from .speed import passing, timetable
from .stages import Run, Watch
from .timed import Timed


def timed(
    recipe: Recipe,
    model: nn.Module,
    found: Sequence[Target],
    place: torch.device,
    dtype: torch.dtype,
    watch: Watch | None = None,
    known: Timed | None = None,
) -> Timed | None:
    """Return the times that decide, None where none do: from the recipe's file, or measured now.

    Args:
        recipe: workload, times, multiple, form.
        model: the dense model, or its skeleton.
        found: its targets.
        place, dtype: what the model is computed on, and in.
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
