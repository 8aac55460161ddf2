"""The main job: a model and a recipe in, a smaller model and a result out.

Stages are values: statistics -> decompositions -> choices -> modules.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from . import (
    accounting,
    assemble,
    closed,
    decomposing,
    dimensions,
    hub,
    kinds,
    losses,
    memory,
    mend,
    models,
    planning,
    plugin,
    reading,
    readings,
    rebuild,
    running,
    selection,
    splitting,
    stock,
    stores,
    storing,
    text,
    timekeeping,
)
from .accounting import sizes
from .cached import Cached
from .calibrate import Calibrated
from .choices import Budget, Choice
from .errors import ModelError
from .factorize import Decomposed
from .healing import Refined
from .latency import Timing
from .linalg import check_matrix
from .models import Target
from .recipe import Recipe, to_yaml
from .result import Measured, Module, Quality, Result, Sizes
from .shelf import Shelf
from .stages import Run, Watch, silent
from .timed import Timed
from .windows import Rows, Windows


@dataclass(slots=True)
class Known:
    """What finishing a recipe once found out, and is the same the next time: what was chosen and measured.

    Args:
        choices: for every matrix; None until they were made.
        measured: on the held-out and on the foreign text; None until they were, and after healing.
    """

    choices: list[Choice] | None = None
    measured: tuple[Measured | None, Measured | None] | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A dense model with everything that does not depend on the budget: it serves every budget.

    `known` remembers, by recipe, what `finish` found out.
    """

    loaded: hub.Loaded
    found: list[Target]
    decomposed: Decomposed
    before: Sizes
    texts: Windows
    dense: Measured | None
    dense_foreign: Measured | None
    calibrated: Calibrated
    run: Run
    timed: Timed | None = None
    measured: float | None = None
    known: dict[Recipe, Known] = field(default_factory=dict)


def prepare(
    recipe: Recipe,
    loaded: hub.Loaded,
    watch: Watch | None = None,
    material: Windows | None = None,
    shelf: Shelf | None = None,
) -> Prepared:
    """Measure the dense model, calibrate on it and decompose its matrices; it stays as it is.

    Args:
        recipe: what to do.
        loaded: the model.
        watch: called with (stage, done, total).
        material: what to run it on, and how its loss is measured; default: what the recipe names.
        shelf: the cache, from which a causal language model on text takes what was made before; to the
            bit, the result is the same.

    Raises:
        EckartError: any of its subclasses.
    """
    model = loaded.model
    if models.low_rank_modules(model) or stores.stored(model):
        raise ModelError("the model is already low-rank or in few bits: eckart.densify it first")
    written = accounting.written_bytes(model, planning.output_dtype(recipe, loaded.stored))
    run = Run(watch or silent)
    try:
        run.warnings.extend(splitting.unfold(model, recipe.split == "fused"))
        prepared = _prepared(recipe, loaded, run, material, shelf)
    except BaseException:
        kinds.fold(model)
        raise
    return replace(prepared, before=replace(prepared.before, bytes=written))


def _prepared(
    recipe: Recipe, loaded: hub.Loaded, run: Run, material: Windows | None, shelf: Shelf | None
) -> Prepared:
    """Prepare a model whose matrices are all nn.Linear."""
    model = loaded.model
    found = planning.targets_of(recipe, model)
    for target in found:
        check_matrix(models.weight(model, target), target.name)
    dtype = planning.output_dtype(recipe, loaded.stored)
    timed = planning.times_of(recipe, model, found, loaded.stored, run.watch)
    limit = planning.limit_of(recipe, model, found, loaded.stored, timed)
    suspected = dimensions.find(model, found)
    bases = planning.bases_of(recipe, model, found, suspected)
    # An unreachable budget is refused now, not after the calibration.
    selection.unseen(recipe, limit, model, found, suspected, bases)
    texts = _material(recipe, loaded, run, material)
    narrowable = planning.dimensions_of(recipe, model, found, texts)
    selection.unseen(recipe, limit, model, found, narrowable, bases)
    attentions = planning.heads_of(recipe, model, found) if texts.is_text else []
    same = readings.find(model, found, running.outputs(model, texts)) if recipe.share_inputs else []
    cached = None
    if shelf is not None and texts.is_text:
        with run.stage("look into cache"):
            cached = Cached.of(shelf, model, loaded.source, run.warnings)
    dense = decomposing.measure_dense(run, model, texts.held_out, cached)
    dense_foreign = decomposing.measure_dense(run, model, texts.foreign, cached)
    open_ones = Decomposed({}, narrowable, attentions, {}, bases, same)
    blocks = decomposing.block_losses(recipe, model, found, texts, run, cached)
    factored = decomposing.factored(recipe, model, found, open_ones, texts, run, cached)
    run.warnings.extend(factored.warnings)
    before = sizes(model, found, dtype)
    decomposed = replace(open_ones, parts=factored.parts, blocks=blocks)
    passed = timekeeping.measured(timed, model, found, run)
    return Prepared(
        loaded,
        found,
        decomposed,
        before,
        texts,
        dense,
        dense_foreign,
        factored.calibrated,
        run,
        timed,
        passed,
    )


