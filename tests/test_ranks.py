"""Allocation against brute force, and the rules that need no budget."""

from itertools import accumulate, pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eckart.errors import ConfigError, RankError
from eckart.factors import FORMS, Form, break_even, parameters
from eckart.linalg import WeightedSVD
from eckart.ranks import (
    Curve,
    Energy,
    Fixed,
    Keep,
    allocate,
    by_energy,
    curve,
    either,
    hull,
    legal_ranks,
    legal_widths,
    together,
    uniform,
    width_curve,
)

FAST = settings(deadline=None, max_examples=30, derandomize=True)
SIDES = st.integers(1, 16)
MULTIPLES = st.integers(1, 5)
FORM = st.sampled_from(FORMS)

# Losses are whole numbers, so that sums and slopes compare exactly.


def made(costs: list[int], losses: list[int]) -> Curve[int]:
    return Curve(tuple(range(1, len(costs) + 1)), tuple(costs), tuple(float(loss) for loss in losses))


@st.composite
def any_curve(draw: st.DrawFn) -> Curve[int]:
    """Any losses at all, the last of them 0."""
    steps = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    losses = draw(st.lists(st.integers(0, 60), min_size=len(steps) - 1, max_size=len(steps) - 1))
    return made(list(accumulate(steps)), [*losses, 0])


@st.composite
def convex_curve(draw: st.DrawFn, step: int | None = None) -> Curve[int]:
    """Gains per cost that fall; every step costs `step`, or what is drawn."""
    slopes = sorted(draw(st.lists(st.integers(0, 20), max_size=4)))
    costs, losses = [0], [0]
    for slope in slopes:
        cost = draw(st.integers(1, 9)) if step is None else step
        losses.append(losses[-1] + slope * cost)
        costs.append(costs[-1] + cost)
    first = draw(st.integers(1, 9))
    return made([first + costs[-1] - cost for cost in reversed(costs)], losses[::-1])


def named(curves: st.SearchStrategy[Curve[int]]) -> st.SearchStrategy[dict[str, Curve[int]]]:
    return st.lists(curves, min_size=1, max_size=3).map(
        lambda found: {name: found[place] for place, name in enumerate("abc"[: len(found)])}
    )


MIXED = named(st.one_of(any_curve(), convex_curve()))


def cost_of(curves: dict[str, Curve[int]], chosen: dict[str, int]) -> int:
    return sum(curve.costs[chosen[name]] for name, curve in curves.items())


def loss_of(curves: dict[str, Curve[int]], chosen: dict[str, int]) -> float:
    return sum(curve.losses[chosen[name]] for name, curve in curves.items())


def optimum(curves: dict[str, Curve[int]], budget: int) -> float:
    options = product(*(zip(curve.costs, curve.losses, strict=True) for curve in curves.values()))
    totals = ((sum(cost for cost, _ in pick), sum(loss for _, loss in pick)) for pick in options)
    return min(loss for cost, loss in totals if cost <= budget)


def hull_steps(curves: dict[str, Curve[int]]) -> list[tuple[float, int, float]]:
    """Slope, cost and gain of every hull step, steepest first."""
    steps = []
    for found in curves.values():
        for start, end in pairwise(hull(found.costs, found.losses)):
            cost, gain = found.costs[end] - found.costs[start], found.losses[start] - found.losses[end]
            steps.append((gain / cost, cost, gain))
    return sorted(steps, reverse=True)


def least(curves: dict[str, Curve[int]]) -> int:
    return sum(found.costs[0] for found in curves.values())


def every_budget(curves: dict[str, Curve[int]]) -> range:
    return range(least(curves), sum(found.costs[-1] for found in curves.values()) + 3)


def breakpoints(curves: dict[str, Curve[int]]) -> list[int]:
    """Costs of the vertices of the joint hull: all steps above some slope are taken."""
    spent, found = least(curves), [least(curves)]
    steps = hull_steps(curves)
    for place, (slope, cost, _) in enumerate(steps):
        spent += cost
        if place + 1 == len(steps) or steps[place + 1][0] < slope:
            found.append(spent)
    return found


# allocation


@given(curves=MIXED, beyond=st.integers(0, 100))
@settings(FAST, max_examples=100)
def test_the_budget_is_never_exceeded(curves: dict[str, Curve[int]], beyond: int) -> None:
    budget = least(curves) + beyond
    chosen = allocate(curves, budget)
    assert list(chosen) == list(curves)
    assert cost_of(curves, chosen) <= budget


