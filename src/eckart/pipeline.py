"""The main job: a model and a recipe in, a smaller model and a result out.

Stages are values: statistics -> decompositions -> choices -> modules.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import (
    accounting,
    assemble,
    closed,
    dimensions,
    heads,
    hub,
    kinds,
    losses,
    memory,
    mend,
    models,
    plugin,
    reading,
    readings,
    rebuild,
    routing,
    running,
    selection,
    sharing,
    splitting,
    stock,
    stores,
    storing,
    text,
)
from .accounting import sizes
from .calibrate import Calibrated
from .choices import Budget, Choice, fixed_bytes, settle
from .dimensions import Dimension
from .errors import ModelError
from .factorize import Decomposed, factor, statistics_of
from .heads import Heads
from .healing import Refined
from .linalg import check_matrix
from .models import Target
from .recipe import FLOAT, Recipe, to_yaml
from .result import Measured, Module, Quality, Result, Sizes
from .stages import Run, Watch, silent
from .windows import Rows, Windows

_DEPTH_WINDOWS = 2


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


def plan(recipe: Recipe, model: nn.Module, stored: torch.dtype) -> Plan:
    """Return the plan of `recipe` for `model`, which may be a skeleton on the meta device.

    Raises:
        ModelError: there is nothing in the model that can be treated, or a pattern matches nothing.
        RankError: the budget cannot be reached.
    """
    model = kinds.on_meta(model)
    splitting.unfold(model, recipe.split == "fused")
    found = targets_of(recipe, model)
    limit = limit_of(recipe, model, found, stored)
    decided_by_spectra = recipe.resolved_method().allocation == "curvature" or recipe.energy is not None
    suspected = dimensions.find(model, found)
    bases = _bases(recipe, model, found, suspected)
    choices = selection.unseen(recipe, limit, model, found, suspected, bases)
    exact = not decided_by_spectra and not recipe.stock and recipe.split == "none"
    return Plan(recipe, choices, models.parameter_count(model), exact)


def targets_of(recipe: Recipe, model: nn.Module) -> list[Target]:
    """Return the matrices that `recipe` treats, with those that it only stores."""
    found = models.targets(model, recipe.include, recipe.exclude)
    models.check_patterns([t.name for t in found], [override.match for override in recipe.overrides])
    stored = recipe.embeddings_storage != FLOAT
    return [*found, *models.ends(model, found, recipe.exclude)] if stored else found


def limit_of(recipe: Recipe, model: nn.Module, found: Sequence[Target], stored: torch.dtype) -> Budget:
    """Return what there is to spend on `found`."""
    itemsize = output_dtype(recipe, stored).itemsize
    attentions = dimensions.find(model, found) if _by_heads(recipe) else []
    fixed = fixed_bytes(
        model, found, recipe.resolved_method().low_rank, itemsize, attentions, itemised=recipe.stores
    )
    return settle(recipe, found, models.parameter_count(model), fixed, itemsize)


def output_dtype(recipe: Recipe, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of the output: the recipe's, or the source's."""
    return hub.dtype(recipe.dtype) if recipe.dtype else stored


@dataclass(frozen=True, slots=True)
class Prepared:
    """A dense model with everything that does not depend on the budget: it serves every budget."""

    loaded: hub.Loaded
    found: list[Target]
    decomposed: Decomposed
    before: Sizes
    texts: Windows
    dense: Measured | None
    dense_foreign: Measured | None
    calibrated: Calibrated
    run: Run


def prepare(
    recipe: Recipe, loaded: hub.Loaded, watch: Watch | None = None, material: Windows | None = None
) -> Prepared:
    """Measure the dense model, calibrate on it and decompose its matrices; it stays as it is.

    Args:
        recipe: what to do.
        loaded: the model.
        watch: called with (stage, done, total).
        material: what to run it on, and how its loss is measured; default: what the recipe names.

    Raises:
        EckartError: any of its subclasses.
    """
    model = loaded.model
    if models.low_rank_modules(model) or stores.stored(model):
        raise ModelError("the model is already low-rank or in few bits: eckart.densify it first")
    written = accounting.written_bytes(model, output_dtype(recipe, loaded.stored))
    run = Run(watch or silent)
    try:
        run.warnings.extend(splitting.unfold(model, recipe.split == "fused"))
        prepared = _prepared(recipe, loaded, run, material)
    except BaseException:
        kinds.fold(model)
        raise
    return replace(prepared, before=replace(prepared.before, bytes=written))