def _material(recipe: Recipe, loaded: hub.Loaded, run: Run, material: Windows | None) -> Windows:
    """Return what to run the dense model on, with what it gives where that is compared with later."""
    with run.stage("read data"):
        if material is None:
            recipe.check_text()
            material = reading.read(recipe, loaded, run.warnings)
        running.check(recipe, material, loaded.model)
        return running.remembered(loaded.model, material)


def finish(recipe: Recipe, prepared: Prepared, ward: mend.Ward | None = None) -> tuple[Any, Result]:
    """Choose ranks and widths for the budget of `recipe`, put the modules into the model and measure it.

    The model is the one that was prepared, changed in place; one with fewer blocks, or a stock model,
    is a new one. It ends in the output dtype. `recipe` may differ from the one that was prepared in its
    budget, allocation, overrides and dtype, in its form where that needs no other decompositions, and in
    how it heals. `ward` says where healing keeps its state.

    Raises:
        RankError: the budget cannot be reached.
        NotFinite: a factor does not fit the output dtype, or the model's logits are not finite.
    """
    loaded, run = prepared.loaded, prepared.run
    dtype, texts = planning.output_dtype(recipe, loaded.stored), prepared.texts
    anchored = recipe.resolved_method().target == "anchored"
    original = copy.deepcopy(loaded.model) if recipe.heal is not None or anchored else None
    known = prepared.known.setdefault(recipe, Known())
    model, found, modules, kept, timing = _made(recipe, prepared, known)
    if anchored:
        _anchor(recipe, prepared, model, original)
    if recipe.stores:
        _store(recipe, prepared, model, kept)
    one_shot, foreign = None, None
    healing: tuple[Refined, ...] = ()
    if recipe.heal is not None:
        one_shot = decomposing.measured(run, "measure one shot", model, texts.held_out)
        foreign = decomposing.measured(run, "measure one shot", model, texts.foreign)
        healing = _healed(recipe, prepared, model, original, ward)
    # Weights are rounded to the output dtype, then measured in the dtype that this device computes in.
    with accounting.rounded(model, found, dtype) as after:
        compressed, elsewhere = _measured(recipe, prepared, known, model)
    modules = assemble.updated(modules, found, model)
    timing = timekeeping.with_measured(timing, prepared.measured, model, found, run)
    plugin.mark(kinds.fold(model))
    after = replace(after, bytes=accounting.written_bytes(model, dtype))
    predicted = sum(module.loss for module in modules)
    return model, Result(
        recipe=recipe,
        source=loaded.source,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        modules=modules,
        before=prepared.before,
        after=after,
        source_bytes=loaded.bytes,
        dense=prepared.dense,
        compressed=compressed,
        held_out=texts.own_text,
        predicted_increase=predicted if recipe.resolved_method().outputs == "gradient" else None,
        calibration_tokens=prepared.calibrated.tokens,
        calibration_unit=running.unit(texts),
        task=loaded.task,
        gradient_tokens=prepared.calibrated.gradient_tokens,
        seconds=dict(run.seconds),
        peak_memory=memory.peak_bytes(losses.device_of(model)),
        warnings=list(run.warnings),
        one_shot=one_shot,
        foreign=Quality.of(prepared.dense_foreign, foreign, elsewhere),
        healing=healing,
        timing=timing,
    )


def _measured(
    recipe: Recipe, prepared: Prepared, known: Known, model: Any
) -> tuple[Measured | None, Measured | None]:
    """Measure the finished model on its texts, unless an equal one was."""
    run, texts = prepared.run, prepared.texts
    if known.measured is not None:
        return known.measured
    compressed = decomposing.measured(run, "measure compressed", model, texts.held_out)
    elsewhere = decomposing.measured(run, "measure compressed", model, texts.foreign)
    if recipe.heal is None:  # learning need not come to the same bits again
        known.measured = compressed, elsewhere
    return compressed, elsewhere


