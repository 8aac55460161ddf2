"""From a recipe's budget to one rank per matrix, and what that makes of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from . import menus, models
from .choices import Budget, Choice, Options, dense, narrow
from .dimensions import Dimension
from .factors import Side
from .heads import Heads
from .menus import Estimates, Kitchen
from .models import Target
from .ranks import Energy, Fixed, Keep, allocate, by_energy, legal_widths, uniform
from .readings import Reading
from .recipe import Recipe

Rule = Fixed | Keep | Energy | None
_SHARES = 200
"""How finely a share of every matrix is looked for that fits a number of bytes."""


def _fixed(recipe: Recipe, target: Target) -> tuple[bool, Rule]:
    """Tell whether an override decides about `target`, and by which rule (None: dense)."""
    place = models.match_one(target.name, [override.match for override in recipe.overrides])
    return (False, None) if place is None else (True, recipe.overrides[place].rule())


def _apply(recipe: Recipe, rule: Rule, target: Target, losses: Tensor | None, stored: str) -> Choice:
    form = target.form(menus.form_in(stored, recipe.resolved_method().low_rank))
    if rule is None or form is None:
        return dense(target, stored)
    if not isinstance(rule, Energy):
        rank = uniform(rule, form, target.shape, recipe.step())
    else:
        rank = None if losses is None else by_energy(rule, form, target.shape, losses, recipe.step())
    return dense(target, stored) if rank is None else Choice(target, form, rank, storage=stored)


def _widest(recipe: Recipe, target: Target) -> str:
    """Return the first storage that `target` may have: for `auto` that of the output."""
    return menus.storages(recipe, target)[0]


def choose(
    recipe: Recipe,
    budget: Budget,
    targets: Sequence[Target],
    dimensions: Sequence[Dimension] = (),
    estimates: Estimates | None = None,
    *,
    heads: Sequence[Heads] = (),
    exchange: float = 1.0,
    blocks: Mapping[str, float] | None = None,
    bases: Sequence[tuple[str, ...]] = (),
    readings: Sequence[Reading] = (),
) -> list[Choice]:
    """Return what becomes of every target, in order, within `budget`.

    Args:
        recipe: rules, overrides, form, allocation, multiple.
        budget: from `settle`.
        targets: the treated matrices.
        dimensions: what may be made narrower, where the recipe's form says so.
        estimates: per name of a target (a dimension) the estimated loss of every rank (width). None (a dry
            run) gives the ranks of uniform allocation wherever spectra would decide.
        heads: of those dimensions, what may be made narrower head by head.
        exchange: what the estimates of low-rank MLP matrices are multiplied by to be compared with those
            of widths; below 1, those of widths are divided by it.
        blocks: what it costs to leave out each of these blocks.
        bases: names of the matrices that share a right factor.
        readings: matrices of one input that may have a common right factor.

    Raises:
        RankError: the budget cannot be reached.
    """
    if budget.then is not None:
        first = choose(
            recipe, replace(budget, then=None), targets, dimensions, estimates,
            heads=heads, exchange=exchange, blocks=blocks, bases=bases,
        )  # fmt: skip
        budget = budget.then(first)
    method = recipe.resolved_method()
    losses = {} if estimates is None else estimates.losses
    decided: dict[str, Choice] = {}
    for target in targets:
        own, rule = _fixed(recipe, target)
        if own or budget.limit is None:
            rule = rule if own else recipe.rule()
            stored = _widest(recipe, target)
            decided[target.name] = _apply(recipe, rule, target, losses.get(target.name), stored)
    free = [target for target in targets if target.name not in decided]
    names = {target.name for target in free}
    open_ones = [found for found in dimensions if method.narrows and names.issuperset(found.members)]
    if free and budget.limit is not None:
        left = budget.limit - budget.spent(list(decided.values()))
        if method.allocation == "curvature" and estimates is not None:
            own_heads = {found.name: found for found in heads}
            kitchen = Kitchen(recipe, estimates, budget, readings)
            offered = kitchen.menus(free, open_ones, own_heads, exchange)
            fixed = {models.owner(name, blocks or {}) for name in decided}
            whole = {block: lost for block, lost in (blocks or {}).items() if block not in fixed}
            found = _allocated(menus.with_blocks(offered, whole), budget, left)
        elif recipe.timed:
            found = _admitted(recipe, free, budget, left)
        elif recipe.size is not None and recipe.stores:
            found = _in_bytes(recipe, free, budget, left)
        else:
            whole_bases = [group for group in bases if names.issuperset(group)]
            found = _uniformly(recipe, free, open_ones, left, whole_bases)
        decided |= {choice.target.name: choice for choice in found}
    choices = [decided[target.name] for target in targets]
    budget.check(choices)
    return choices


def _sharing(members: Sequence[Target], share: float, step: int) -> list[Choice]:
    """Return the choices for matrices of one shape that share a right factor."""
    outputs, inputs = members[0].shape
    rank = int(share * len(members) * outputs * inputs / (inputs + len(members) * outputs)) // step * step
    if share >= 1:
        return [dense(target) for target in members]
    names = tuple(target.name for target in members)
    rank = max(min(rank, outputs, inputs), 1)
    return [Choice(target, "factored", rank, basis=names) for target in members]


def _uniformly(
    recipe: Recipe,
    free: Sequence[Target],
    dimensions: Sequence[Dimension],
    left: int,
    bases: Sequence[tuple[str, ...]] = (),
) -> list[Choice]:
    """Keep the same share of every matrix: MLPs by their width where the form allows it."""
    method = recipe.resolved_method()
    widths = {name: found for found in dimensions if found.kind == "mlp" for name in found.members}
    shrinking = [target for target in free if target.name in widths or target.form(method.low_rank)]
    left -= sum(target.size for target in free) - sum(target.size for target in shrinking)
    share = min(max(left / max(sum(target.size for target in shrinking), 1), 1e-9), 1.0)
    by_name = {target.name: target for target in free}
    shared = {
        choice.target.name: choice
        for names in bases
        for choice in _sharing([by_name[name] for name in names], share, recipe.step())
    }
    choices = []
    for target in free:
        stored = _widest(recipe, target)
        if target.name in shared:
            choices.append(shared[target.name])
        elif target.name in widths:
            found = widths[target.name]
            legal = [*legal_widths(found.units, recipe.step()), found.units]
            width = max([width for width in legal if width <= share * found.units] or legal[:1])
            side: Side = "columns" if found.reader == target.name else "rows"
            choices.append(narrow(target, width, found.units, side, stored))
        else:
            choices.append(_apply(recipe, Keep(share), target, None, stored))
    return choices


def _in_bytes(recipe: Recipe, free: Sequence[Target], budget: Budget, left: int) -> list[Choice]:
    """Return one storage for all, the widest in which all fit, or the same share of every matrix in few bits.

    For orientation, before anything is known of losses.
    """
    choices: list[Choice] = []
    for stored in menus.AUTOMATIC:
        choices = [dense(target, _limited(recipe, target, stored)) for target in free]
        if budget.spent(choices) <= left:
            return choices
    for parts in range(_SHARES - 1, 0, -1):
        share = Keep(parts / _SHARES)
        choices = [_apply(recipe, share, choice.target, None, choice.storage) for choice in choices]
        if budget.spent(choices) <= left:
            return choices
    raise budget.unreachable(budget.spent(choices) + (budget.limit or 0) - left)


def _admitted(recipe: Recipe, free: Sequence[Target], budget: Budget, left: int) -> list[Choice]:
    """Return the largest share of every matrix that fits, and whole what the budget admits in no other way.

    For orientation, before anything is known of losses.
    """
    choices: list[Choice] = []
    for parts in range(_SHARES, 0, -1):
        choices = []
        for target in free:
            form = target.form(recipe.resolved_method().low_rank)
            step = recipe.step() if form is None or budget.step is None else budget.step(form, target.shape)
            rank = None if form is None else uniform(Keep(parts / _SHARES), form, target.shape, step)
            low = dense(target) if form is None or rank is None else Choice(target, form, rank)
            choices.append(low if budget.admits(low) else dense(target))
        if budget.spent(choices) <= left:
            return choices
    raise budget.unreachable(budget.spent(choices) + (budget.limit or 0) - left)


def _limited(recipe: Recipe, target: Target, stored: str) -> str:
    """Return `stored`, where `target` may have it."""
    legal = menus.storages(recipe, target)
    return stored if stored in legal else legal[0]


def _allocated(offered: Sequence[Options], budget: Budget, left: int) -> list[Choice]:
    least = sum(min(menu.costs) for menu in offered)
    if least > left:
        raise budget.unreachable(least + (budget.limit or 0) - left)
    curves = {str(place): menu for place, menu in enumerate(offered)}
    places = allocate(curves, left)
    return [choice for name, menu in curves.items() for choice in menu.options[places[name]]]
