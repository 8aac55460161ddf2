"""Which choices a recipe leads to: from estimates, and between forms by what windows of text say."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import assemble, budget, dimensions, measure, models, rebuild, stock
from .choices import Budget, Choice
from .dimensions import Dimension
from .errors import RankError
from .factorize import Decomposed
from .menus import Estimates
from .models import Target
from .recipe import Recipe

EXCHANGE_RATES = (1e-3, 1.0, 1.5, 1e3)
"""What estimates of low-rank MLP matrices are multiplied by, to be compared with those of widths.

The first and the last take one form alone.
"""


def unseen(
    recipe: Recipe,
    limit: Budget,
    model: nn.Module,
    found: Sequence[Target],
    suspected: Sequence[Dimension],
    bases: Sequence[tuple[str, ...]] = (),
) -> list[Choice]:
    """Return the choices before anything is known of the losses.

    Raises:
        RankError: the budget cannot be reached.
        ModelError: the model cannot be made narrower in a way that its config can say (stock).
    """
    blocks = dict.fromkeys(rebuild.whole_blocks(model, found)[1:], 1.0) if recipe.depth else {}
    if recipe.stock:
        return stock.choose(recipe, limit, model, found, suspected, blocks=blocks)
    try:
        return budget.choose(recipe, limit, found, suspected, bases=bases)
    except RankError:
        if recipe.resolved_method().allocation != "curvature":
            raise
    # Widths and blocks can go below what the same share of everything reaches.
    nothing = {target.name: torch.zeros(min(target.shape) + 1) for target in found}
    nothing |= {dimension.name: torch.zeros(dimension.units + 1) for dimension in suspected}
    return budget.choose(recipe, limit, found, suspected, Estimates(nothing), blocks=blocks)


def dropped(decomposed: Decomposed, choices: Sequence[Choice]) -> list[str]:
    """Return the blocks that are left out."""
    names = [choice.target.name for choice in choices if choice.form == "dropped"]
    gone = {models.owner(name, decomposed.blocks) for name in names}
    return [block for block in decomposed.blocks if block in gone]


def choose(
    recipe: Recipe,
    limit: Budget,
    model: Any,
    targets: Sequence[Target],
    found: Decomposed,
    trial: Tensor | None,
    progress: measure.Progress,
) -> list[Choice]:
    """Return the choices; between low rank and width, by what the windows `trial` say of either.

    Estimates are of second order and per matrix. At equal estimates, which of the two loses less depends
    on the budget: exchange rates are tried from low rank alone upwards, as long as the next one is
    better by more than the standard error.

    Raises:
        RankError: the budget cannot be reached.
    """
    estimates = Estimates(found.losses(), found.noises())
    if recipe.stock:
        return stock.choose(recipe, limit, model, targets, found.dimensions, estimates.losses, found.blocks)

    def at(rate: float) -> list[Choice]:
        return budget.choose(
            recipe, limit, targets, found.dimensions, estimates,
            heads=found.heads, exchange=rate, blocks=found.blocks, bases=found.bases,
        )  # fmt: skip

    method = recipe.resolved_method()
    alternatives = method.form == "mixed" and any(other.kind == "mlp" for other in found.dimensions)
    if not alternatives or method.allocation != "curvature" or trial is None:
        return at(1.0)
    best = at(EXCHANGE_RATES[0])
    least = _trial_losses(model, found, best, trial)
    for done, rate in enumerate(EXCHANGE_RATES[1:], 1):
        progress(done, len(EXCHANGE_RATES))
        choices = at(rate)
        if choices == best:
            continue
        losses_there = _trial_losses(model, found, choices, trial)
        if not measure.lower(losses_there, least):
            break
        best, least = choices, losses_there
    return best


def _trial_losses(model: Any, found: Decomposed, choices: Sequence[Choice], rows: Tensor) -> Tensor:
    # Two factors compute what pivoted ones do, and are made faster.
    cheap = [replace(choice, form="factored") if choice.form == "pivoted" else choice for choice in choices]
    made = assemble.build_modules(model, cheap, found, model.dtype, lambda done, total: None)
    with dimensions.swapped(model, made), rebuild.skipped(model, dropped(found, choices)):
        return measure.window_losses(model, rows)
