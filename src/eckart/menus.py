"""What the parts of a model may become, with cost and estimated loss of every possibility."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import models
from .choices import Budget, Choice, Options, dense, narrow
from .dimensions import Dimension
from .factors import Form
from .heads import Heads
from .models import Target
from .quant import storage
from .quant.noise import Noise
from .ranks import Curve, either, legal_ranks, legal_widths, together, width_curve
from .readings import Reading
from .recipe import AUTO, FLOAT, Recipe

AUTOMATIC = (FLOAT, "int8", "int6", "int5", "int4", "nf4-dq", "int3", "int2")
"""What `auto` chooses from."""
_PIVOTED_BITS = 6.0
"""An error in the pivot rows is carried into all the others: below so many bits a matrix is two factors."""


def storages(recipe: Recipe, target: Target) -> tuple[str, ...]:
    """Return what `target` may be stored in."""
    wanted = recipe.matrices_storage if target.ranked else recipe.embeddings_storage
    return AUTOMATIC if wanted == AUTO else (wanted,)


def form_in(stored: str, form: Form | None) -> Form | None:
    """Return the form that a matrix has in a storage, where `form` is wanted."""
    few = stored != FLOAT and storage.get(stored).bits() < _PIVOTED_BITS
    return "factored" if few and form == "pivoted" else form


@dataclass(frozen=True, slots=True)
class Estimates:
    """The estimated loss per token of every rank or width, by name, and what rounding adds to it."""

    losses: Mapping[str, Tensor]
    noises: Mapping[str, Noise] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kitchen:
    """Makes menus.

    Args:
        recipe: form, multiple, storages.
        estimates: of losses.
        budget: what a choice costs in it, and which it admits.
        readings: matrices that may have a common right factor.
    """

    recipe: Recipe
    estimates: Estimates
    budget: Budget
    readings: Sequence[Reading] = ()

    @property
    def cost(self) -> Callable[[Choice], int]:
        """What a choice costs."""
        return self.budget.cost

    def menus(
        self,
        free: Sequence[Target],
        dimensions: Sequence[Dimension],
        heads: Mapping[str, Heads],
        exchange: float,
    ) -> list[Options]:
        """Return the menu of every dimension, and of every matrix that belongs to none.

        Args:
            free: the matrices.
            dimensions: what may be made narrower.
            heads: by name of their dimension, what may be made narrower head by head.
            exchange: as in eckart.budget.choose.
        """
        left = {target.name: target for target in free}
        menus: list[Options] = []
        narrowable = {dimension.name: dimension for dimension in dimensions}
        for name in dict.fromkeys([*narrowable, *heads]):
            dimension, own = narrowable.get(name), heads.get(name)
            members = dimension.members if dimension is not None else own.members if own is not None else ()
            if not set(members) <= set(left):
                continue
            targets = [left.pop(member) for member in members]
            mlp = dimension is not None and dimension.kind == "mlp"
            rate = max(exchange, 1.0) if mlp else 1.0
            alone = {target.name: self._alone(target, rate) for target in targets}
            inside = together(self._each(targets, alone, rate)) if own is None else self._by_heads(own, alone)
            if dimension is not None:
                cheaper = min(exchange, 1.0) if mlp else 1.0
                inside = either([*self._narrowed(targets, dimension, cheaper), inside])
            menus.append(inside)
        rest = {name: self._alone(target) for name, target in left.items()}
        return [*menus, *self._each(list(left.values()), rest, 1.0)]

    def _each(self, targets: Sequence[Target], alone: Mapping[str, Options], rate: float) -> list[Options]:
        """Return the menus `alone` of `targets`, those of one input joined, with the common factor."""
        by_name = {target.name: target for target in targets}
        menus = dict(alone)
        for reading in self.readings:
            if by_name.keys() >= set(reading.members):
                apart = together([menus.pop(name) for name in reading.members])
                common = self._common([by_name[name] for name in reading.members], reading, rate)
                menus[reading.name] = either([common, apart])
        return list(menus.values())

    def _common(self, members: Sequence[Target], reading: Reading, rate: float) -> Options:
        """Return the stack of `members` at every rank that is worth it, and dense."""
        form = reading.form(self.recipe.resolved_method().low_rank)
        assert form is not None
        tail, whole = rate * self.estimates.losses[reading.name], tuple(dense(target) for target in members)
        highest = len(tail) - 1
        if not reading.once:  # then each is an ordinary product of two factors
            highest = min(highest, *(target.shape[0] for target in members))
        options, costs = [], []
        for rank in range(self.recipe.step(), highest + 1, self.recipe.step()):
            option = tuple(Choice(target, form, rank, basis=reading.members) for target in members)
            price = sum(map(self.cost, option))
            if price < sum(map(self.cost, whole)):
                options.append(option)
                costs.append(price)
        places = torch.tensor([option[0].rank for option in options], dtype=torch.int64)
        return Curve(
            (*options, whole),
            (*costs, sum(map(self.cost, whole))),
            (*tail[places].tolist(), 0.0),
        )

    def _alone(self, target: Target, rate: float = 1.0) -> Options:
        """Return what one matrix may become by itself: any storage, dense or at any rank that is worth it."""
        return either([self._stored(target, stored, rate) for stored in storages(self.recipe, target)])

    def _stored(self, target: Target, stored: str, rate: float) -> Options:
        form = target.form(form_in(stored, self.recipe.resolved_method().low_rank))
        whole = dense(target, stored)
        costs, losses = [self.cost(whole)], [self._noise(target.name, stored)]
        options = [(whole,)]
        if form is not None:
            tail = rate * self.estimates.losses[target.name]
            noises = self._noises(target.name, stored, len(tail))
            step = self.recipe.step() if self.budget.step is None else self.budget.step(form, target.shape)
            ranks = legal_ranks(form, target.shape, step)
            chosen = [Choice(target, form, rank, storage=stored) for rank in ranks]
            chosen = [choice for choice in chosen if self.budget.admits(choice)]
            fitting = [(c, p) for c in chosen if (p := self.cost(c)) < costs[0]]
            places = torch.tensor([choice.rank for choice, _ in fitting], dtype=torch.int64)
            losses = [*(tail + noises)[places].tolist(), *losses]
            costs = [*(price for _, price in fitting), *costs]
            options = [*((choice,) for choice, _ in fitting), *options]
        return Curve(tuple(options), tuple(costs), tuple(losses))

    def _noise(self, name: str, stored: str) -> float:
        noise = self.estimates.noises.get(name)
        return 0.0 if stored == FLOAT or noise is None else storage.get(stored).noise * noise.dense

    def _noises(self, name: str, stored: str, size: int) -> Tensor:
        noise = self.estimates.noises.get(name)
        if stored == FLOAT or noise is None or noise.low_rank is None:
            return torch.zeros(size, dtype=torch.float64)
        return storage.get(stored).noise * noise.low_rank

    def _narrowed(self, members: Sequence[Target], dimension: Dimension, cheaper: float) -> list[Options]:
        """Return what the matrices of a dimension may become together: any width, in any storage."""
        step = self.recipe.step() if dimension.kind == "mlp" else 1
        tail, units = self.estimates.losses[dimension.name] / cheaper, dimension.units
        widths = [*legal_widths(units, step), units]
        found: list[Options] = []
        for stored in storages(self.recipe, members[0]):
            noise = sum(self._noise(target.name, stored) for target in members)
            options = {
                width: tuple(
                    narrow(t, width, units, "columns" if t.name == dimension.reader else "rows", stored)
                    for t in members
                )
                for width in widths
            }
            options = {width: own for width, own in options.items() if all(map(self.budget.admits, own))}
            costs = [sum(map(self.cost, own)) for own in options.values()]
            losses = [float(tail[width]) + noise * width / units for width in options]
            found.append(Curve(tuple(options.values()), tuple(costs), tuple(losses)))
        return found

    def _by_heads(self, heads: Heads, alone: Mapping[str, Options]) -> Options:
        """Return what the matrices of an attention may become, two by two or each by itself."""
        losses = self.estimates.losses
        value, output, query, key = (alone[n] for n in (heads.value, heads.output, heads.query, heads.key))
        values = either([together([value, output]), self._partial([value, output], losses[heads.values])])
        if heads.interleaved is None:
            return together([values, query, key])
        pairs = either([together([query, key]), self._partial([query, key], losses[heads.pairs])])
        return together([values, pairs])

    def _partial(self, pair: Sequence[Options], losses: Tensor) -> Options:
        """Return the options of two matrices that share parts of heads: any number of parts."""
        targets = [menu.options[0][0].target for menu in pair]
        size, units = sum(target.size for target in targets), len(losses) - 1
        widths = width_curve(size, losses)
        options = [
            tuple(Choice(target, "partial", kept, units) for target in targets) for kept in widths.options
        ]
        options[-1] = tuple(dense(target) for target in targets)
        return Curve(tuple(options), widths.costs, widths.losses)


def with_blocks(menus: Sequence[Options], blocks: Mapping[str, float]) -> list[Options]:
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