@given(curves=MIXED)
@FAST
def test_the_optimum_is_met_at_the_breakpoints_of_the_joint_hull(curves: dict[str, Curve[int]]) -> None:
    for budget in breakpoints(curves):
        assert loss_of(curves, allocate(curves, budget)) == optimum(curves, budget)


@given(data=st.data(), step=st.integers(1, 6))
@FAST
def test_the_optimum_is_met_everywhere_on_convex_curves_of_equal_steps(
    data: st.DataObject, step: int
) -> None:
    curves = data.draw(named(convex_curve(step)))
    for budget in every_budget(curves):
        assert loss_of(curves, allocate(curves, budget)) == optimum(curves, budget)


@given(curves=MIXED)
@FAST
def test_the_optimum_is_missed_by_at_most_one_hull_step(curves: dict[str, Curve[int]]) -> None:
    worst = max((gain for _, _, gain in hull_steps(curves)), default=0.0)
    for budget in every_budget(curves):
        assert loss_of(curves, allocate(curves, budget)) <= optimum(curves, budget) + worst


@given(curves=MIXED)
@FAST
def test_more_budget_never_costs_more_loss_at_breakpoints(curves: dict[str, Curve[int]]) -> None:
    losses = [loss_of(curves, allocate(curves, budget)) for budget in breakpoints(curves)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


@given(curves=MIXED, budget=st.integers(0, 100))
@FAST
def test_what_is_left_buys_nothing_more(curves: dict[str, Curve[int]], budget: int) -> None:
    budget += least(curves)
    chosen = allocate(curves, budget)
    left = budget - cost_of(curves, chosen)
    for name, found in curves.items():
        for option in range(chosen[name] + 1, len(found.costs)):
            fits = found.costs[option] - found.costs[chosen[name]] <= left
            assert not (fits and found.losses[option] < found.losses[chosen[name]])


@given(curves=MIXED, budget=st.integers(0, 100), unit=st.sampled_from([0.25, 2.0, 1024.0]))
@FAST
def test_only_the_ratio_of_losses_matters(curves: dict[str, Curve[int]], budget: int, unit: float) -> None:
    budget += least(curves)
    scaled = {
        name: Curve(found.options, found.costs, tuple(unit * loss for loss in found.losses))
        for name, found in curves.items()
    }
    assert allocate(scaled, budget) == allocate(curves, budget)


def test_the_matrix_that_gains_more_gets_the_budget() -> None:
    flat, steep = made([1, 2, 3], [4, 2, 0]), made([1, 2, 3], [400, 200, 0])
    assert allocate({"flat": flat, "steep": steep}, 4) == {"flat": 0, "steep": 2}
    assert loss_of({"flat": flat, "steep": steep}, {"flat": 1, "steep": 1}) > 4


def test_a_jump_that_does_not_fit_leaves_its_money_to_others() -> None:
    jump, small = made([1, 100], [1000, 0]), made([1, 2, 3], [2, 1, 0])
    assert allocate({"jump": jump, "small": small}, 50) == {"jump": 0, "small": 2}
    assert allocate({"jump": jump, "small": small}, 101) == {"jump": 1, "small": 0}


def test_no_matrices_need_no_budget() -> None:
    assert allocate({}, 0) == {}


def test_equal_singular_values_are_spent_in_order() -> None:
    spectrum = torch.tensor([0.3] * 5 + [0.003] * 5, dtype=torch.float64)
    tail = WeightedSVD(spectrum, spectrum, spectrum).tail()
    found = curve("factored", (10, 20), tail)
    chosen = allocate({"a": found}, parameters("factored", (10, 20), 5))
    assert found.options[chosen["a"]] == 5


def test_equal_gains_are_spent_before_smaller_ones() -> None:
    curves = {"small": made([1, 2], [1, 0]), "large": made([1, 2, 3], [4, 2, 0])}
    assert allocate(curves, 3) == {"small": 0, "large": 1}


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(RankError, match="a budget of 1,199 cannot be reached: the least is 1,200"):
        allocate({"a": made([1000, 2000], [1, 0]), "b": made([200, 300], [1, 0])}, 1199)


# hull


@given(found=st.one_of(any_curve(), convex_curve()))
@settings(FAST, max_examples=100)
def test_the_hull_is_convex_falls_and_lies_below_every_option(found: Curve[int]) -> None:
    chain = hull(found.costs, found.losses)
    slopes = [
        (found.losses[end] - found.losses[start]) / (found.costs[end] - found.costs[start])
        for start, end in pairwise(chain)
    ]
    assert chain[0] == 0
    assert found.losses[chain[-1]] == min(found.losses)
    assert all(first <= second for first, second in pairwise(slopes))
    assert all(slope < 0 for slope in slopes)
    for (start, end), slope in zip(pairwise(chain), slopes, strict=True):
        for option in range(start, end + 1):
            line = found.losses[start] + slope * (found.costs[option] - found.costs[start])
            assert found.losses[option] >= line - 1e-9


@given(found=convex_curve())
@FAST
def test_a_convex_curve_is_its_own_hull(found: Curve[int]) -> None:
    chain = hull(found.costs, found.losses)
    assert chain == list(range(len(chain)))
    assert found.losses[chain[-1]] == 0


# curves


@given(form=FORM, rows=SIDES, columns=SIDES, multiple=MULTIPLES)
@settings(FAST, max_examples=60)
def test_legal_ranks_are_the_multiples_that_save(form: Form, rows: int, columns: int, multiple: int) -> None:
    shape = (rows, columns)
    expected = [rank for rank in range(1, break_even(form, shape) + 1) if rank % multiple == 0]
    assert legal_ranks(form, shape, multiple) == expected


@given(form=FORM, rows=SIDES, columns=SIDES, multiple=MULTIPLES, unit=st.sampled_from([0.5, 1.0, 8.0]))
@FAST
def test_a_curve_ends_in_the_dense_matrix(
    form: Form, rows: int, columns: int, multiple: int, unit: float
) -> None:
    shape = (rows, columns)
    tail = torch.arange(min(shape), -1, -1, dtype=torch.float64)
    found = curve(form, shape, tail, multiple=multiple, unit=unit)
    legal = legal_ranks(form, shape, multiple)
    assert found.options == (*legal, min(shape))
    assert found.costs == (*(parameters(form, shape, rank) for rank in legal), rows * columns)
    assert found.losses == (*(unit * float(tail[rank]) for rank in legal), 0.0)
    assert all(first < second for first, second in pairwise(found.costs))


def test_a_multiple_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple 0: must be at least 1"):
        legal_ranks("factored", (4, 4), 0)


# rules


@given(form=FORM, rows=SIDES, columns=SIDES, multiple=MULTIPLES, fraction=st.floats(0.01, 0.99))
@settings(FAST, max_examples=60)
def test_keep_gives_the_largest_rank_that_fits(
    form: Form, rows: int, columns: int, multiple: int, fraction: float
) -> None:
    shape = (rows, columns)
    legal = legal_ranks(form, shape, multiple)
    rank = uniform(Keep(fraction), form, shape, multiple)
    if not legal:
        assert rank is None
        return
    budget = fraction * rows * columns
    assert rank in legal
    assert rank == legal[0] or parameters(form, shape, rank) <= budget
    assert all(parameters(form, shape, larger) > budget for larger in legal if larger > rank)


@given(form=FORM, rows=SIDES, columns=SIDES, multiple=MULTIPLES, wanted=st.integers(1, 20))
@settings(FAST, max_examples=60)
def test_fixed_gives_its_rank_rounded_down_or_dense(
    form: Form, rows: int, columns: int, multiple: int, wanted: int
) -> None:
    shape = (rows, columns)
    rank = uniform(Fixed(wanted), form, shape, multiple)
    rounded = max(wanted - wanted % multiple, multiple)
    saves = rounded <= min(shape) and parameters(form, shape, rounded) < rows * columns
    assert rank == (rounded if saves else None)


@pytest.mark.parametrize("form", FORMS)
def test_what_would_not_get_smaller_stays_dense(form: Form) -> None:
    shape = (12, 8)
    assert uniform(Keep(1), form, shape) is None
    assert uniform(Keep(0.99), form, shape) is not None
    assert uniform(Fixed(break_even(form, shape)), form, shape) == break_even(form, shape)
    assert uniform(Fixed(break_even(form, shape) + 1), form, shape) is None
    assert uniform(Keep(0.5), form, (1, 8)) is None
    assert uniform(Fixed(1), form, (1, 8)) is None
    assert by_energy(Energy(0.5), form, (1, 8), torch.tensor([1.0, 0.0])) is None
    assert curve(form, (1, 8), torch.tensor([1.0, 0.0])) == Curve((1,), (8,), (0.0,))


@given(
    form=FORM,
    rows=SIDES,
    columns=SIDES,
    multiple=MULTIPLES,
    fraction=st.floats(0.01, 1),
    decay=st.floats(0.1, 1),
)
@settings(FAST, max_examples=60)
def test_energy_gives_the_smallest_rank_that_holds_it(
    form: Form, rows: int, columns: int, multiple: int, fraction: float, decay: float
) -> None:
    shape = (rows, columns)
    spectrum = decay ** torch.arange(min(shape), dtype=torch.float64)
    tail = WeightedSVD(spectrum, spectrum, spectrum).tail()
    rank = by_energy(Energy(fraction), form, shape, tail, multiple)
    allowed = (1 - fraction) * float(tail[0])
    legal = legal_ranks(form, shape, multiple)
    assume(all(abs(float(tail[option]) - allowed) > 1e-12 * float(tail[0]) for option in legal))
    smaller = legal if rank is None else [option for option in legal if option < rank]
    assert all(float(tail[option]) > allowed for option in smaller)
    if rank is not None:
        assert rank in legal
        assert spectrum[:rank].square().sum() >= (fraction - 1e-12) * spectrum.square().sum()


@pytest.mark.parametrize("form", FORMS)
def test_all_the_energy_of_a_full_rank_matrix_is_dense(form: Form) -> None:
    tail = torch.arange(8, -1, -1, dtype=torch.float64)
    assert by_energy(Energy(1), form, (12, 8), tail) is None
    assert by_energy(Energy(1), form, (12, 8), torch.tensor([3.0, 1.0, *[0.0] * 7])) == 2
    assert by_energy(Energy(1), form, (12, 8), torch.zeros(9), multiple=2) == 2


@pytest.mark.parametrize("rank", [0, -3])
def test_a_fixed_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(RankError, match=f"rank {rank}: must be at least 1"):
        Fixed(rank)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, 60.0, float("nan")])
