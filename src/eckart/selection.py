"""Which choices a recipe leads to: from estimates, and between forms by what windows of text say."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import assemble, budget, dimensions, measure, models, rebuild, stock
from .budget import Choice
from .dimensions import Dimension
from .errors import RankError
from .factorize import Decomposed
from .models import Target
from .recipe import Recipe

EXCHANGE_RATES = (0.5, 1.0, 1.5, 2.25, 1e3)
"""What estimates of low-rank MLP matrices are multiplied by, to be compared with those of widths."""


def unseen(
    recipe: Recipe,
    limit: budget.Budget,
    model: nn.Module,
    found: Sequence[Target],
    suspected: Sequence[Dimension],
) -> list[Choice]:
    """Return the choices before anything is known of the losses.

    Raises:
        RankError: the budget cannot be reached.
        ModelError: the model cannot be made narrower in a way that its config can say (stock).
    """
    blocks = dict.fromkeys(models.block_names(model)[1:], 1.0) if recipe.depth else {}
    if recipe.stock:
        return stock.choose(recipe, limit, model, found, suspected, blocks=blocks)
    try:
        return budget.choose(recipe, limit, found, suspected)
    except RankError:
        if recipe.resolved_method().allocation != "curvature":
            raise
    # Widths and blocks can go below what the same share of everything reaches.
    nothing = {target.name: torch.zeros(min(target.shape) + 1) for target in found}
    nothing |= {dimension.name: torch.zeros(dimension.units + 1) for dimension in suspected}
    return budget.choose(recipe, limit, found, suspected, nothing, blocks=blocks)


def dropped(decomposed: Decomposed, choices: Sequence[Choice]) -> list[str]:
    """Return the blocks that are left out."""
    gone = [choice.target.name for choice in choices if choice.form == "dropped"]
    return [block for block in decomposed.blocks if any(name.startswith(f"{block}.") for name in gone)]


def choose(
    recipe: Recipe,
    limit: budget.Budget,
    model: Any,
    targets: Sequence[Target],
    found: Decomposed,
    trial: Tensor | None,
    progress: measure.Progress,
) -> list[Choice]:
    """Return the choices; between low rank and width, by what the windows `trial` say of either.

    Estimates are of second order and per matrix. At equal estimates, MLPs at low rank lose more than
    narrow ones, by a factor that depends on the budget: several exchange rates are tried, and the one
    of the least loss is taken.

    Raises:
        RankError: the budget cannot be reached.
    """
    losses = found.losses()
    if recipe.stock:
        return stock.choose(recipe, limit, model, targets, found.dimensions, losses, found.blocks)

    def at(rate: float) -> list[Choice]:
        return budget.choose(
            recipe, limit, targets, found.dimensions, losses,
            heads=found.heads, exchange=rate, blocks=found.blocks,
        )  # fmt: skip

    method = recipe.resolved_method()
    alternatives = method.form == "mixed" and any(other.kind == "mlp" for other in found.dimensions)
    if not alternatives or method.allocation != "curvature" or trial is None:
        return at(1.0)
    tried: list[tuple[float, list[Choice]]] = []

    def loss(place: int) -> float:
        choices = at(EXCHANGE_RATES[place])
        known = next((value for value, other in tried if other == choices), None)
        tried.append((_trial_loss(model, found, choices, trial) if known is None else known, choices))
        progress(len(tried), len(EXCHANGE_RATES))
        return tried[-1][0]

    _downhill(loss, len(EXCHANGE_RATES))
    return min(tried, key=lambda pair: pair[0])[1]


def _downhill(loss: Callable[[int], float], count: int) -> None:
    """Call `loss` on neighbours of 0 .. count - 1 from the second on, as long as it falls."""
    place, best = 1, loss(1)
    step = 1
    while 0 <= place + step < count:
        value = loss(place + step)
        if value < best:
            place, best = place + step, value
        elif step == 1 and place == 1:
            step = -1
        else:
            return


def _trial_loss(model: Any, found: Decomposed, choices: Sequence[Choice], rows: Tensor) -> float:
    # Two factors compute what pivoted ones do, and are made faster.
    cheap = [replace(choice, form="factored") if choice.form == "pivoted" else choice for choice in choices]
    made = assemble.build_modules(model, cheap, found, model.dtype, lambda done, total: None)
    with dimensions.swapped(model, made), rebuild.skipped(model, dropped(found, choices)):
        return measure.perplexity(model, rows).loss
