"""Loss against size, before anything is compressed."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import kinds, pipeline, planning, points, recipe
from .api import Sources, loaded, loaded_for, sources
from .curves import BudgetCurve, Point, Use, completed
from .errors import ConfigError
from .measure import Perplexity
from .methods import Shape
from .pipeline import Prepared
from .points import Expected
from .recipe import Of, Recipe
from .result import Result
from .shelf import Shelf, default_folder
from .stages import Watch, silent

Cache = str | Path | bool | None
"""A folder, True for that of the user, False or None for no cache."""


def shelf_of(cache: Cache, writes: bool = True) -> Shelf | None:
    """Return the cache that `cache` names."""
    if cache is None or cache is False:
        return None
    return Shelf(default_folder() if cache is True else Path(cache), writes)


def evenly(count: int, least: float = 0.3) -> tuple[float, ...]:
    """Return `count` keeps from 1 down to `least`, evenly spread.

    Raises:
        ConfigError: fewer than two, or `least` is not in (0, 1).
    """
    if count < 2 or not 0 < least < 1:
        raise ConfigError(f"{count} points from keep 1 to {least}: give at least 2, and a keep in (0, 1)")
    return tuple(round(1 - (1 - least) * place / (count - 1), 4) for place in range(count))


def curve(
    model: Any,
    *,
    text: Sources | None = None,
    keeps: Sequence[float] = points.KEEPS,
    measure: Sequence[float] = (),
    of: Of | None = None,
    method: str | None = None,
    form: Shape | None = None,
    storage: str | None = None,
    embeddings: str | None = None,
    stock: bool | None = None,
    depth: bool | None = None,
    eval_text: Sources | None = None,
    include: Sources | None = None,
    exclude: Sources | None = None,
    tokens: int | None = None,
    gradient_tokens: int | None = None,
    seq_len: int | None = None,
    eval_tokens: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool | None = None,
    cache: Cache = True,
    recipe: Recipe | None = None,
    tokenizer: Any = None,
    watch: Watch | None = None,
) -> BudgetCurve:
    """Return the loss that a model is predicted to have at every size, and what it has at some.

    One calibration and one decomposition serve all sizes. Where a model is measured it is made as by
    `compress`, on a copy. Predictions are sums of tails of spectra in the unit of the loss (terms between
    tokens and between modules are left out, so they are too low where much is cut off), at equal rates of
    low rank and width; the correction through the measured points is in eckart.prediction.

    Args:
        model: a hub id, a folder, a .gguf file, or a model, which stays as it is.
        text: to calibrate on, and where there is no `eval_text`, its last 5 % to measure on.
        keeps: where to predict, in (0, 1]; those that cannot be reached are left out, with a warning.
        measure: keeps at which a model is made and measured as well.
        cache: a folder for statistics and decompositions, from which later curves, sweeps and compressions
            start at once; True: that of the user (eckart.shelf.default_folder); False: none. Causal language
            models on text only.
        recipe: where the other arguments start from, but for its budget; those that are given go over it.
            They are explained in eckart.recipe.Recipe.
        tokenizer: for a model given as an object, to read text with.
        watch: called with (stage, done, total).

    Raises:
        ConfigError: an argument is not legal, or points are to be measured and there is no text.
        ModelError: the model cannot be loaded or treated.
        NotFinite: a weight, a statistic or a logit is NaN or infinite.
    """
    by_name = isinstance(model, (str, Path))
    given = {
        "model": str(model) if by_name else None, "of": of, "method": method, "form": form,
        "storage": storage, "embeddings": embeddings, "stock": stock, "depth": depth,
        "text": sources(text), "eval_text": sources(eval_text), "include": sources(include),
        "exclude": sources(exclude), "tokens": tokens, "gradient_tokens": gradient_tokens,
        "seq_len": seq_len, "eval_tokens": eval_tokens, "seed": seed, "dtype": dtype, "device": device,
        "trust_remote_code": trust_remote_code, "keep": 1.0,
    }  # fmt: skip
    resolved = _resolved(recipe, given)
    shelf = shelf_of(cache)
    return _of_model(resolved, None if by_name else model, tokenizer, keeps, measure, shelf, watch or silent)


def _of_model(
    resolved: Recipe,
    model: Any,
    tokenizer: Any,
    keeps: Sequence[float],
    measure: Sequence[float],
    shelf: Shelf | None,
    watch: Watch,
) -> BudgetCurve:
    """Load the model unless it is given, prepare it, and leave it as it was."""
    wrong = [keep for keep in (*keeps, *measure) if not 0 < keep <= 1]
    if wrong:
        raise ConfigError(f"keep {wrong[0]:g}: must lie in (0, 1]")
    if measure and not (resolved.text or resolved.eval_text):
        raise ConfigError("points are measured on text: give text or eval_text, or measure none")
    resolved.check_text()
    started = time.perf_counter()
    watch("load", 0, 1)
    known = loaded_for(resolved) if model is None else loaded(model, tokenizer, None, None, False)
    loading = time.perf_counter() - started
    prepared = pipeline.prepare(resolved, known, watch, shelf=shelf)
    prepared.run.seconds["load"] = loading
    try:
        return _curve(resolved, prepared, keeps, measure, shelf, watch)
    finally:
        kinds.fold(known.model)


def _resolved(base: Recipe | None, given: dict[str, Any]) -> Recipe:
    start = {} if base is None else {name: getattr(base, name) for name in Recipe.__dataclass_fields__}
    found = recipe.from_mapping(recipe.override(start, given), "curve")
    return replace(found, heal=None)


def _curve(
    resolved: Recipe,
    prepared: Prepared,
    keeps: Sequence[float],
    measure: Sequence[float],
    shelf: Shelf | None,
    watch: Watch,
) -> BudgetCurve:
    dense = points.check_measurable(prepared) if measure else prepared.dense
    found = _points(resolved, prepared, keeps, measure, watch)
    own = dense if isinstance(dense, Perplexity) else None
    rows, correction = completed(found, own)
    run, method = prepared.run, resolved.resolved_method()
    run.seconds["measure points"] = sum(row.seconds or 0.0 for row in rows)
    return BudgetCurve(
        source=prepared.loaded.source,
        architecture=type(prepared.loaded.model).__name__,
        method=resolved.method,
        form=method.form,
        allocation=method.allocation,
        storage=resolved.matrices_storage,
        of=resolved.of,
        dtype=str(planning.output_dtype(resolved, prepared.loaded.stored)).removeprefix("torch."),
        parameters=prepared.before.model,
        bytes=prepared.before.bytes,
        dense=own,
        held_out=prepared.texts.own_text,
        rows=rows,
        correction=correction,
        calibration_tokens=prepared.calibrated.tokens,
        gradient_tokens=prepared.calibrated.gradient_tokens,
        cache=use_of(shelf),
        seconds={name: value for name, value in run.seconds.items() if value},
        warnings=tuple(run.warnings),
    )


def _points(
    resolved: Recipe, prepared: Prepared, keeps: Sequence[float], measure: Sequence[float], watch: Watch
) -> list[Point]:
    """Predict at all keeps that can be reached, and measure at some."""
    run = prepared.run
    with run.stage("predict"):
        expected = points.curve(resolved, prepared, [*keeps, *measure], watch)
    beyond = sorted({*keeps, *measure} - {one.keep for one in expected}, reverse=True)
    if beyond:
        run.warnings.append(f"keep {', '.join(f'{keep:g}' for keep in beyond)} cannot be reached: left out")
    found = []
    for one in expected:
        start, result = time.perf_counter(), None
        if one.keep in measure:
            result = points.measure(points.at_keep(resolved, one.keep), prepared, watch)
        found.append(_point(one, result, time.perf_counter() - start))
    return found


def _point(one: Expected, result: Result | None, seconds: float) -> Point:
    made = Point(one.keep, one.keep_linears, one.keep_model, one.parameters, one.bytes, one.increase)
    if result is None:
        return made
    assert isinstance(result.compressed, Perplexity)
    return replace(
        made,
        keep_linears=result.keep_linears,
        keep_model=result.keep_model,
        parameters=result.after.model,
        bytes=result.after.bytes,
        measured_increase=points.increase(result),
        measured_perplexity=result.compressed.perplexity,
        seconds=seconds,
    )


def use_of(shelf: Shelf | None) -> Use | None:
    """Return what the cache did, None without one."""
    return None if shelf is None else Use(str(shelf.folder), shelf.bytes(), dict(shelf.used))
