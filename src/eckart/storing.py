"""Round what was chosen to few bits, in the metric of the calibration, and put it into the model."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from . import correcting, dimensions, stores
from .calibrate import Calibrated
from .choices import Choice
from .embeddings import FactoredEmbedding
from .errors import ModelError
from .factorize import Decomposed, matrix_metrics, statistics_of
from .linalg import Metric
from .quant import leaves, rounding, storage, tables
from .recipe import FLOAT, Recipe
from .windows import Rows

Metrics = tuple[Metric, Metric]
_SHARED = 4


def store(
    recipe: Recipe,
    model: nn.Module,
    kept: Sequence[tuple[Choice, str]],
    found: Decomposed,
    calibrated: Calibrated,
    rows: Rows | None,
    progress: Callable[[int, int], None],
) -> None:
    """Store the matrices of `model`, in place, as chosen.

    Args:
        recipe: method and damping of the metrics.
        model: with its low-rank modules in place.
        kept: each choice with the name that its matrix has in `model`.
        found: what the choices were made of.
        calibrated: the statistics of the dense model.
        rows: windows of text, for modules of which these say nothing.
        progress: called with (done, total).
    """
    wanted = [(choice, name) for choice, name in kept if choice.storage != FLOAT]
    if recipe.correction is not None:
        whole = [
            correcting.Whole(choice.target, name, choice.storage)
            for choice, name in wanted
            if choice.form == "dense" and choice.target.ranked and not choice.target.embedding
        ]
        check_corrected(recipe, whole)
        correcting.correct(recipe, model, whole, calibrated, progress)
        done_with = {one.name for one in whole}
        wanted = [(choice, name) for choice, name in wanted if name not in done_with]
    changed = [name for choice, name in wanted if choice.form == "partial"]
    # What has another shape than its dense matrix sees other inputs and gradients than that did.
    own = statistics_of(recipe, model, changed, rows if changed else None)
    members = {name: dimension for dimension in found.dimensions for name in dimension.members}
    shared: dict[str, Metric] = {}
    for done, (choice, name) in enumerate(wanted, 1):
        if len(shared) > _SHARED:  # matrices that read one input stand together
            shared.clear()
        if choice.form == "partial":
            metrics = matrix_metrics(recipe, replace(choice.target, name=name), own, {})
        else:
            metrics = matrix_metrics(recipe, choice.target, calibrated, shared)
        if choice.form == "narrow":
            dimension = members[choice.target.name]
            units = found.parts[dimension.name].narrowing.units(choice.rank)
            metrics = _narrowed(metrics, dimension, choice, units)
        if choice.target.embedding:
            metrics = metrics[::-1]
        round_module(model, name, choice.storage, *metrics)
        progress(done, len(wanted))


def check_corrected(recipe: Recipe, whole: Sequence[correcting.Whole]) -> None:
    """Raise ModelError where there is nothing to correct."""
    if not whole:
        raise ModelError(
            f"correction {recipe.correction!r} is for matrices that are whole and stored in few bits, and "
            "the model has none in its blocks: leave out the correction, or take the dense model"
        )


def round_module(model: nn.Module, name: str, stored: str, inputs: Metric, outputs: Metric) -> None:
    """Store what the module `name` of `model` is made of, in place.

    Args:
        model: the model.
        name: of a low-rank module, an nn.Linear, or an embedding (v, d), factored or not.
        stored: the name of the storage.
        inputs: H (n, n), of an embedding table the metric (d, d) of its rows.
        outputs: C (m, m), of an embedding table the weights (v,) of its tokens.
    """
    kind, module = storage.get(stored), model.get_submodule(name)
    if type(module) in (nn.Linear, nn.Embedding) and (outputs.moment is None or outputs.moment.ndim == 1):
        # Rows are independent of one another, and may be as many as there are tokens.
        weight = module.get_parameter("weight").detach()
        grid = kind.grid(weight)
        codes = rounding.compensated(weight, grid, inputs.moment, order=True)
        stores.store(model, name, kind, codes, grid)
        return
    if isinstance(module, FactoredEmbedding):
        both = tables.quantise(module, kind, inputs.moment, outputs.moment)
        for part, rounded in zip(("codes", "up"), both, strict=True):
            stores.store(model, f"{name}.{part}", kind, rounded.codes, rounded.grid)
        return
    kinds = dict.fromkeys(leaves.leaves(module), kind)
    for part, found in leaves.quantise(module, kinds, inputs.moment, outputs.moment).items():
        whole = f"{name}.{part}" if part else name
        stores.store(model, whole, kind, found.codes, found.grid)
        if found.bias is not None:
            model.get_submodule(whole).bias = nn.Parameter(found.bias)


def _narrowed(metrics: Metrics, dimension: dimensions.Dimension, choice: Choice, units: Tensor) -> Metrics:
    """Return the metrics of what is left of a matrix that lost rows or columns."""
    inputs, outputs = metrics
    if choice.side == "columns":
        return inputs.part(dimensions.indices(inputs.size, dimension.units, 1, units)), outputs
    copies = dict(dimension.writers)[choice.target.name]
    return inputs, outputs.part(dimensions.indices(outputs.size, dimension.units, copies, units))
