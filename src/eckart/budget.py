"""From a recipe's budget to one rank per matrix, and what that makes of the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from . import models
from .dimensions import Dimension
from .errors import RankError
from .factors import FORMS, Form, index_bytes, parameters
from .heads import Heads
from .models import Target
from .ranks import (
    Curve,
    Energy,
    Fixed,
    Keep,
    allocate,
    by_energy,
    curve,
    either,
    legal_widths,
    together,
    uniform,
    width_curve,
)
from .recipe import Recipe

Rule = Fixed | Keep | Energy | None
Become = Form | Literal["dense", "narrow", "partial", "dropped"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one matrix: a form at a rank, or `rank` of the `units` of a hidden dimension.

    `basis` names the matrices that share its right factor, which counts with the first of them. Of a dense
    matrix, the rank is the smaller side; of one that is dropped with its block, 0.
    """

    target: Target
    form: Become
    rank: int
    units: int = 0
    basis: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Parameters after, bias not counted."""
        if self.form == "dense":
            return self.target.size
        if self.basis and self.basis[0] != self.target.name:
            return self.rank * self.target.shape[0]
        if self.form in ("narrow", "partial"):
            return self.target.size // self.units * self.rank
        return parameters(self.form, self.target.shape, self.rank) if self.form in FORMS else 0


def dense(target: Target) -> Choice:
    """Return the choice to leave `target` as it is."""
    return Choice(target, "dense", min(target.shape))


def narrow(target: Target, width: int, units: int) -> Choice:
    """Return the choice to keep `width` of the `units` of a hidden dimension that `target` belongs to."""
    return dense(target) if width == units else Choice(target, "narrow", width, units)


Options = Curve[tuple[Choice, ...]]


@dataclass(frozen=True, slots=True)
class Budget:
    """What the treated matrices may cost together, in parameters; None where a rule decides alone.

    `what` names the budget as it was given, and `words` says a number of parameters in its terms.
    """

    parameters: int | None
    what: str
    words: Callable[[int], str] = str

    def check(self, choices: Sequence[Choice]) -> None:
        """Raise RankError if `choices` cost more."""
        used = sum(choice.parameters for choice in choices)
        if self.parameters is not None and used > self.parameters:
            raise self.unreachable(used)

    def unreachable(self, least: int) -> RankError:
        """Return the error that says what can be had: `least` parameters."""
        return RankError(
            f"{self.what} cannot be reached: with these matrices treated and the rest of the model kept as "
            f"it is, the least is {self.words(least)}; raise the budget, or treat more matrices (include)"
        )


def settle(
    recipe: Recipe, targets: Sequence[Target], model_parameters: int, fixed_bytes: int, itemsize: int
) -> Budget:
    """Translate the recipe's budget into parameters of the treated matrices.

    Args:
        recipe: keep, size, rank or energy.
        targets: the treated matrices.
        model_parameters: of the whole model, tied ones once.
        fixed_bytes: of a weight file without the treated matrices.
        itemsize: bytes of one parameter in the output.
    """
    linears = sum(target.size for target in targets)
    size = recipe.size_bytes()
    if size is not None:
        limit = (size - fixed_bytes) // itemsize
        return Budget(limit, f"size {recipe.size}", lambda n: f"{(n * itemsize + fixed_bytes) / 1e6:.3f}MB")
    if recipe.keep is None:
        return Budget(None, "the rule")
    whole, rest = (linears, 0) if recipe.of == "linears" else (model_parameters, model_parameters - linears)
    limit = int(recipe.keep * whole) - rest
    what = f"keep {recipe.keep:g} of the {recipe.of}"
    return Budget(limit, what, lambda n: f"keep {ceil((n + rest) / whole * 1000) / 1000:.3f}")


def _fixed(recipe: Recipe, target: Target) -> tuple[bool, Rule]:
    """Tell whether an override decides about `target`, and by which rule (None: dense)."""
    place = models.match_one(target.name, [override.match for override in recipe.overrides])
    return (False, None) if place is None else (True, recipe.overrides[place].rule())


def _apply(rule: Rule, form: Form | None, target: Target, multiple: int, losses: Tensor | None) -> Choice:
    form = target.form(form)
    if rule is None or form is None:
        return dense(target)
    if not isinstance(rule, Energy):
        rank = uniform(rule, form, target.shape, multiple)
    else:
        rank = None if losses is None else by_energy(rule, form, target.shape, losses, multiple)
    return dense(target) if rank is None else Choice(target, form, rank)


def choose(
    recipe: Recipe,
    budget: Budget,
    targets: Sequence[Target],
    dimensions: Sequence[Dimension] = (),
    losses: Mapping[str, Tensor] | None = None,
    *,
    heads: Sequence[Heads] = (),
    exchange: float = 1.0,
    blocks: Mapping[str, float] | None = None,
    bases: Sequence[tuple[str, ...]] = (),
) -> list[Choice]:
    """Return what becomes of every target, in order, within `budget`.

    Args:
        recipe: rules, overrides, form, allocation, multiple.
        budget: from `settle`.
        targets: the treated matrices.
        dimensions: what may be made narrower, where the recipe's form says so.
        losses: per name of a target (a dimension) the estimated loss of every rank (width). None (a dry run)
            gives the ranks of uniform allocation wherever spectra would decide.
        heads: of those dimensions, what may be made narrower head by head.
        exchange: what the estimates of low-rank MLP matrices are multiplied by to be compared with those
            of widths; below 1, those of widths are divided by it.
        blocks: what it costs to leave out each of these blocks.
        bases: names of the matrices that share a right factor.

    Raises:
        RankError: the budget cannot be reached.
    """
    method, step = recipe.resolved_method(), recipe.step()
    decided: dict[str, Choice] = {}
    for target in targets:
        own, rule = _fixed(recipe, target)
        if own or budget.parameters is None:
            rule = rule if own else recipe.rule()
            known = (losses or {}).get(target.name)
            decided[target.name] = _apply(rule, method.low_rank, target, step, known)
    free = [target for target in targets if target.name not in decided]
    names = {target.name for target in free}
    open_ones = [found for found in dimensions if method.narrows and names.issuperset(found.members)]
    if free and budget.parameters is not None:
        spent = sum(choice.parameters for choice in decided.values())
        if method.allocation == "curvature" and losses is not None:
            own_heads = {found.name: found for found in heads}
            menus = _menus(recipe, free, open_ones, own_heads, losses, exchange)
            fixed = {models.owner(name, blocks or {}) for name in decided}
            whole = {block: lost for block, lost in (blocks or {}).items() if block not in fixed}
            menus = _with_blocks(menus, whole)
            found = _allocated(menus, budget, budget.parameters - spent)
        else:
            whole_bases = [group for group in bases if names.issuperset(group)]
            found = _uniformly(recipe, free, open_ones, budget.parameters - spent, whole_bases)
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
        if target.name in shared:
            choices.append(shared[target.name])
        elif target.name in widths:
            units = widths[target.name].units
            legal = [*legal_widths(units, recipe.step()), units]
            width = max([width for width in legal if width <= share * units] or legal[:1])
            choices.append(narrow(target, width, units))
        else:
            choices.append(_apply(Keep(share), method.low_rank, target, recipe.step(), None))
    return choices


def _ranked(target: Target, form: Form, losses: Tensor, step: int) -> Options:
    """Return what one matrix may become: `form` at any rank that is worth it, or dense."""
    ranks = curve(form, target.shape, losses, multiple=step)
    options = [(Choice(target, form, rank),) for rank in ranks.options[:-1]]
    return Curve((*options, (dense(target),)), ranks.costs, ranks.losses)


def _narrowed(members: Sequence[Target], dimension: Dimension, losses: Tensor, step: int) -> Options:
    """Return what the matrices of a dimension may become together: any width."""
    size = sum(target.size for target in members)
    widths = width_curve(size, losses, multiple=step if dimension.kind == "mlp" else 1)
    options = [
        tuple(narrow(target, width, dimension.units) for target in members) for width in widths.options
    ]
    return Curve(tuple(options), widths.costs, widths.losses)


def _menus(
    recipe: Recipe,
    free: Sequence[Target],
    dimensions: Sequence[Dimension],
    heads: Mapping[str, Heads],
    losses: Mapping[str, Tensor],
    exchange: float,
) -> list[Options]:
    """Return the curve of every dimension, and of every matrix that belongs to none."""
    form, step = recipe.resolved_method().low_rank, recipe.step()
    left = {target.name: target for target in free}
    menus: list[Options] = []

    def by_itself(names: Sequence[str], rate: float) -> dict[str, Options]:
        return {name: _alone(left.pop(name), form, losses, step, rate) for name in names}

    narrowable = {dimension.name: dimension for dimension in dimensions}
    for name in dict.fromkeys([*narrowable, *heads]):
        dimension, own = narrowable.get(name), heads.get(name)
        members = dimension.members if dimension is not None else own.members if own is not None else ()
        if not set(members) <= set(left):
            continue
        targets = [left[member] for member in members]
        mlp = dimension is not None and dimension.kind == "mlp"
        alone = by_itself(members, max(exchange, 1.0) if mlp else 1.0)
        inside = together(list(alone.values())) if own is None else _by_heads(own, alone, losses)
        if dimension is not None:
            lost = losses[name] / min(exchange, 1.0) if mlp else losses[name]
            inside = either([_narrowed(targets, dimension, lost, step), inside])
        menus.append(inside)
    return [*menus, *by_itself(list(left), 1.0).values()]


def _alone(
    target: Target, form: Form | None, losses: Mapping[str, Tensor], step: int, rate: float = 1.0
) -> Options:
    """Return what one matrix may become by itself."""
    own = target.form(form)
    if own is None:
        return Curve(((dense(target),),), (target.size,), (0.0,))
    return _ranked(target, own, rate * losses[target.name], step)


def _by_heads(heads: Heads, alone: Mapping[str, Options], losses: Mapping[str, Tensor]) -> Options:
    """Return what the matrices of an attention may become, two by two or each by itself."""
    value, output, query, key = (alone[n] for n in (heads.value, heads.output, heads.query, heads.key))
    values = either([together([value, output]), _partial([value, output], losses[heads.values])])
    if heads.interleaved is None:
        return together([values, query, key])
    pairs = either([together([query, key]), _partial([query, key], losses[heads.pairs])])
    return together([values, pairs])


def _partial(pair: Sequence[Options], losses: Tensor) -> Options:
    """Return the options of two matrices that share parts of heads: any number of parts."""
    targets = [menu.options[0][0].target for menu in pair]
    size, units = sum(target.size for target in targets), len(losses) - 1
    widths = width_curve(size, losses)
    options = [tuple(Choice(target, "partial", kept, units) for target in targets) for kept in widths.options]
    options[-1] = tuple(dense(target) for target in targets)
    return Curve(tuple(options), widths.costs, widths.losses)


def _with_blocks(menus: Sequence[Options], blocks: Mapping[str, float]) -> list[Options]:
    """Join the menus of each of `blocks` into one that also offers to leave the block out."""
    groups: dict[str, list[Options]] = {name: [] for name in blocks}
    rest: list[Options] = []
    for menu in menus:
        block = models.owner(menu.options[0][0].target.name, blocks)
        (rest if block is None else groups[block]).append(menu)
    joined = []
    for block, inside in groups.items():
        if inside:
            whole = together(inside)
            gone = tuple(Choice(choice.target, "dropped", 0) for choice in whole.options[0])
            joined.append(either([Curve((gone,), (0,), (blocks[block],)), whole]))
    return [*joined, *rest]


def _allocated(menus: Sequence[Options], budget: Budget, left: int) -> list[Choice]:
    least = sum(min(menu.costs) for menu in menus)
    if least > left:
        raise budget.unreachable(least + (budget.parameters or 0) - left)
    curves = {str(place): menu for place, menu in enumerate(menus)}
    places = allocate(curves, left)
    return [choice for name, menu in curves.items() for choice in menu.options[places[name]]]


def fixed_bytes(
    model: torch.nn.Module,
    targets: Sequence[Target],
    form: Form | None,
    itemsize: int,
    dimensions: Sequence[Dimension] = (),
) -> int:
    """Return the bytes of a weight file without the treated matrices, the file's own header included.

    The header is bounded from above: three entries of at most 120 characters beside the name for
    every treated matrix, one for every other tensor. So are the places of what may be kept of
    attention heads.
    """
    treated = {f"{target.name}.weight" for target in targets}
    header = sum(3 * (len(target.name) + 120) for target in targets) + 256
    forms = {target.name: (target.form(form), target.shape) for target in targets}
    total = sum(index_bytes(own, shape) for own, shape in forms.values() if own is not None)
    attentions = [found for found in dimensions if found.kind == "attention"]
    total += sum(4 * max(forms[name][1]) for found in attentions for name in found.members)
    for name, tensor in models.state_tensors(model).items():
        if name not in treated:
            size = itemsize if tensor.is_floating_point() else tensor.element_size()
            total += tensor.numel() * size
            header += len(name) + 120
    return total + header
