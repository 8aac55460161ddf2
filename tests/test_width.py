"""Laws of narrower dimensions: every width is checked against its definition, every order by brute force."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.errors import ConfigError, NotPositiveDefinite, RankError
from eckart.linalg import Metric, weighted_error
from eckart.width import LANDMARKS, ORDERS, Landmarks, Narrowing, by_curvature, by_energy, narrow

from .test_linalg import FAST, KINDS, PAIRS, SEEDS, gaussian, moment, rounding, seeded

UNITS, BLOCKS, ROWS = st.integers(1, 7), st.integers(1, 3), st.integers(1, 6)
SPREAD = 1e4
"""Times the rounding of a weight: the condition number of every metric made here is at most 1e3."""


@dataclass(frozen=True, slots=True)
class Case:
    """A weight (m, u b) that reads u units of b channels, under two metrics."""

    weight: Tensor
    inputs: Metric
    outputs: Metric
    units: int

    @property
    def block(self) -> int:
        return self.inputs.size // self.units

    def error(self, candidate: Tensor) -> float:
        return weighted_error(self.weight - candidate, self.inputs, self.outputs)

    def order(self, landmarks: Landmarks = "curvature") -> Tensor:
        return ORDERS[landmarks](self.weight, self.inputs, self.outputs, self.units)

    def narrowing(self, order: Tensor | None = None) -> Narrowing:
        return narrow(self.weight, self.inputs, self.outputs, self.order() if order is None else order)

    def channels(self, units: Tensor) -> Tensor:
        return torch.arange(self.inputs.size).view(self.units, -1)[units].flatten()

    def padded(self, small: Tensor, units: Tensor) -> Tensor:
        wide = torch.zeros_like(self.weight)
        wide[:, self.channels(units)] = small
        return wide

    def cut(self, units: Tensor) -> Tensor:
        """The weight without the columns of other units, nothing re-fitted."""
        return self.padded(self.weight[:, self.channels(units)], units)

    def formula(self, kept: list[int]) -> float:
        """tr(C W_R (H_RR - H_RS H_SS^-1 H_SR) W_R^T), written out."""
        kept_channels = self.channels(torch.tensor(kept, dtype=torch.int64))
        rest = [unit for unit in range(self.units) if unit not in kept]
        gone = self.channels(torch.tensor(rest, dtype=torch.int64))
        gram, weight = self.inputs.dense(), self.weight[:, gone]
        own, cross = gram[kept_channels][:, kept_channels], gram[kept_channels][:, gone]
        schur = gram[gone][:, gone] - cross.T @ torch.linalg.solve(own, cross)
        return float((self.outputs.dense() @ weight @ schur @ weight.T).trace())

    @property
    def allowed(self) -> float:
        return SPREAD * torch.finfo(torch.float64).eps * self.inputs.size * self.error(0 * self.weight)


def made(
    rows: int,
    units: int,
    block: int,
    kinds: tuple[str, str],
    seed: int,
    damp: float = 0.0,
    scale: float = 1.0,
) -> Case:
    generator = seeded(seed)
    columns = units * block
    weight = scale * gaussian(rows, columns, generator)
    inputs, outputs = moment(kinds[0], columns, generator), moment(kinds[1], rows, generator)
    return Case(weight, Metric(columns, inputs, damp), Metric(rows, outputs, damp), units)


FULL = ("full", "full")


# every width of one order


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("damp", [0.0, 1e-4, 1.0, 100.0])
@given(rows=ROWS, units=UNITS, block=BLOCKS, seed=SEEDS, scale=st.sampled_from([1e-6, 1.0, 1e6]))
@FAST
def test_full_width_is_the_weight_itself_for_every_damping(
    kinds: tuple[str, str], damp: float, rows: int, units: int, block: int, seed: int, scale: float
) -> None:
    case = made(rows, units, block, kinds, seed, damp, scale)
    found = case.narrowing(torch.randperm(units, generator=seeded(seed)))
    assert (found.refit(units) - case.weight).norm() <= rounding(case.weight, SPREAD)
    assert found.tail()[units] == 0
    assert torch.equal(found.units(units), torch.arange(units))
    if units > 1:
        one_less = case.padded(found.refit(units - 1), found.units(units - 1))
        assert (one_less - case.weight).norm() > rounding(case.weight, SPREAD)


@pytest.mark.parametrize("kinds", PAIRS)
@given(rows=ROWS, units=UNITS, block=BLOCKS, seed=SEEDS)
@FAST
def test_every_width_costs_what_the_definition_says(
    kinds: tuple[str, str], rows: int, units: int, block: int, seed: int
) -> None:
    case = made(rows, units, block, kinds, seed)
    found = case.narrowing(torch.randperm(units, generator=seeded(seed)))
    tail = found.tail()
    assert len(tail) == units + 1
    assert tail[0] == pytest.approx(case.error(0 * case.weight), rel=0, abs=case.allowed)
    for width in range(1, units + 1):
        kept = found.units(width)
        fitted = case.padded(found.refit(width), kept)
        assert tail[width] == pytest.approx(case.formula(kept.tolist()), rel=0, abs=case.allowed)
        assert tail[width] == pytest.approx(case.error(fitted), rel=0, abs=case.allowed)
    assert tail[0] - tail[units] > case.allowed


@pytest.mark.parametrize("landmarks", LANDMARKS)
@given(rows=ROWS, units=UNITS, block=BLOCKS, seed=SEEDS)
@FAST
def test_the_curve_falls_to_zero_along_nested_units(
    landmarks: Landmarks, rows: int, units: int, block: int, seed: int
) -> None:
    case = made(rows, units, block, FULL, seed)
    order = case.order(landmarks)
    assert torch.equal(order.sort().values, torch.arange(units))
    found = case.narrowing(order)
    assert (found.tail().diff() <= 0).all()
    assert found.tail()[-1] == 0 < found.tail()[0]
    for width in range(1, units + 1):
        assert torch.equal(found.units(width), order[:width].sort().values)
        assert set(found.units(width).tolist()) <= set(found.units(min(width + 1, units)).tolist())
        assert found.refit(width).shape == (rows, width * block)


@pytest.mark.parametrize("kinds", PAIRS)
@given(rows=ROWS, units=UNITS, block=BLOCKS, seed=SEEDS)
@FAST
def test_a_refit_never_errs_more_than_cut_columns(
    kinds: tuple[str, str], rows: int, units: int, block: int, seed: int
) -> None:
    case = made(rows, units, block, kinds, seed)
    found = case.narrowing()
    for width in range(1, units):
        kept = found.units(width)
        fitted, plain = case.padded(found.refit(width), kept), case.cut(kept)
        assert case.error(fitted) <= case.error(plain) + case.allowed
        if kinds[0] == "full":
            assert case.error(fitted) < case.error(plain)
        else:  # channels that are not correlated cannot stand for one another
            assert (fitted - plain).norm() <= rounding(case.weight, SPREAD)


@pytest.mark.parametrize("kind", KINDS)
@given(rows=ROWS, units=st.integers(2, 7), block=BLOCKS, seed=SEEDS, step=st.sampled_from([1e-6, 1e-3, 1.0]))
@FAST
def test_no_other_weight_on_those_units_does_better(
    kind: str, rows: int, units: int, block: int, seed: int, step: float
) -> None:
    case = made(rows, units, block, ("full", kind), seed)
    width = 1 + seed % (units - 1)
    found = case.narrowing()
    fitted, kept = found.refit(width), found.units(width)
    for draw in range(3):
        change = step * gaussian(rows, width * block, seeded(draw))
        best, rival = case.padded(fitted, kept), case.padded(fitted + change, kept)
        # At the minimum of a quadratic, the first order vanishes: what is left is the change's own error.
        own = weighted_error(case.padded(change, kept), case.inputs, case.outputs)
        slack = case.allowed + SPREAD * 1e-16 * (own * case.error(0 * case.weight)) ** 0.5
        assert case.error(rival) - case.error(best) == pytest.approx(own, rel=1e-9, abs=slack)


@given(rows=ROWS, units=st.integers(2, 7), block=BLOCKS, seed=SEEDS)
@FAST
def test_the_refit_is_the_same_for_every_output_metric(rows: int, units: int, block: int, seed: int) -> None:
    case = made(rows, units, block, ("full", "identity"), seed)
    order, other = case.order(), Metric(rows, moment("full", rows, seeded(seed + 1)))
    for width in range(1, units):
        plain = case.narrowing(order).refit(width)
        weighted = narrow(case.weight, case.inputs, other, order).refit(width)
        assert (plain - weighted).norm() <= rounding(case.weight, SPREAD)
        cut = case.weight[:, case.channels(order[:width].sort().values)]
        assert (plain - cut).norm() > rounding(case.weight, SPREAD)


def test_the_refit_is_least_squares_on_the_inputs() -> None:
    generator = seeded(4)
    inputs = gaussian(200, 9, generator) @ gaussian(9, 9, generator)
    weight = gaussian(5, 9, generator)
    found = narrow(weight, Metric(9, inputs.T @ inputs / 200), Metric(5), torch.randperm(9))
    for width in range(1, 9):
        kept = found.units(width)
        solved = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
        assert (found.refit(width) - solved).norm() <= 1e-9 * solved.norm()
        assert (weight[:, kept] - solved).norm() > 1e-3 * solved.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_is_computed_in_float64(dtype: torch.dtype) -> None:
    case = made(4, 6, 1, FULL, 0)
    low = Case(case.weight.to(dtype), case.inputs, case.outputs, 6)
    exact = Case(low.weight.double(), case.inputs, case.outputs, 6)
    for landmarks in LANDMARKS:
        order = low.order(landmarks)
        assert torch.equal(order, exact.order(landmarks))
        assert low.narrowing(order).refit(3).dtype is torch.float64
        assert torch.equal(low.narrowing(order).refit(3), exact.narrowing(order).refit(3))


# orders


def shuffled(case: Case, generator: torch.Generator) -> tuple[Case, Tensor]:
    """The same dimension with its units, and the channels of each, in another order."""
    units = torch.randperm(case.units, generator=generator)
    inner = [torch.randperm(case.block, generator=generator) for _ in range(case.units)]
    places = torch.cat([int(unit) * case.block + own for unit, own in zip(units, inner, strict=True)])
    inputs = Metric(case.inputs.size, case.inputs.dense()[places][:, places])
    return Case(case.weight[:, places], inputs, case.outputs, case.units), units


@pytest.mark.parametrize("landmarks", LANDMARKS)
@given(rows=ROWS, units=st.integers(2, 7), block=BLOCKS, seed=SEEDS)
@FAST
def test_the_order_of_the_channels_does_not_matter(
    landmarks: Landmarks, rows: int, units: int, block: int, seed: int
) -> None:
    case = made(rows, units, block, FULL, seed)
    other, moved = shuffled(case, seeded(seed + 1))
    own, again = case.order(landmarks), other.order(landmarks)
    assert torch.equal(moved[again], own)
    losses, found = case.narrowing(own).losses, other.narrowing(again).losses
    assert (losses - found).abs().max() <= case.allowed
    for width in range(1, units):
        plain = case.padded(case.narrowing(own).refit(width), own[:width].sort().values)
        turned = other.padded(other.narrowing(again).refit(width), again[:width].sort().values)
        assert case.error(plain) == pytest.approx(other.error(turned), rel=0, abs=case.allowed)


def brute_force(case: Case, batches: int = 48) -> list[int]:
    """Backward elimination from the definition: what costs least with all the rest goes first."""
    left, gone = list(range(case.units)), list[int]()
    while len(left) > 1:
        costs = {unit: case.formula([other for other in left if other != unit]) for unit in left}
        for unit in sorted(left, key=costs.__getitem__)[: max(1, len(left) // batches)]:
            left.remove(unit)
            gone.append(unit)
    return [*left, *reversed(gone)]


@pytest.mark.parametrize("kind", KINDS)
@given(rows=ROWS, units=UNITS, block=BLOCKS, seed=SEEDS)
@FAST
def test_curvature_is_greedy_elimination(kind: str, rows: int, units: int, block: int, seed: int) -> None:
    case = made(rows, units, block, ("full", kind), seed)
    assert case.order().tolist() == brute_force(case)


def test_greedy_elimination_is_no_other_order() -> None:
    case = made(4, 7, 2, FULL, 3)
    assert brute_force(case) == case.order("curvature").tolist()
    assert len({tuple(case.order(landmarks).tolist()) for landmarks in LANDMARKS}) == len(LANDMARKS)


@pytest.mark.parametrize(("units", "block"), [(60, 1), (97, 1), (100, 2)])
def test_many_units_go_a_small_share_at_a_time(units: int, block: int) -> None:
    case = made(3, units, block, FULL, 1)
    least = sorted(range(units), key=lambda unit: case.formula([u for u in range(units) if u != unit]))
    batch = max(1, units // 48)
    assert set(case.order()[-batch:].tolist()) == set(least[:batch])
    curve = case.narrowing().tail()
    for landmarks in ("leverage", "energy"):
        assert curve[units // 2] < case.narrowing(case.order(landmarks)).tail()[units // 2]


def test_batches_are_those_of_the_definition() -> None:
    case = made(3, 97, 1, FULL, 1)
    assert case.order().tolist() == brute_force(case)
    assert case.order().tolist() != brute_force(case, batches=4)


def test_a_channel_that_others_replace_goes_first() -> None:
    generator = seeded(0)
    inputs = gaussian(300, 6, generator)
    inputs[:, 5] = 10 * inputs[:, 4] + 1e-3 * inputs[:, 5]
    weight = gaussian(4, 6, generator)
    metrics = Metric(6, inputs.T @ inputs / 300), Metric(4)
    assert int(by_curvature(weight, *metrics, 6)[-1]) in (4, 5)
    assert int(by_energy(weight, *metrics, 6)[0]) == 5
    found = narrow(weight, *metrics, by_curvature(weight, *metrics, 6))
    assert found.tail()[5] < 1e-5 * found.tail()[0]


@given(rows=ROWS, units=UNITS, block=BLOCKS, seed=SEEDS)
@FAST
def test_energy_and_leverage_are_what_they_say(rows: int, units: int, block: int, seed: int) -> None:
    case = made(rows, units, block, FULL, seed)
    gram, curvature = case.inputs.dense(), case.outputs.dense()
    alone = [float(case.weight[:, j] @ curvature @ case.weight[:, j] * gram[j, j]) for j in range(len(gram))]
    values, vectors = torch.linalg.eigh(gram)
    leverage = (vectors.square() * (values / (values + values.mean()))).sum(1).tolist()
    expected: dict[Landmarks, list[float]] = {"energy": alone, "leverage": leverage}
    for landmarks, scores in expected.items():
        sums = torch.tensor(scores, dtype=torch.float64).view(units, block).sum(1)
        assert torch.equal(case.order(landmarks), sums.argsort(descending=True))


def test_without_metrics_the_long_columns_are_kept() -> None:
    """Plain SVD's setting: no data, so every order that looks at the weight goes by its columns."""
    weight = gaussian(5, 8, seeded(2))
    expected = weight.square().sum(0).argsort(descending=True)
    for landmarks in ("curvature", "energy"):
        order = ORDERS[landmarks](weight, Metric(8), Metric(5), 8)
        assert torch.equal(order, expected)
        found = narrow(weight, Metric(8), Metric(5), order)
        assert torch.allclose(found.refit(3), weight[:, found.units(3)])


