"""One prepared model at many sizes: what is predicted there, what is measured, and where a limit is met."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from . import assemble, hub, kinds, models, pipeline, planning, prediction, seeking, selection
from .choices import fixed_bytes
from .errors import ConfigError, RankError
from .measure import Perplexity
from .mend import Ward
from .pipeline import Prepared
from .recipe import FLOAT, Recipe
from .result import Result, Search, Tried
from .shelf import Shelf
from .stages import Run, Watch, silent
from .windows import Windows

RESOLUTION = 200
"""Keeps that are searched are multiples of one over this."""
EVALUATIONS = 10
KEEPS = tuple(place / 100 for place in range(100, 25, -5))
"""Where the loss is predicted unless other keeps are asked for."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a model will be at one keep, before anything is put into it.

    Args:
        keep: the budget.
        keep_linears, keep_model: what the choices come to, of the treated matrices and of all parameters.
        parameters: of the whole model.
        bytes: of its weight file, by at most the slack of its header above what is written.
        increase: of the loss in nats per token, by curvature; None for methods without gradients.
    """

    keep: float
    keep_linears: float
    keep_model: float
    parameters: int
    bytes: int
    increase: float | None


def at_keep(recipe: Recipe, keep: float) -> Recipe:
    """Return `recipe` with `keep` for its budget, and nothing of times."""
    return replace(
        recipe,
        keep=keep,
        latency=None,
        objective=None,
        workload=None,
        times=None,
        size=None,
        rank=None,
        energy=None,
        max_ppl_increase=None,
    )


def predict(recipe: Recipe, prepared: Prepared) -> Expected:
    """Return what `recipe`, with a keep, will make of the prepared model, at equal rates of all forms.

    Raises:
        RankError: the budget cannot be reached.
    """
    model, found = prepared.loaded.model, prepared.found
    assert recipe.keep is not None
    limit = planning.limit_of(recipe, model, found, prepared.loaded.stored)
    choices = selection.choose(
        recipe, limit, model, found, prepared.decomposed, None, lambda done, total: None
    )
    ranked = [choice for choice in choices if choice.target.ranked]
    before, after = sum(c.target.size for c in ranked), sum(c.parameters for c in ranked)
    whole = models.parameter_count(model)
    method = recipe.resolved_method()
    itemsize = planning.output_dtype(recipe, prepared.loaded.stored).itemsize
    fixed = fixed_bytes(model, found, method.low_rank, itemsize, itemised=True)
    rows = assemble.rows(choices, prepared.decomposed)
    return Expected(
        keep=recipe.keep,
        keep_linears=after / before if before else 1.0,
        keep_model=(whole - before + after) / whole,
        parameters=whole - before + after,
        bytes=fixed + sum(choice.bytes(itemsize) for choice in choices),
        increase=sum(row.loss for row in rows) if method.outputs == "gradient" else None,
    )


def curve(recipe: Recipe, prepared: Prepared, keeps: Sequence[float], watch: Watch) -> list[Expected]:
    """Return what is predicted at each of `keeps` that can be reached, from the largest down."""
    found: list[Expected] = []
    ordered = sorted(set(keeps), reverse=True)
    for done, keep in enumerate(ordered):
        watch("predict", done, len(ordered))
        try:
            found.append(predict(at_keep(recipe, keep), prepared))
        except RankError:
            break  # nor can anything smaller
    watch("predict", len(ordered), len(ordered))
    return found


def measure(recipe: Recipe, prepared: Prepared, watch: Watch) -> Result:
    """Return the result that `recipe` would give; the prepared model stays as it is."""
    return made(recipe, prepared, watch)[1]


def made(recipe: Recipe, prepared: Prepared, watch: Watch) -> tuple[Any, Result]:
    """Return what `recipe` makes of a copy of the prepared model, and the result."""
    own = replace(prepared.loaded, model=copy.deepcopy(prepared.loaded.model))
    run = Run(watch, dict(prepared.run.seconds), list(prepared.run.warnings))
    return pipeline.finish(recipe, replace(prepared, loaded=own, run=run))


def increase(result: Result) -> float:
    """Return by how much the loss of a measured language model is above the dense model's."""
    assert isinstance(result.compressed, Perplexity)
    assert isinstance(result.dense, Perplexity)
    return result.compressed.loss - result.dense.loss


def check_measurable(prepared: Prepared) -> Perplexity:
    """Return the perplexity of the dense model.

    Raises:
        ConfigError: there is none, since there was no text, or the model is no language model.
    """
    if not isinstance(prepared.dense, Perplexity):
        raise ConfigError(
            "perplexity is measured on text, by a causal language model: give text or eval_text, or another "
            "budget"
        )
    return prepared.dense


