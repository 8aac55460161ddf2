"""Laws of what several matrices share: optima, monotony, what is exact."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart import ConfigError, NotPositiveDefinite, RankError
from eckart.consensus import Consensus, Member, agree, agree_by_rows
from eckart.linalg import Metric, weighted_error

FAST = settings(deadline=None, max_examples=20, derandomize=True)
SEEDS = st.integers(0, 10_000)
SIDES = st.integers(2, 9)
KINDS = st.sampled_from(["identity", "diagonal", "full"])


def gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def metric(size: int, kind: str, generator: torch.Generator) -> Metric:
    if kind == "identity":
        return Metric(size)
    root = gaussian(size, size + 2, generator) * (0.2 + torch.rand(size, 1, generator=generator))
    moment = root @ root.T
    return Metric(size, moment.diagonal() if kind == "diagonal" else moment)


def members(
    count: int, shape: tuple[int, int], kinds: tuple[str, str], seed: int, alike: float = 0.0
) -> list[Member]:
    generator = torch.Generator().manual_seed(seed)
    common = gaussian(*shape, generator)
    return [
        Member(
            alike * common + gaussian(*shape, generator),
            metric(shape[1], kinds[0], generator),
            metric(shape[0], kinds[1], generator),
            0.5 + float(torch.rand(1, generator=generator)),
        )
        for _ in range(count)
    ]


def loss(found: list[Member], weights: list[Tensor]) -> float:
    return sum(
        member.unit * weighted_error(member.weight - weight, member.inputs, member.outputs)
        for member, weight in zip(found, weights, strict=True)
    )


def best_base(found: list[Member]) -> Tensor:
    """Return the minimiser by the whole normal equations, (m n, m n)."""
    shape = found[0].weight.shape
    normal = sum(m.unit * torch.kron(m.outputs.dense(), m.inputs.dense()) for m in found)
    right = sum(m.unit * m.outputs.times(m.inputs.times(m.weight.T).T) for m in found)
    assert isinstance(normal, Tensor)
    assert isinstance(right, Tensor)
    solved: Tensor = torch.linalg.solve(normal, right.flatten())
    return solved.view(shape)


@FAST
@given(count=st.integers(2, 4), m=SIDES, n=SIDES, kind=KINDS, seed=SEEDS)
def test_without_an_output_metric_the_base_is_the_closed_form(
    count: int, m: int, n: int, kind: str, seed: int
) -> None:
    found = members(count, (m, n), (kind, "identity"), seed)
    total = torch.stack([member.unit * member.inputs.dense() for member in found]).sum(0)
    cross = torch.stack([member.unit * member.weight @ member.inputs.dense() for member in found]).sum(0)
    expected = cross @ torch.linalg.inv(total)
    base = agree(found).base
    assert torch.allclose(base, expected, atol=1e-8 * float(expected.abs().max()))
    mean = torch.stack([member.weight for member in found]).mean(0)
    assert not torch.allclose(mean, expected, atol=1e-8)


def test_without_any_metric_it_is_the_mean() -> None:
    found = [Member(m.weight, m.inputs, m.outputs) for m in members(3, (5, 4), ("identity", "identity"), 0)]
    mean = torch.stack([member.weight for member in found]).mean(0)
    assert torch.allclose(agree(found).base, mean, atol=1e-14)


@FAST
@given(count=st.integers(2, 4), m=SIDES, n=SIDES, inputs=KINDS, outputs=KINDS, seed=SEEDS)
def test_in_two_metrics_the_base_is_all_but_optimal(
    count: int, m: int, n: int, inputs: str, outputs: str, seed: int
) -> None:
    found = members(count, (m, n), (inputs, outputs), seed)
    least = loss(found, [best_base(found)] * count)
    result = agree(found)
    assert least <= sum(result.losses) * (1 + 1e-12) <= least * 1.1 + 1e-9
    plain = torch.stack([member.weight for member in found]).mean(0)
    if (inputs, outputs) == ("full", "full"):
        assert loss(found, [plain] * count) > sum(result.losses)
    assert sum(result.losses) == pytest.approx(loss(found, [result.base] * count))


@FAST
@given(
    count=st.integers(2, 4), m=SIDES, n=SIDES, inputs=KINDS, outputs=KINDS, seed=SEEDS,
    scaled=st.booleans(), data=st.data(),
)  # fmt: skip
def test_sweeps_never_raise_the_loss_and_end_at_what_they_say(
    count: int, m: int, n: int, inputs: str, outputs: str, seed: int, scaled: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(m, n)))
    found = members(count, (m, n), (inputs, outputs), seed, alike=1.0)
    result = agree(found, rank=rank, scaled=scaled)
    for before, after in pairwise(result.course):
        assert after <= before * (1 + 1e-9) + 1e-9
    assert loss(found, [result.dense(place) for place in range(count)]) == pytest.approx(
        result.course[-1], rel=1e-6, abs=1e-8
    )
    assert sum(result.losses) == pytest.approx(result.course[-1], rel=1e-9, abs=1e-12)
    if rank or scaled:
        assert result.course[-1] < result.course[0]


@FAST
@given(m=st.integers(3, 9), n=st.integers(3, 9), kinds=st.tuples(KINDS, KINDS), seed=SEEDS, data=st.data())
def test_two_with_one_metric_share_all_of_twice_the_rank(
    m: int, n: int, kinds: tuple[str, str], seed: int, data: st.DataObject
) -> None:
    """Two products of rank r differ by one of rank 2 r: its optimum is that of Eckart and Young."""
    rank = data.draw(st.integers(1, min(m, n) // 2))
    first, second = members(2, (m, n), kinds, seed)
    pair = [first, Member(second.weight, first.inputs, first.outputs, first.unit)]
    half = (first.weight - second.weight) / 2
    spectrum = torch.linalg.svdvals(first.outputs.root_times(first.inputs.root_times(half.T).T))
    least = 2 * first.unit * float(spectrum[2 * rank :].square().sum())
    opposite = 2 * first.unit * float(spectrum[rank:].square().sum())
    found = agree(pair, rank=rank).course[-1]
    assert least * (1 - 1e-9) - 1e-9 <= found <= least * (1 + 1e-6) + 1e-6
    assert opposite > least + 1e-6


@pytest.mark.parametrize("kinds", [("full", "full"), ("identity", "identity"), ("full", "diagonal")])
def test_what_is_of_this_kind_is_found(kinds: tuple[str, str]) -> None:
    """A base with scales, and one with differences, come back exactly."""
    generator = torch.Generator().manual_seed(1)
    base = gaussian(8, 7, generator)
    scales = [torch.rand(8, generator=generator, dtype=torch.float64) + 0.5 for _ in range(3)]
    plain = members(3, (8, 7), kinds, 2)

    def given(weights: list[Tensor]) -> list[Member]:
        return [Member(weight, m.inputs, m.outputs, m.unit) for weight, m in zip(weights, plain, strict=True)]

    scaled = given([scale[:, None] * base for scale in scales])
    close = agree(scaled, scaled=True, tolerance=1e-6, sweeps=150)
    assert close.course[-1] < 1e-4 * agree(scaled).course[-1]
    products = [gaussian(8, 1, generator) @ gaussian(1, 7, generator) for _ in range(3)]
    near = agree(given([base + product for product in products]), rank=1, tolerance=1e-6, sweeps=150)
    assert near.course[-1] < 2e-2 * near.course[0]
    alike = agree(given([base] * 3))
    assert torch.allclose(alike.base, base, atol=1e-9)
    assert alike.course[-1] < 1e-12 * float(base.square().sum())


@FAST
@given(m=SIDES, n=SIDES, inputs=KINDS, outputs=st.sampled_from(["identity", "diagonal"]), seed=SEEDS)
def test_two_with_rows_of_their_own_weight_have_an_exact_optimum(
    m: int, n: int, inputs: str, outputs: str, seed: int
) -> None:
    pair = members(2, (m, n), (inputs, outputs), seed)
    best = best_base(pair)
    found = agree_by_rows(*pair)
    assert torch.allclose(found, best, atol=1e-6 * float(best.abs().max()))
    mean = (pair[0].weight + pair[1].weight) / 2
    assert loss(pair, [mean] * 2) > loss(pair, [found] * 2) - 1e-12
    same = [Member(pair[0].weight, member.inputs, member.outputs, member.unit) for member in pair]
    assert torch.allclose(agree_by_rows(*same), pair[0].weight, atol=1e-10)


def test_more_rank_and_scales_cost_less() -> None:
    found = members(3, (9, 8), ("full", "full"), 5, alike=1.0)
    ends = [agree(found, rank=rank, tolerance=1e-4, sweeps=40).course[-1] for rank in range(0, 9, 2)]
    assert all(after < before for before, after in pairwise(ends))
    assert ends[-1] < 1e-12 * ends[0]  # differences of full rank leave nothing
    assert agree(found, scaled=True).course[-1] < ends[0]


def test_a_row_of_zeros_keeps_its_scale() -> None:
    found = [
        Member(torch.cat([m.weight, torch.zeros(1, 4)]), m.inputs, Metric(6), m.unit)
        for m in members(2, (5, 4), ("full", "identity"), 0)
    ]
    result = agree(found, scaled=True)
    assert isinstance(result, Consensus)
    assert result.scales is not None
    assert bool(torch.isfinite(torch.stack(result.scales)).all())
    assert result.course[-1] < result.course[0]


def test_what_cannot_share_is_refused() -> None:
    first, second = members(2, (5, 4), ("full", "full"), 0)
    other = members(1, (4, 5), ("full", "full"), 0)[0]
    with pytest.raises(ConfigError, match="shapes 5 x 4, 4 x 5 cannot share: give two or more of one shape"):
        agree([first, other])
    with pytest.raises(ConfigError, match="shapes 5 x 4 cannot share"):
        agree([first])
    with pytest.raises(RankError, match="rank 5 for a 5 x 4 matrix: legal are 1 to 4"):
        agree([first, second], rank=5)
    with pytest.raises(ConfigError, match="5 x 4 and 5 x 4: give .* output metrics that are diagonal"):
        agree_by_rows(first, second)
    flat = Metric(4, torch.tensor([1.0, 1, 1, 0]))
    with pytest.raises(NotPositiveDefinite, match="metrics of size 4 .* singular together: raise `damp`"):
        agree([Member(first.weight, flat, first.outputs)] * 2)
    with pytest.raises(NotPositiveDefinite, match="metrics of size 4 .* or calibrate on more than 4 tokens"):
        agree([Member(first.weight, Metric(4, torch.ones(4, 4)), first.outputs)] * 2)
    with pytest.raises(NotPositiveDefinite, match="a metric of size 4 is singular: raise `damp`"):
        agree_by_rows(*[Member(first.weight, Metric(4, torch.ones(4, 4)), Metric(5))] * 2)