def test_a_fraction_outside_its_interval_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"energy {fraction}: must lie in \(0, 1\]"):
        Energy(fraction)
    with pytest.raises(ConfigError, match=rf"keep {fraction}: must lie in \(0, 1\]"):
        Keep(fraction)


# parts that are chosen together, and alternatives

Tuples = Curve[tuple[Any, ...]]


def as_tuples(name: str, found: Curve[int]) -> Tuples:
    return Curve(tuple((name, option) for option in found.options), found.costs, found.losses)


def tuples(curves: st.SearchStrategy[Curve[int]], least: int = 1) -> st.SearchStrategy[list[Tuples]]:
    return st.lists(curves, min_size=least, max_size=3).map(
        lambda found: [as_tuples(name, own) for name, own in zip("abc", found, strict=False)]
    )


def combinations(curves: list[Tuples]) -> dict[tuple[Any, ...], tuple[int, float]]:
    """Every joint option with its cost and loss."""
    rows = product(*(zip(own.options, own.costs, own.losses, strict=True) for own in curves))
    return {
        tuple(part for option, _, _ in row for part in option): (
            sum(r[1] for r in row),
            sum(r[2] for r in row),
        )
        for row in rows
    }


@given(curves=tuples(st.one_of(any_curve(), convex_curve())))
@FAST
def test_together_is_made_of_what_the_parts_may_become(curves: list[Tuples]) -> None:
    joint, every = together(curves), combinations(curves)
    for option, cost, loss in zip(joint.options, joint.costs, joint.losses, strict=True):
        assert every[option] == (cost, loss)
    assert joint.costs[0] == sum(own.costs[0] for own in curves)
    assert joint.losses[-1] == sum(min(own.losses) for own in curves)
    assert all(first < second for first, second in pairwise(joint.costs))
    assert all(first > second for first, second in pairwise(joint.losses))


