"""What may become of a matrix, what that costs, and what there is to spend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Literal

import torch

from . import models
from .dimensions import Dimension
from .errors import RankError
from .factors import FORMS, Form, Side, index_bytes, parameters
from .models import Target
from .quant import storage
from .ranks import Curve
from .recipe import FLOAT, Recipe

Become = Form | Literal["dense", "narrow", "partial", "dropped"]
_ENTRY = 120
"""Bytes of one tensor's entry in the header of a weight file, beside its name."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one matrix: a form at a rank, or `rank` of the `units` of a hidden dimension.

    `basis` names the matrices that share its right factor, which counts with the first of them. Of a dense
    matrix, the rank is the smaller side; of one that is dropped with its block, 0. `storage` is that of all
    its parts, and `side` says what of a narrow one is left out.
    """

    target: Target
    form: Become
    rank: int
    units: int = 0
    basis: tuple[str, ...] = ()
    storage: str = FLOAT
    side: Side = "rows"

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

    def parts(self) -> list[tuple[int, int]]:
        """Return the shapes (out, in) of the matrices that it is stored as, of a table (v, d)."""
        outputs, inputs = self.target.shape
        if self.target.embedding:
            outputs, inputs = inputs, outputs
        if self.form == "dense":
            return [(outputs, inputs)]
        if self.form == "factored":
            first = (self.rank, inputs)
            if self.target.embedding:
                return [(outputs, self.rank), (inputs, self.rank)]
            return (
                [first, (outputs, self.rank)]
                if self.basis[:1] in ((), (self.target.name,))
                else [(outputs, self.rank)]
            )
        if self.form == "pivoted":
            rest = outputs - self.rank
            return [(self.rank, inputs), *([(rest, self.rank)] if rest else [])]
        if self.form in ("narrow", "partial"):
            if self.side == "rows":
                return [(outputs // self.units * self.rank, inputs)]
            return [(outputs, inputs // self.units * self.rank)]
        return []

    def bytes(self, itemsize: int) -> int:
        """Return the bytes that it takes in a weight file, entries of the header and row order included."""
        total = index_bytes(self.form, self.target.shape) if self.form in FORMS else 0
        name = len(self.target.name) + _ENTRY
        if self.storage == FLOAT:
            return total + self.parameters * itemsize + name * (len(self.parts()) + (total > 0))
        for shape in self.parts():
            size, tensors = _stored(self.storage, shape)
            total += size + tensors * name
        return total


@lru_cache(maxsize=1 << 17)
def _stored(name: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the bytes and the number of the tensors of a matrix of `shape` in a storage."""
    kind = storage.get(name)
    return kind.bytes(shape), len(kind.layout(shape))


def dense(target: Target, stored: str = FLOAT) -> Choice:
    """Return the choice to leave the values of `target` as they are."""
    return Choice(target, "dense", min(target.shape), storage=stored)


def narrow(target: Target, width: int, units: int, side: Side = "rows", stored: str = FLOAT) -> Choice:
    """Return the choice to keep `width` of the `units` of a hidden dimension that `target` belongs to."""
    if width == units:
        return dense(target, stored)
    return Choice(target, "narrow", width, units, storage=stored, side=side)


Options = Curve[tuple[Choice, ...]]


@dataclass(frozen=True, slots=True)
class Budget:
    """What the treated matrices may cost together; None where a rule decides alone.

    Args:
        limit: in units of `cost`.
        what: the budget as it was given.
        words: says an amount in its terms.
        cost: of a choice, in parameters, bytes or nanoseconds.
        admits: tells which choices are offered.
        step: what ranks of a form and a shape are multiples of; None: what the recipe says.
        then: the budget in time to be spent instead, given the choices within this one.
    """

    limit: int | None
    what: str
    words: Callable[[int], str] = str
    cost: Callable[[Choice], int] = lambda choice: choice.parameters
    admits: Callable[[Choice], bool] = lambda choice: True
    step: Callable[[Form, tuple[int, int]], int] | None = None
    then: "Callable[[Sequence[Choice]], Budget] | None" = None

    def spent(self, choices: Sequence[Choice]) -> int:
        """Return what `choices` cost."""
        return sum(map(self.cost, choices))

    def check(self, choices: Sequence[Choice]) -> None:
        """Raise RankError if `choices` cost more."""
        used = self.spent(choices)
        if self.limit is not None and used > self.limit:
            raise self.unreachable(used)

    def unreachable(self, least: int) -> RankError:
        """Return the error that says what can be had: at `least` that."""
        return RankError(
            f"{self.what} cannot be reached: with these matrices treated and the rest of the model kept as "
            f"it is, the least is {self.words(least)}; raise the budget, or treat more matrices (include)"
        )


def settle(
    recipe: Recipe, targets: Sequence[Target], model_parameters: int, fixed_bytes: int, itemsize: int
) -> Budget:
    """Translate the recipe's budget into parameters, or bytes, of the treated matrices.

    Args:
        recipe: keep, size, rank or energy.
        targets: the treated matrices.
        model_parameters: of the whole model, tied ones once.
        fixed_bytes: of a weight file without the treated matrices.
        itemsize: bytes of one parameter in the output.
    """
    linears = sum(target.size for target in targets if target.ranked)
    size = recipe.size_bytes()
    if size is not None and recipe.stores:
        return Budget(
            size - fixed_bytes,
            f"size {recipe.size}",
            lambda n: f"{(n + fixed_bytes) / 1e6:.3f}MB",
            lambda choice: choice.bytes(itemsize),
        )
    if size is not None:
        limit = (size - fixed_bytes) // itemsize
        return Budget(limit, f"size {recipe.size}", lambda n: f"{(n * itemsize + fixed_bytes) / 1e6:.3f}MB")
    if recipe.keep is None:
        return Budget(None, "the rule")
    ends = sum(target.size for target in targets if not target.ranked)
    whole, rest = (linears, 0) if recipe.of == "linears" else (model_parameters, model_parameters - linears)
    # What is not ranked stays whole: it is among the choices, and in the budget.
    limit = int(recipe.keep * whole) - rest + ends
    what = f"keep {recipe.keep:g} of the {recipe.of}"
    return Budget(limit, what, lambda n: f"keep {ceil((n - ends + rest) / whole * 1000) / 1000:.3f}")


def fixed_bytes(
    model: torch.nn.Module,
    targets: Sequence[Target],
    form: Form | None,
    itemsize: int,
    dimensions: Sequence[Dimension] = (),
    *,
    itemised: bool = False,
) -> int:
    """Return the bytes of a weight file without the treated matrices, the file's own header included.

    Their entries in the header are bounded from above: three of at most 120 characters beside the name
    for every treated matrix, one for every other tensor. So are the places of what may be kept of
    attention heads. Where choices bring their own entries (`itemised`), those are left out.
    """
    treated = {f"{name}.weight" for target in targets for name in target.modules}
    header, total = 256, 0
    if not itemised:
        header += sum(3 * (len(target.name) + _ENTRY) for target in targets)
        forms = {target.name: (target.form(form), target.shape) for target in targets}
        total += sum(index_bytes(own, shape) for own, shape in forms.values() if own is not None)
        attentions = [found for found in dimensions if found.kind == "attention"]
        total += sum(4 * max(forms[name][1]) for found in attentions for name in found.members)
    for name, tensor in models.state_tensors(model).items():
        if name not in treated:
            size = itemsize if tensor.is_floating_point() else tensor.element_size()
            total += tensor.numel() * size
            header += len(name) + _ENTRY
    return total + header
