"""From a recipe's budget to one rank per matrix, and what that makes of the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from . import models
from .errors import RankError
from .factors import Form, index_bytes, parameters
from .models import Target
from .ranks import Curve, Energy, Fixed, Keep, allocate, by_energy, curve, uniform
from .recipe import Recipe

Rule = Fixed | Keep | Energy | None


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one matrix: rank None means that it stays dense."""

    target: Target
    form: Form
    rank: int | None

    @property
    def parameters(self) -> int:
        """Parameters after, bias not counted."""
        return self.target.size if self.rank is None else parameters(self.form, self.target.shape, self.rank)

    @property
    def index_bytes(self) -> int:
        """Bytes kept beside the parameters."""
        return 0 if self.rank is None else index_bytes(self.form, self.target.shape)


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


def _apply(rule: Rule, form: Form, target: Target, multiple: int, tail: Tensor | None) -> Choice:
    if rule is None:
        return Choice(target, target.form(form), None)
    form = target.form(form)
    if isinstance(rule, Energy):
        if tail is None:
            return Choice(target, form, None)
        return Choice(target, form, by_energy(rule, form, target.shape, tail, multiple))
    return Choice(target, form, uniform(rule, form, target.shape, multiple))


def choose(
    recipe: Recipe,
    budget: Budget,
    targets: Sequence[Target],
    tails: Mapping[str, Tensor] | None = None,
    units: Mapping[str, float] | None = None,
) -> list[Choice]:
    """Return what becomes of every target, in order, within `budget`.

    Args:
        recipe: rules, overrides, form, allocation, multiple.
        budget: from `settle`.
        targets: the treated matrices.
        tails: per name the weighted squared error of every rank (k + 1,). None (a dry run) gives
            the ranks of uniform allocation wherever spectra would decide.
        units: per name the factor from squared error to loss per token.

    Raises:
        RankError: the budget cannot be reached.
    """
    method = recipe.resolved_method()
    decided: dict[str, Choice] = {}
    for target in targets:
        own, rule = _fixed(recipe, target)
        if own or budget.parameters is None:
            rule = rule if own else recipe.rule()
            tail = tails[target.name] if tails is not None else None
            decided[target.name] = _apply(rule, method.form, target, recipe.multiple, tail)
    free = [target for target in targets if target.name not in decided]
    if free and budget.parameters is not None:
        left = budget.parameters - sum(choice.parameters for choice in decided.values())
        if method.allocation == "curvature" and tails is not None and units is not None:
            found = _by_curvature(recipe, budget, free, left, tails, units)
        else:
            found = _uniformly(recipe, free, left)
        decided |= {choice.target.name: choice for choice in found}
    choices = [decided[target.name] for target in targets]
    budget.check(choices)
    return choices


def _uniformly(recipe: Recipe, free: Sequence[Target], left: int) -> list[Choice]:
    form = recipe.resolved_method().form
    share = left / sum(target.size for target in free)
    rule = Keep(min(max(share, 1e-9), 1.0))
    return [_apply(rule, form, target, recipe.multiple, None) for target in free]


def _by_curvature(
    recipe: Recipe,
    budget: Budget,
    free: Sequence[Target],
    left: int,
    tails: Mapping[str, Tensor],
    units: Mapping[str, float],
) -> list[Choice]:
    form = recipe.resolved_method().form
    curves: dict[str, Curve] = {
        target.name: curve(
            target.form(form),
            target.shape,
            tails[target.name],
            multiple=recipe.multiple,
            unit=units[target.name],
        )
        for target in free
    }
    least = sum(curve.costs[0] for curve in curves.values())
    if least > left:
        raise budget.unreachable(least + (budget.parameters or 0) - left)
    options = allocate(curves, left)
    choices = []
    for target in free:
        option, ranks = options[target.name], curves[target.name].ranks
        choices.append(Choice(target, target.form(form), None if option == len(ranks) - 1 else ranks[option]))
    return choices


def fixed_bytes(model: torch.nn.Module, targets: Sequence[Target], form: Form, itemsize: int) -> int:
    """Return the bytes of a weight file without the treated matrices, the file's own header included.

    The header is bounded from above: three entries of at most 120 characters beside the name for
    every treated matrix, one for every other tensor.
    """
    treated = {f"{target.name}.weight" for target in targets}
    header = sum(3 * (len(target.name) + 120) for target in targets) + 256
    total = sum(index_bytes(target.form(form), target.shape) for target in targets)
    for name, tensor in models.state_tensors(model).items():
        if name not in treated:
            size = itemsize if tensor.is_floating_point() else tensor.element_size()
            total += tensor.numel() * size
            header += len(name) + 120
    return total + header