def _prepared(recipe: Recipe, loaded: hub.Loaded, run: Run, material: Windows | None) -> Prepared:
    """Prepare a model whose matrices are all nn.Linear."""
    model = loaded.model
    found = targets_of(recipe, model)
    for target in found:
        check_matrix(models.weight(model, target), target.name)
    suspected, limit = dimensions.find(model, found), limit_of(recipe, model, found, loaded.stored)
    bases = _bases(recipe, model, found, suspected)
    # An unreachable budget is refused now, not after the calibration.
    selection.unseen(recipe, limit, model, found, suspected, bases)
    texts = _material(recipe, loaded, run, material)
    narrowable = _dimensions(recipe, model, found, texts)
    selection.unseen(recipe, limit, model, found, narrowable, bases)
    attentions = _heads(recipe, model, found) if texts.is_text else []
    same = readings.find(model, found, running.outputs(model, texts)) if recipe.share_inputs else []
    dense = _measure(run, "measure dense", model, texts.held_out)
    dense_foreign = _measure(run, "measure dense", model, texts.foreign)
    with run.stage("calibrate") as progress:
        names = [name for target in found for name in target.modules]
        calibrated = statistics_of(recipe, model, names, texts.calibration, progress)
    run.warnings.extend(routing.fill(model, found, calibrated.stats))
    blocks: dict[str, float] = {}
    if recipe.depth and isinstance(texts.trial, Tensor):
        with run.stage("try blocks") as progress:
            blocks = rebuild.block_losses(model, found, texts.trial[:_DEPTH_WINDOWS], progress)
    with run.stage("factor") as progress:
        parts, lacking = factor(
            recipe, model, found, narrowable, attentions, calibrated, progress, bases, same
        )
        run.warnings.extend(lacking)
    before = sizes(model, found, output_dtype(recipe, loaded.stored))
    decomposed = Decomposed(parts, narrowable, attentions, blocks, bases, same)
    return Prepared(loaded, found, decomposed, before, texts, dense, dense_foreign, calibrated, run)


def _material(recipe: Recipe, loaded: hub.Loaded, run: Run, material: Windows | None) -> Windows:
    """Return what to run the dense model on, with what it gives where that is compared with later."""
    with run.stage("read data"):
        if material is None:
            recipe.check_text()
            material = reading.read(recipe, loaded, run.warnings)
        running.check(recipe, material, loaded.model)
        return running.remembered(loaded.model, material)


def _heads(recipe: Recipe, model: nn.Module, found: Sequence[Target]) -> list[Heads]:
    """Return the attentions whose heads may be made narrower one by one, each verified."""
    return heads.found(model, dimensions.find(model, found)) if _by_heads(recipe) else []


def _bases(
    recipe: Recipe, model: nn.Module, found: Sequence[Target], suspected: Sequence[Dimension]
) -> list[tuple[str, ...]]:
    if recipe.resolved_method().form != "shared":
        return []
    return sharing.bases(model, found, suspected, recipe.layers)


def _by_heads(recipe: Recipe) -> bool:
    """Tell whether heads may be made narrower: mixed does better with ranks, and no stock config says it."""
    return recipe.resolved_method().form == "width" and not recipe.stock


def _dimensions(recipe: Recipe, model: nn.Module, found: Sequence[Target], texts: Windows) -> list[Dimension]:
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
    dtype, texts = output_dtype(recipe, loaded.stored), prepared.texts
    anchored = recipe.resolved_method().target == "anchored"
    original = copy.deepcopy(loaded.model) if recipe.heal is not None or anchored else None
    model, found, modules, kept = _made(recipe, prepared)
    if anchored:
        _anchor(recipe, prepared, model, original)
    if recipe.stores:
        _store(recipe, prepared, model, kept)
    one_shot, foreign = None, None
    healing: tuple[Refined, ...] = ()
    if recipe.heal is not None:
        one_shot = _measure(run, "measure one shot", model, texts.held_out)
        foreign = _measure(run, "measure one shot", model, texts.foreign)
        healing = _healed(recipe, prepared, model, original, ward)
    # Weights are rounded to the output dtype, then measured in the dtype that this device computes in.
    with accounting.rounded(model, found, dtype) as after:
        compressed = _measure(run, "measure compressed", model, texts.held_out)
        elsewhere = _measure(run, "measure compressed", model, texts.foreign)
    modules = assemble.updated(modules, found, model)
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
    )


Kept = list[tuple[Choice, str]]
"""Each choice that is in the model, with the name that its matrix has there."""


def _made(recipe: Recipe, prepared: Prepared) -> tuple[Any, list[Target], list[Module], Kept]:
    """Choose, and put the modules into the model; return it, its targets and what became of them."""
    run, found, model = prepared.run, prepared.found, prepared.loaded.model
    dtype = output_dtype(recipe, prepared.loaded.stored)
    limit = limit_of(recipe, model, found, prepared.loaded.stored)
    with run.stage("choose") as progress:
        trial, decomposed = prepared.texts.trial, prepared.decomposed

        def tried(choices: Sequence[Choice]) -> Tensor:
            assert trial is not None
            return selection.trial_losses(model, decomposed, choices, trial)

        choices = selection.choose(
            recipe, limit, model, found, decomposed, None if trial is None else tried, progress
        )
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
    return model, left, modules, list(kept)


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


def _measure(run: Run, name: str, model: Any, rows: Rows | None) -> Measured | None:
    if rows is None:
        return None
    with run.stage(name) as progress:
        return running.quality(model, rows, progress)


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