Kept = list[tuple[Choice, str]]
"""Each choice that is in the model, with the name that its matrix has there."""


def _made(
    recipe: Recipe, prepared: Prepared, known: Known
) -> tuple[Any, list[Target], list[Module], Kept, Timing | None]:
    """Choose, and put the modules into the model; return it, its targets and what became of them."""
    run, found, model = prepared.run, prepared.found, prepared.loaded.model
    stored = prepared.loaded.stored
    dtype = planning.output_dtype(recipe, stored)
    timed = planning.times_of(recipe, model, found, stored, run.watch, prepared.timed)
    limit = planning.limit_of(recipe, model, found, stored, timed)
    if known.choices is None:
        known.choices = _chosen(recipe, prepared, limit)
    choices = known.choices
    with run.stage("replace") as progress:
        made = assemble.build_modules(model, choices, prepared.decomposed, dtype, progress)
        assemble.put(model, made)
        modules = assemble.rows(choices, prepared.decomposed)
    dropped = selection.dropped(prepared.decomposed, choices)
    if recipe.stock:
        model = stock.build(model, choices, prepared.decomposed.dimensions, dropped)
    elif dropped:
        model = rebuild.without_blocks(model, dropped)
    plugin.mark(model)
    left = rebuild.moved(found, prepared.loaded.model, dropped)
    names = [target.name for target in left]
    kept = zip([choice for choice in choices if choice.form != "dropped"], names, strict=True)
    timing = None if timed is None else timed.timing(recipe.resolved_objective, found, choices)
    return model, left, modules, list(kept), timing


def _chosen(recipe: Recipe, prepared: Prepared, limit: Budget) -> list[Choice]:
    """Return the choices for the recipe's budget, between forms by windows of text where there are some."""
    model, found, decomposed = prepared.loaded.model, prepared.found, prepared.decomposed
    trial = prepared.texts.trial

    def tried(choices: Sequence[Choice]) -> Tensor:
        assert trial is not None
        return selection.trial_losses(model, decomposed, choices, trial)

    with prepared.run.stage("choose") as progress:
        return selection.choose(
            recipe, limit, model, found, decomposed, None if trial is None else tried, progress
        )


def _store(recipe: Recipe, prepared: Prepared, model: Any, kept: Kept) -> None:
    """Round what is to be stored in few bits."""
    with prepared.run.stage("round") as progress:
        calibrated, rows = prepared.calibrated, prepared.texts.calibration
        storing.store(recipe, model, kept, prepared.decomposed, calibrated, rows, progress)
    plugin.mark(model)


def _anchor(recipe: Recipe, prepared: Prepared, model: Any, original: Any) -> None:
    """Solve again for every map, on the inputs that it now sees, for the outputs that there were."""
    assert isinstance(prepared.texts.calibration, Tensor)
    with prepared.run.stage("anchor") as progress:
        metrics = closed.Metrics({})
        rows = prepared.texts.calibration
        closed.refit(model, original, rows, 1.0, metrics=metrics, damp=recipe.damp, watch=progress)


def _healed(
    recipe: Recipe, prepared: Prepared, model: Any, original: Any, ward: mend.Ward | None
) -> tuple[Refined, ...]:
    """Bring `model`, in place, closer to the `original`."""
    assert recipe.heal is not None
    healing = recipe.heal if recipe.heal.text else replace(recipe.heal, text=recipe.text)
    found = mend.run(
        model, original, prepared.loaded.tokenizer, healing,
        bos=recipe.bos,
        # The end of the text is measured on where there is no other text for that.
        spare=text.HELD_OUT if prepared.texts.own_text else 0.0,
        started=(to_yaml(recipe), _digest(prepared.texts.calibration)),
        ward=ward,
        watch=prepared.run.watch,
    )  # fmt: skip
    for step in found:
        prepared.run.seconds[f"heal: {step.step}"] = step.seconds
    return tuple(found)


def _digest(rows: Rows | None) -> str:
    return mend.hash_of(rows.tolist() if isinstance(rows, Tensor) else None)


def load_for(recipe: Recipe, low_rank: bool = False) -> hub.Loaded:
    """Load the model that `recipe` names, to compute on its device.

    Raises:
        ModelError: the recipe names none, or it cannot be loaded.
    """
    if recipe.model is None:
        raise ModelError("the recipe names no model: give a hub id, a folder or a .gguf file")
    return hub.load(
        recipe.model,
        place=hub.device(recipe.device),
        trust_remote_code=recipe.trust_remote_code,
        low_rank=low_rank,
        task=recipe.task,
    )
