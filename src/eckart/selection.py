"""Which choices a recipe leads to: from estimates, and between forms by what windows of text say."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import assemble, budget, dimensions, losses, measure, models, rebuild, running, stock
from .choices import Budget, Choice
from .dimensions import Dimension
from .errors import RankError
from .factorize import Decomposed
from .menus import Estimates
from .models import Target
from .recipe import Recipe
from .windows import Rows

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
    tried: Callable[[Sequence[Choice]], Tensor] | None,
    progress: measure.Progress,
) -> list[Choice]:
    """Return the choices; between low rank and width, by the losses of windows that `tried` gives for either.

    Estimates are of second order and per matrix. At equal estimates, which of the two loses less depends
    on the budget: exchange rates are tried from low rank alone upwards, as long as the next one is
    better by more than the standard error.

    Raises:
        RankError: the budget cannot be reached.
    """
    if recipe.stock:
        return stock.choose(recipe, limit, model, targets, found.dimensions, found.losses(), found.blocks)
    rates = exchange_rates(recipe, found)
    if len(rates) == 1 or tried is None:
        return at_rate(recipe, limit, targets, found, 1.0)
    best = at_rate(recipe, limit, targets, found, rates[0])
    least = tried(best)
    for done, rate in enumerate(rates[1:], 1):
        progress(done, len(rates))
        choices = at_rate(recipe, limit, targets, found, rate)
        if choices == best:
            continue
        losses_there = tried(choices)
        if not measure.lower(losses_there, least):
            break
        best, least = choices, losses_there
    return best


def exchange_rates(recipe: Recipe, found: Decomposed) -> tuple[float, ...]:
    """Return the exchange rates to try: one where there is nothing to choose between."""
    method = recipe.resolved_method()
    alternatives = method.form == "mixed" and any(other.kind == "mlp" for other in found.dimensions)
    return (
        EXCHANGE_RATES if alternatives and method.allocation == "curvature" and not recipe.stock else (1.0,)
    )


def at_rate(
    recipe: Recipe, limit: Budget, targets: Sequence[Target], found: Decomposed, rate: float
) -> list[Choice]:
    """Return the choices at one exchange rate between the estimates of low rank and those of widths."""
    return budget.choose(
        recipe, limit, targets, found.dimensions, Estimates(found.losses(), found.noises()),
        heads=found.heads, exchange=rate, blocks=found.blocks, bases=found.bases,
        readings=found.readings,
    )  # fmt: skip


def cheapened(choices: Sequence[Choice]) -> list[Choice]:
    """Return what computes the same as `choices` and is made faster: two factors instead of pivoted ones."""
    return [replace(choice, form="factored") if choice.form == "pivoted" else choice for choice in choices]


def trial_losses(model: Any, found: Decomposed, choices: Sequence[Choice], rows: Rows) -> Tensor:
    """Return the loss on each of the windows, or batches, that `model` would have with `choices` (k,)."""
    dtype = losses.dtype_of(model)
    made = assemble.build_modules(model, cheapened(choices), found, dtype, lambda done, total: None)
    with dimensions.swapped(model, made), rebuild.skipped(model, dropped(found, choices)):
        return running.losses_of(model, rows)
