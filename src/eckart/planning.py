"""What a recipe treats and may spend: the plan, before anything is run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import (
    dimensions,
    heads,
    hub,
    kinds,
    latency,
    losses,
    models,
    running,
    selection,
    sharing,
    splitting,
    timed,
    timekeeping,
)
from .choices import Budget, Choice, fixed_bytes, settle
from .dimensions import Dimension
from .errors import ConfigError, ModelError
from .heads import Heads
from .latency import Timing
from .models import Target
from .recipe import FLOAT, Recipe
from .stages import Watch
from .timed import Timed
from .windows import Windows


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe will do to a model, known before any of it runs.

    `exact` is False where spectra will decide the ranks: then `choices` are those of uniform
    allocation at the same budget, for orientation.
    """

    recipe: Recipe
    choices: list[Choice]
    model_parameters: int
    exact: bool
    timing: Timing | None = None


def plan(recipe: Recipe, model: nn.Module, stored: torch.dtype, watch: Watch | None = None) -> Plan:
    """Return the plan of `recipe` for `model`, which may be a skeleton on the meta device.

    `watch` is called with (stage, done, total) where times of maps have to be measured first.

    Raises:
        ModelError: there is nothing in the model that can be treated, or a pattern matches nothing.
        RankError: the budget cannot be reached.
        ConfigError: the budget is an increase of the perplexity, which only measuring turns into a size.
    """
    if recipe.max_ppl_increase is not None:
        raise ConfigError(
            f"max_ppl_increase {recipe.max_ppl_increase} is found by measuring, and a plan measures nothing: "
            "leave out --dry-run, or see eckart curve"
        )
    model = kinds.on_meta(model)
    splitting.unfold(model, recipe.split == "fused")
    found = targets_of(recipe, model)
    times = times_of(recipe, model, found, stored, watch)
    limit = limit_of(recipe, model, found, stored, times)
    decided_by_spectra = recipe.resolved_method().allocation == "curvature" or recipe.energy is not None
    suspected = dimensions.find(model, found)
    bases = bases_of(recipe, model, found, suspected)
    choices = selection.unseen(recipe, limit, model, found, suspected, bases)
    exact = not decided_by_spectra and not recipe.stock and recipe.split == "none"
    timing = None if times is None else times.timing(recipe.resolved_objective, found, choices)
    return Plan(recipe, choices, models.parameter_count(model), exact, timing)


def targets_of(recipe: Recipe, model: nn.Module) -> list[Target]:
    """Return the matrices that `recipe` treats, with those that it only stores."""
    found = models.targets(model, recipe.include, recipe.exclude)
    models.check_patterns([t.name for t in found], [override.match for override in recipe.overrides])
    stored = recipe.embeddings_storage != FLOAT
    return [*found, *models.ends(model, found, recipe.exclude)] if stored else found


def times_of(
    recipe: Recipe,
    model: nn.Module,
    found: Sequence[Target],
    stored: torch.dtype,
    watch: Watch | None = None,
    known: Timed | None = None,
) -> Timed | None:
    """Return the times that decide, on the device and in the dtype that the model is computed in.

    See eckart.timekeeping.timed.
    """
    place = losses.device_of(model)
    if place.type == "meta":
        place = hub.device(recipe.device)
    dtype = hub.compute_dtype(output_dtype(recipe, stored), place)
    return timekeeping.timed(recipe, model, found, place, dtype, watch, known)


def limit_of(
    recipe: Recipe,
    model: nn.Module,
    found: Sequence[Target],
    stored: torch.dtype,
    times: Timed | None = None,
) -> Budget:
    """Return what there is to spend on `found`; `times` are those of `times_of`."""
    if times is not None and recipe.latency is not None:
        return timed.in_time(times, latency.parse(recipe.latency), found)
    itemsize = output_dtype(recipe, stored).itemsize
    attentions = dimensions.find(model, found) if _byheads_of(recipe) else []
    fixed = fixed_bytes(
        model, found, recipe.resolved_method().low_rank, itemsize, attentions, itemised=recipe.stores
    )
    budget = settle(recipe, found, models.parameter_count(model), fixed, itemsize)
    return budget if times is None else timed.within(times, recipe.resolved_objective, budget, found)


def output_dtype(recipe: Recipe, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of the output: the recipe's, or the source's."""
    return hub.dtype(recipe.dtype) if recipe.dtype else stored


def heads_of(recipe: Recipe, model: nn.Module, found: Sequence[Target]) -> list[Heads]:
    """Return the attentions whose heads may be made narrower one by one, each verified."""
    return heads.found(model, dimensions.find(model, found)) if _byheads_of(recipe) else []


def bases_of(
    recipe: Recipe, model: nn.Module, found: Sequence[Target], suspected: Sequence[Dimension]
) -> list[tuple[str, ...]]:
    """Return the names of the matrices that share a right factor, where the form says so."""
    if recipe.resolved_method().form != "shared":
        return []
    return sharing.bases(model, found, suspected, recipe.layers)


def _byheads_of(recipe: Recipe) -> bool:
    """Tell whether heads may be made narrower: mixed does better with ranks, and no stock config says it."""
    return recipe.resolved_method().form == "width" and not recipe.stock


def dimensions_of(
    recipe: Recipe, model: nn.Module, found: Sequence[Target], texts: Windows
) -> list[Dimension]:
    """Return the hidden dimensions that may be made narrower, each verified."""
    if not recipe.resolved_method().narrows:
        return []
    suspected = dimensions.find(model, found)
    seen = running.outputs(model, texts)
    verified = dimensions.verified(
        model, suspected, lambda whole, dimension: dimensions.holds(whole, dimension, seen)
    )
    if recipe.resolved_method().form == "width" and not any(found.kind == "mlp" for found in verified):
        raise ModelError(
            f"{type(model).__name__} has no MLP that can be made narrower among the treated matrices: its "
            "matrices must be nn.Linear, with nothing between them that mixes channels; use form pivoted"
        )
    return verified