@given(curves=tuples(st.one_of(any_curve(), convex_curve())))
@FAST
def test_together_is_the_sum_of_the_hulls(curves: list[Tuples]) -> None:
    joint = together(curves)
    slopes = [
        (joint.losses[place + 1] - joint.losses[place]) / (joint.costs[place + 1] - joint.costs[place])
        for place in range(len(joint.costs) - 1)
    ]
    expected = sorted(-slope for slope, _, _ in hull_steps({str(i): own for i, own in enumerate(curves)}))  # type: ignore[misc]
    assert slopes == sorted(slopes)
    assert sorted(slopes) == sorted(expected)


@given(curves=tuples(st.one_of(any_curve(), convex_curve())))
@settings(FAST, max_examples=100)
def test_every_option_of_together_is_optimal_at_its_cost(curves: list[Tuples]) -> None:
    joint, every = together(curves), combinations(curves).values()
    for cost, loss in zip(joint.costs, joint.losses, strict=True):
        assert loss == min(other for spent, other in every if spent <= cost)


@given(data=st.data(), step=st.integers(1, 6))
@FAST
def test_together_leaves_no_cost_out_on_convex_curves_of_equal_steps(data: st.DataObject, step: int) -> None:
    joint = together(curves := data.draw(tuples(convex_curve(step), 2)))
    for spent, loss in combinations(curves).values():
        fitting = [other for cost, other in zip(joint.costs, joint.losses, strict=True) if cost <= spent]
        assert min(fitting) <= loss


