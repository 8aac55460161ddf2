"""What choices cost in time, by a table of measured times: pure functions of the table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .choices import Budget, Choice
from .dimensions import Dimension
from .errors import ModelError
from .factors import FORMS, Form
from .latency import Objective, Seconds, Share, Step, Timing, milliseconds
from .models import Target
from .speed import times
from .speed.times import Kind, Points, Row, Shape, Times

_PER_SECOND = 10**9
"""Costs are whole nanoseconds of a pass."""


def wanted(
    targets: Sequence[Target], form: Form | None, dimensions: Sequence[Dimension]
) -> list[tuple[Shape, Kind]]:
    """Return the shapes and kinds of maps that `targets` may become.

    Raises:
        ModelError: one of them is a table, which is looked up in, not multiplied by.
    """
    found: list[tuple[Shape, Kind]] = []
    rows = {name for dimension in dimensions for name, _ in dimension.writers}
    columns = {dimension.reader for dimension in dimensions}
    for target in targets:
        if target.embedding:
            raise ModelError(
                f"{target.name} is a table, which takes no time like that of a map: leave it out of a plan "
                "in time (exclude), or give keep or size alone"
            )
        kinds: list[Kind] = ["dense"]
        kinds += [form] if form is not None and target.ranked else []
        kinds += ["rows"] if target.name in rows else []
        kinds += ["columns"] if target.name in columns else []
        found += [(target.shape, kind) for kind in kinds]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """A table made ready for choices: costs in whole nanoseconds of a pass of `tokens`.

    Args:
        table: the times.
        tokens: at once, in a pass.
        multiple: what ranks are multiples of; None: what the table says.
        points: seconds by kind and shape, none falling with the rank.
        steps: of ranks, by form and shape.
    """

    table: Times
    tokens: int
    multiple: int | None
    points: Mapping[tuple[Kind, Shape], Points]
    steps: Mapping[tuple[Form, Shape], Step]

    @classmethod
    def of(cls, table: Times, tokens: int, multiple: int | None = None) -> "Timed":
        """Return what `table` says of `tokens` at once; ranks are multiples of `multiple` if it is given."""
        rows: dict[tuple[Kind, Shape], dict[int, Row]] = {}
        for row in table.rows:
            if row.tokens == tokens:
                rows.setdefault((row.kind, row.shape), {})[row.rank] = row
        steps: dict[tuple[Form, Shape], Step] = {}
        points: dict[tuple[Kind, Shape], Points] = {}
        for (kind, shape), own in rows.items():
            used = {rank: row.seconds for rank, row in own.items()}
            if kind == "factored" or kind == "pivoted":
                found = _step(kind, shape, own, multiple)
                steps[kind, shape] = found
                # Off the steps, ranks are slow: they say nothing of those that are on them.
                used = {rank: used[rank] for rank in used if rank % found.multiple == 0} or used
            elif kind != "dense" and ("dense", shape) in rows:
                whole = shape[0] if kind == "rows" else shape[1]
                used |= {whole: next(iter(rows["dense", shape].values())).seconds}
            points[kind, shape] = times.monotone(list(used.items()))
        return cls(table, tokens, multiple, points, steps)

    def step(self, form: Form, shape: Shape) -> int:
        """Return what ranks of maps of `shape` in `form` are multiples of."""
        return self.steps[form, shape].multiple

    def cost(self, choice: Choice) -> int:
        """Return the nanoseconds of the map that `choice` makes.

        Raises:
            ModelError: the table has no times of such a map.
        """
        target, form = choice.target, choice.form
        if form == "dropped":
            return 0
        if form == "dense":
            return self._at("dense", target, min(target.shape))
        if form == "narrow":
            rows, columns = choice.parts()[0]
            by_rows = choice.side == "rows"
            return self._at("rows" if by_rows else "columns", target, rows if by_rows else columns)
        if form in FORMS and not choice.basis:
            return self._at(form, target, choice.rank)
        raise ModelError(f"{target.name}: no times are measured of maps that are {form} with others")

    def dense(self, target: Target) -> int:
        """Return the nanoseconds of the dense map."""
        return self._at("dense", target, min(target.shape))

    def admits(self, choice: Choice) -> bool:
        """Tell whether `choice` leaves its matrix as it is or makes it faster."""
        return choice.form == "dense" or self.cost(choice) < self.dense(choice.target)

    def _at(self, kind: Kind, target: Target, rank: int) -> int:
        found = self.points.get((kind, target.shape))
        if found is None:
            raise ModelError(
                f"{target.name}: the table has no times of {kind} maps of {target.shape[0]} x "
                f"{target.shape[1]} for {self.tokens} tokens"
            )
        return max(1, round(times.between(found, rank) * _PER_SECOND))

    def total(self, targets: Sequence[Target]) -> int:
        """Return the nanoseconds of all dense maps."""
        return sum(map(self.dense, targets))

    def timing(self, objective: Objective, targets: Sequence[Target], choices: Sequence[Choice]) -> Timing:
        """Return what a report says of `choices`, made of `targets`."""
        whole = [choice.target for choice in choices if choice.form == "dense"]
        where, shapes = self.table.where, {target.shape for target in targets}
        used = [row for row in self.table.rows if row.tokens == self.tokens and row.shape in shapes]
        return Timing(
            objective=objective,
            tokens=self.tokens,
            dense=self.total(targets) / _PER_SECOND,
            planned=sum(map(self.cost, choices)) / _PER_SECOND,
            whole=len(whole),
            never_faster=sum(not self._may_be_faster(target) for target in whole),
            slower=sum(not self.admits(choice) for choice in choices),
            noisy=sum(row.noisy for row in used) / max(len(used), 1),
            steps=tuple(self.steps[key] for key in self.steps if key[1] in shapes),
            where={name: getattr(where, name) for name in where.__dataclass_fields__},
        )

    def _may_be_faster(self, target: Target) -> bool:
        dense = self.dense(target)
        return any(
            self.points[form, target.shape][0][1] * _PER_SECOND < dense
            for form in FORMS
            if (form, target.shape) in self.points
        )


def _step(form: Form, shape: Shape, own: Mapping[int, Row], multiple: int | None) -> Step:
    if multiple is not None:
        return Step(shape, form, multiple, "the recipe says so")
    return Step(shape, form, *times.step(form, shape, own))


def in_time(timed: Timed, budget: Share | Seconds, targets: Sequence[Target]) -> Budget:
    """Return the budget of a pass through `targets`, given as a share of the dense time or per token."""
    whole = timed.total(targets)
    exact = (
        budget.of_dense * whole
        if isinstance(budget, Share)
        else budget.per_token * timed.tokens * _PER_SECOND
    )
    return _budget(timed, int(exact + 1e-6), str(budget), whole)


def _budget(timed: Timed, limit: int, what: str, whole: int) -> Budget:
    def words(cost: int) -> str:
        # Rounded up: what is named can be had.
        per_token = milliseconds(cost * 1.0005 / _PER_SECOND / timed.tokens)
        return f"latency {min(-(-cost * 1000 // whole) / 1000, 1):g} ({per_token} per token)"

    return Budget(limit, what, words, timed.cost, timed.admits, timed.step)


def within(timed: Timed, objective: Objective, budget: Budget, targets: Sequence[Target]) -> Budget:
    """Return `budget`, in parameters or bytes, with what `objective` makes of it.

    balanced: what is slower than the dense map is not offered. latency: in the end, time is spent, as much as
    the plan of `budget` takes, or the dense maps where these take less.
    """
    whole = timed.total(targets)
    # Overrides decide without regard to time, so a plan is refused for what is offered alone.
    same = replace(budget, step=timed.step)
    if objective == "balanced":
        return replace(same, admits=timed.admits, what=f"{budget.what} with nothing slower than dense")

    def spend(choices: Sequence[Choice]) -> Budget:
        taken = sum(map(timed.cost, choices))
        return _budget(timed, min(taken, whole), f"the time of {budget.what}", whole)

    return replace(same, then=spend)