def compress(
    recipe: Recipe,
    loaded: hub.Loaded,
    watch: Watch | None = None,
    material: Windows | None = None,
    ward: Ward | None = None,
    shelf: Shelf | None = None,
) -> tuple[Any, Result]:
    """Prepare and finish a model, to any budget; see eckart.pipeline.

    Raises:
        RankError: the budget cannot be reached.
        EckartError: any of its subclasses.
    """
    if recipe.max_ppl_increase is None:
        return pipeline.finish(recipe, pipeline.prepare(recipe, loaded, watch, material, shelf), ward)
    whole = at_keep(recipe, 1.0)
    prepared = pipeline.prepare(whole, loaded, watch, material, shelf)
    try:
        with prepared.run.stage("search"):
            keep, search = reach(recipe, prepared, watch or silent)
    except BaseException:
        kinds.fold(loaded.model)
        raise
    model, result = pipeline.finish(at_keep(recipe, keep), prepared, ward)
    return model, replace(result, search=search)


def reach(recipe: Recipe, prepared: Prepared, watch: Watch) -> tuple[float, Search]:
    """Return the smallest keep within the recipe's max_ppl_increase, as measured, and how it was found.

    Raises:
        ConfigError: there is nothing to measure the perplexity on.
        RankError: no keep is within it.
    """
    wanted = recipe.increase()
    assert wanted is not None
    dense, limit = check_measurable(prepared), math.log1p(wanted)
    known = curve(recipe, prepared, [*KEEPS, *(place / 100 for place in range(25, 0, -5))], watch)
    seeker = _Seeker(recipe, prepared, known, limit, watch, [])
    # All of a model in float is the model itself, which is not compressed.
    stores = recipe.matrices_storage != FLOAT
    most = RESOLUTION if stores else RESOLUTION - 1
    place, _ = seeking.smallest(
        seeker.value, limit, min(_least(recipe, prepared, known), most), most, seeker.guess, EVALUATIONS
    )
    if place is None:
        closest = min(seeker.steps, key=lambda step: step.increase)
        raise RankError(
            f"max_ppl_increase {recipe.max_ppl_increase} cannot be reached at any keep by method "
            f"{recipe.method}: dense has perplexity {dense.perplexity:.2f}, and the closest, at keep "
            f"{closest.keep:g}, has {closest.perplexity:.2f} ({100 * math.expm1(closest.increase):+.1f} %); "
            "allow more, or use another method, form or storage"
        )
    return place / RESOLUTION, Search(wanted, 1 / RESOLUTION, tuple(seeker.steps))


def _least(recipe: Recipe, prepared: Prepared, known: Sequence[Expected]) -> int:
    """Return the smallest place that can be reached, given predictions down to one that cannot."""
    reached = round(known[-1].keep * RESOLUTION)
    for place in range(reached - 1, 0, -1):
        try:
            predict(at_keep(recipe, place / RESOLUTION), prepared)
        except RankError:
            break
        reached = place
    return reached


@dataclass(frozen=True, slots=True)
class _Seeker:
    """Measures keeps, and guesses the next one by the corrected prediction."""

    recipe: Recipe
    prepared: Prepared
    known: Sequence[Expected]
    limit: float
    watch: Watch
    steps: list[Tried]

    def value(self, place: int) -> float:
        keep = place / RESOLUTION
        recipe = at_keep(self.recipe, keep)
        foretold = predict(recipe, self.prepared).increase
        result = measure(recipe, self.prepared, self.watch)
        found = increase(result)
        assert isinstance(result.compressed, Perplexity)
        corrected = None if foretold is None else self._correction().of(foretold)
        within = found <= self.limit
        self.steps.append(Tried(keep, foretold, corrected, result.compressed.perplexity, found, within))
        said = f"keep {keep:g}: perplexity {100 * math.expm1(found):+.2f} %"
        self.watch(said, 1, 1)
        return found

    def _correction(self) -> prediction.Correction:
        pairs = [(s.predicted, s.increase) for s in self.steps if s.predicted is not None]
        return prediction.fit(pairs)

    def guess(self, tried: Mapping[int, float]) -> int | None:
        """Return the smallest place expected within the limit: a line between those that were predicted."""
        if self.known[0].increase is None:
            return None
        correction = self._correction()
        places = [one.keep * RESOLUTION for one in self.known]
        losses = [correction.of(one.increase or 0.0) for one in self.known]
        for (right, low), (left, high) in pairwise(zip(places, losses, strict=True)):
            if high > self.limit:
                share = min(max((self.limit - low) / (high - low), 0.0), 1.0)
                return math.ceil(right + share * (left - right))
        return round(places[-1])