@given(curves=tuples(convex_curve(), 2))
@FAST
def test_no_joint_option_lies_below_together(curves: list[Tuples]) -> None:
    joint = together(curves)
    for cost, loss in combinations(curves).values():
        for (c0, c1), (l0, l1) in zip(pairwise(joint.costs), pairwise(joint.losses), strict=True):
            if c0 <= cost <= c1:
                line = l0 + (l1 - l0) * (cost - c0) / (c1 - c0)
                assert loss >= line - 1e-9


def test_together_of_one_part_is_its_hull_and_of_none_costs_nothing() -> None:
    bump = as_tuples("a", made([1, 2, 3, 4], [9, 8, 1, 0]))
    assert together([bump]) == Curve((("a", 1), ("a", 3), ("a", 4)), (1, 3, 4), (9.0, 1.0, 0.0))
    assert together([]) == Curve(((),), (0,), (0,))


def test_together_keeps_the_order_of_the_parts() -> None:
    parts = [as_tuples("b", made([1, 2], [9, 0])), as_tuples("a", made([5, 6], [1, 0]))]
    assert together(parts).options == (("b", 1, "a", 1), ("b", 2, "a", 1), ("b", 2, "a", 2))


@given(curves=tuples(any_curve()))
@FAST
def test_either_keeps_exactly_what_no_other_beats(curves: list[Tuples]) -> None:
    found = either(curves)
    rows = [
        (option, cost, loss)
        for own in curves
        for option, cost, loss in zip(own.options, own.costs, own.losses, strict=True)
    ]
    kept = list(zip(found.options, found.costs, found.losses, strict=True))
    assert all(row in rows for row in kept)
    assert all(first < second for first, second in pairwise(found.costs))
    assert all(first > second for first, second in pairwise(found.losses))
    for _, cost, loss in rows:
        assert any(own <= cost and other <= loss for _, own, other in kept)
    for option, cost, loss in kept:
        beaten = [
            row for row in rows if row[1] <= cost and row[2] <= loss and (row[1] < cost or row[2] < loss)
        ]
        assert not beaten, option
    assert len(kept) <= len(rows)


def test_either_drops_what_is_beaten() -> None:
    first, second = as_tuples("a", made([2, 4, 6], [5, 3, 0])), as_tuples("b", made([3, 4, 6], [4, 4, 0]))
    assert either([first, second]) == Curve(
        (("a", 1), ("b", 1), ("a", 2), ("a", 3)), (2, 3, 4, 6), (5.0, 4.0, 3.0, 0.0)
    )
    assert either([first]) == first


@given(curves=tuples(any_curve(), 2), others=tuples(any_curve()), beyond=st.integers(0, 60))
@FAST
def test_more_alternatives_never_hurt(curves: list[Tuples], others: list[Tuples], beyond: int) -> None:
    fewer, more = either(curves[:1]), either(curves)
    budget = min(fewer.costs) + beyond

    def best(found: Tuples) -> float:
        return min(loss for cost, loss in zip(found.costs, found.losses, strict=True) if cost <= budget)

    assert best(more) <= best(fewer)


# widths


@given(units=st.integers(1, 40), multiple=MULTIPLES, rows=st.integers(1, 9))
@FAST
def test_a_width_curve_ends_in_full_width(units: int, multiple: int, rows: int) -> None:
    tail = torch.arange(units, -1, -1, dtype=torch.float64)
    found = width_curve(rows * units, tail, multiple=multiple, unit=0.5)
    legal = [width for width in range(1, units) if width % multiple == 0]
    assert legal_widths(units, multiple) == legal
    assert found.options == (*legal, units)
    assert found.costs == tuple(rows * width for width in found.options)
    assert found.losses == (*(0.5 * (units - width) for width in legal), 0.0)


@pytest.mark.parametrize(("units", "multiple"), [(1, 1), (48, 48), (48, 64), (7, 32)])
def test_a_multiple_as_large_as_the_width_leaves_full_width(units: int, multiple: int) -> None:
    assert legal_widths(units, multiple) == []
    found = width_curve(3 * units, torch.arange(units, -1, -1.0), multiple=multiple)
    assert found == Curve((units,), (3 * units,), (0.0,))


@pytest.mark.parametrize("multiple", [0, -8])
def test_a_multiple_of_widths_below_one_is_refused(multiple: int) -> None:
    with pytest.raises(ConfigError, match=f"multiple {multiple}: must be at least 1"):
        legal_widths(48, multiple)