# what is refused


@pytest.mark.parametrize("width", [-1, 0, 6])
def test_a_width_that_is_not_there_is_refused(width: int) -> None:
    found = made(3, 5, 2, FULL, 0).narrowing()
    for ask in (found.units, found.refit):
        with pytest.raises(RankError, match=f"width {width} of 5: legal are 1 to 5"):
            ask(width)


def test_a_singular_metric_is_refused_with_the_way_out() -> None:
    inputs, weight = gaussian(3, 5, seeded(3)), gaussian(4, 5, seeded(4))
    gram = inputs.T @ inputs
    message = r"second moment of 5 channels fails at pivot \d: raise `damp`, or calibrate on more than 5"
    with pytest.raises(NotPositiveDefinite, match=message):
        narrow(weight, Metric(5, gram), Metric(4), torch.arange(5))
    damped = Metric(5, gram, 1e-4)
    assert narrow(weight, damped, Metric(4), by_curvature(weight, damped, Metric(4), 5)).tail()[-1] == 0
    dead = torch.tensor([2.0, 1.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    with pytest.raises(NotPositiveDefinite, match="second moment of 5 channels is singular: raise `damp`"):
        by_curvature(weight, Metric(5, dead), Metric(4), 5)


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 4), (3, 5), (4, 3)])
def test_metrics_of_the_wrong_size_are_refused(inputs: int, outputs: int) -> None:
    message = f"a weight of 4 x 3 with metrics for {outputs} outputs and {inputs} inputs"
    with pytest.raises(ConfigError, match=message):
        narrow(gaussian(4, 3, seeded(0)), Metric(inputs), Metric(outputs), torch.arange(inputs))


@pytest.mark.parametrize("order", [[0, 1, 1, 2, 3, 4], [0, 1, 2, 3], [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4]])
def test_an_order_that_is_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(ConfigError, match=f"order of {len(order)} units for 6 channels: give a permutation"):
        narrow(gaussian(4, 6, seeded(0)), Metric(6), Metric(4), torch.tensor(order))


def test_every_landmark_order_is_enrolled() -> None:
    assert tuple(ORDERS) == LANDMARKS
    case = made(4, 6, 2, FULL, 5)
    for first, second in product(LANDMARKS, LANDMARKS):
        # Landmarks choose the units; the fit and the curve's ends do not depend on them.
        own, other = (case.narrowing(case.order(landmarks)) for landmarks in (first, second))
        assert own.tail()[0] == pytest.approx(float(other.tail()[0]), rel=1e-9)
