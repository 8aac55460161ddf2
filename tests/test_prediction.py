"""The correction is monotone and goes through what was measured; the front and the search keep their laws."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eckart import front, prediction, seeking

LOSS = st.floats(1e-6, 1e3)
PAIRS = st.lists(st.tuples(LOSS, LOSS), min_size=1, max_size=6)


@given(PAIRS, st.lists(st.floats(0, 1e4), min_size=2, max_size=8))
def test_a_correction_is_monotone(pairs: list[tuple[float, float]], values: list[float]) -> None:
    correction = prediction.fit(pairs)
    found = [correction.of(value) for value in sorted(values)]
    assert all(b >= a * (1 - 1e-9) for a, b in pairwise(found))
    assert correction.of(0.0) == 0.0
    assert all(value >= 0 for value in found)


@given(st.dictionaries(LOSS, LOSS, min_size=1, max_size=6))
def test_monotone_measurements_are_met(measured: dict[float, float]) -> None:
    pairs = list(zip(sorted(measured), sorted(measured.values()), strict=True))
    correction = prediction.fit(pairs)
    for predicted, value in pairs:
        assert correction.of(predicted) == pytest.approx(value, rel=1e-6)


@given(LOSS, LOSS, st.floats(1e-9, 1e6))
def test_one_point_multiplies_by_its_ratio(predicted: float, measured: float, other: float) -> None:
    found = prediction.fit([(predicted, measured)]).of(other)
    assert found == pytest.approx(other * measured / predicted, rel=1e-9)


def test_between_points_a_power_law_is_met_and_not_by_the_prediction_alone() -> None:
    def law(predicted: float) -> float:
        return float(3 * predicted**1.4)

    correction = prediction.fit([(p, law(p)) for p in (0.01, 0.1, 1.0)])
    for predicted in (0.02, 0.05, 0.7):
        assert correction.of(predicted) == pytest.approx(law(predicted), rel=1e-9)
        assert predicted != pytest.approx(law(predicted), rel=0.1)
    # Beyond the points the nearest ratio holds.
    assert correction.of(2.0) == pytest.approx(2 * law(1.0))
    assert correction.of(1e-4) == pytest.approx(1e-4 * law(0.01) / 0.01)


def test_falling_measurements_are_pooled_by_the_mean_of_their_logarithms() -> None:
    correction = prediction.fit([(1.0, 4.0), (2.0, 1.0), (3.0, 8.0)])
    assert [place for place, _ in correction.knots] == [1.0, 2.0, 3.0]
    assert [level for _, level in correction.knots] == pytest.approx([2.0, 2.0, 8.0])


def test_increases_without_a_logarithm_say_nothing() -> None:
    assert prediction.fit([(0.0, 1.0), (0.1, -0.01), (0.2, 0.0)]) == prediction.Correction()
    assert prediction.Correction().of(0.3) == 0.3
    assert prediction.fit([(0.1, -0.01), (0.2, 0.4)]).knots == ((0.2, 0.4),)


def test_left_out_points_are_expected_from_the_others() -> None:
    assert prediction.left_out([(0.1, 0.3)]) == [None]
    assert prediction.left_out([(0.1, 0.3), (0.2, 0.4)]) == pytest.approx([0.2, 0.6])
    law = [(p, 2 * p**1.2) for p in (0.1, 0.4, 0.9)]
    assert prediction.left_out(law)[1] == pytest.approx(law[1][1])


POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    found = front.front([(float(a), float(b)) for a, b in points])
    assert found == [not any(beats(other, point) for other in points) for point in points]


@given(POINTS, st.randoms())
def test_the_front_does_not_depend_on_the_order(points: list[tuple[int, int]], random: object) -> None:
    shuffled = list(points)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    own = dict(zip(points, front.front([(float(a), float(b)) for a, b in points])))
    other = dict(zip(shuffled, front.front([(float(a), float(b)) for a, b in shuffled])))
    assert own == other


@given(
    st.integers(1, 60).flatmap(
        lambda size: st.tuples(
            st.lists(st.floats(0, 10), min_size=size, max_size=size), st.floats(0, 10), st.integers(-5, 70)
        )
    )
)
def test_a_search_finds_the_smallest_place(given_: tuple[list[float], float, int]) -> None:
    """Whatever it is guessed to be; and it says so where there is none."""
    falling, limit, guess = sorted(given_[0], reverse=True), given_[1], given_[2]
    place, tried = seeking.smallest(
        falling.__getitem__, limit, 0, len(falling) - 1, lambda known: guess, evaluations=100
    )
    within = [index for index, value in enumerate(falling) if value <= limit]
    assert place == (within[0] if within else None)
    assert all(tried[index] == falling[index] for index in tried)
    # A wrong guess costs at most every third step.
    assert len(tried) <= 3 * math.ceil(math.log2(len(falling) + 1)) + 3


def test_a_good_guess_is_quick_and_a_bad_one_is_left() -> None:
    def value(place: int) -> float:
        return float(1000 - place)

    place, tried = seeking.smallest(value, 400, 0, 999, lambda known: 600, evaluations=100)
    assert (place, len(tried)) == (600, 2)
    place, tried = seeking.smallest(value, 400, 0, 999, lambda known: 5, evaluations=100)
    assert place == 600
    assert len(tried) < 35


def test_what_is_returned_was_within_the_limit_when_evaluations_run_out() -> None:
    def value(place: int) -> float:
        return float(1000 - place)

    for evaluations in range(1, 12):
        place, tried = seeking.smallest(value, 400, 0, 999, lambda known: None, evaluations)
        assert place is not None
        assert tried[place] <= 400
        assert len(tried) <= evaluations + 1
