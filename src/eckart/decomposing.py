"""The stages that do not depend on the budget, each made or taken from the cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import rebuild, routing, running
from .cached import Cached, Factored
from .calibrate import Calibrated
from .factorize import Decomposed, factor, statistics_of
from .measure import Perplexity
from .models import Target
from .recipe import Recipe
from .result import Measured
from .stages import Run
from .windows import Rows, Windows

_DEPTH_WINDOWS = 2


def measured(run: Run, name: str, model: Any, rows: Rows | None) -> Measured | None:
    """Return the quality of `model` on `rows`, None without any, as the stage `name`."""
    if rows is None:
        return None
    with run.stage(name) as progress:
        return running.quality(model, rows, progress)


def measure_dense(run: Run, model: Any, rows: Rows | None, cached: Cached | None) -> Measured | None:
    """Return the quality of the dense model on `rows`, None without any."""
    if cached is None or not isinstance(rows, Tensor):
        return measured(run, "measure dense", model, rows)

    def make() -> Perplexity:
        found = measured(run, "measure dense", model, rows)
        assert isinstance(found, Perplexity)
        return found

    return cached.measured(rows, make)


def block_losses(
    recipe: Recipe, model: Any, found: Sequence[Target], texts: Windows, run: Run, cached: Cached | None
) -> dict[str, float]:
    """Return what it costs to leave out each block that may be."""
    if not recipe.depth or not isinstance(texts.trial, Tensor):
        return {}
    rows = texts.trial[:_DEPTH_WINDOWS]

    def make() -> dict[str, float]:
        with run.stage("try blocks") as progress:
            return rebuild.block_losses(model, found, rows, progress)

    return make() if cached is None else cached.blocks(rows, [target.name for target in found], make)


def _calibrated(
    recipe: Recipe, model: Any, found: Sequence[Target], rows: Rows | None, run: Run, cached: Cached | None
) -> tuple[Calibrated, list[str]]:
    """Return the statistics of `found` that the recipe asks for, and what to warn of."""
    names = [name for target in found for name in target.modules]

    def make() -> Calibrated:
        with run.stage("calibrate") as progress:
            return statistics_of(recipe, model, names, rows, progress)

    seen = isinstance(rows, Tensor) and cached is not None
    calibrated = cached.statistics(recipe, names, rows, make) if seen else make()  # type: ignore[union-attr, arg-type]
    return calibrated, routing.fill(model, found, calibrated.stats)


def factored(
    recipe: Recipe,
    model: Any,
    found: Sequence[Target],
    open_ones: Decomposed,
    texts: Windows,
    run: Run,
    cached: Cached | None,
) -> Factored:
    """Return the decompositions of `found` and of what may be made narrower in `open_ones`."""
    rows = texts.calibration

    def make() -> Factored:
        calibrated, said = _calibrated(recipe, model, found, rows, run, cached)
        with run.stage("factor") as progress:
            parts, lacking = factor(
                recipe,
                model,
                found,
                open_ones.dimensions,
                open_ones.heads,
                calibrated,
                progress,
                open_ones.bases,
                open_ones.readings,
            )
        return Factored(parts, calibrated, [*said, *lacking])

    if cached is None:
        return make()
    assert rows is None or isinstance(rows, Tensor)
    factored = cached.factored(recipe, found, rows, open_ones, make)
    if recipe.stores and not factored.calibrated.stats.moments:
        # What is rounded is rounded in the metrics themselves.
        return replace(factored, calibrated=_calibrated(recipe, model, found, rows, run, cached)[0])
    return factored
