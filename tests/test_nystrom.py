"""Laws of Nystrom, pivoted Cholesky, interpolative and CUR decompositions."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart import ConfigError, NotFinite, NotPositiveDefinite, RankError, interpolative, nystrom, stats
from eckart.linalg import Metric, ridge_leverage, truncated_svd, weighted_error, weighted_svd

from . import tiny

FAST = settings(deadline=None, max_examples=25, derandomize=True)
SEEDS = st.integers(0, 10_000)
WAYS: tuple[nystrom.Landmarks, ...] = ("greedy", "leverage", "uniform")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def semidefinite(size: int, seed: int, decay: float = 0.6, rank: int | None = None) -> Tensor:
    """Return a matrix with eigenvalues decay^i, the first `rank` of them."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)).Q
    values = decay ** torch.arange(size, dtype=torch.float64)
    if rank is not None:
        values[rank:] = 0
    found: Tensor = (basis * values) @ basis.T
    return found


def low_rank(rows: int, columns: int, rank: int, seed: int, noise: float = 0.0) -> Tensor:
    generator = seeded(seed)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (rows, columns))
    return left @ right.T + noise * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("how", WAYS)
@FAST
@given(size=st.integers(2, 24), seed=SEEDS, data=st.data())
def test_as_many_landmarks_as_the_rank_are_exact(
    how: nystrom.Landmarks, size: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, size))
    matrix = semidefinite(size, seed, 0.8, rank)
    landmarks = nystrom.choose(matrix, rank, how, seeded(seed))
    found = nystrom.nystrom(matrix, landmarks)
    tolerance = 1e-4 if how == "uniform" else 1e-6  # columns drawn blindly may be nearly dependent
    assert torch.allclose(found.dense(), matrix, atol=tolerance)
    assert float((torch.zeros_like(matrix) - matrix).abs().max()) > tolerance


@FAST
@given(size=st.integers(4, 24), seed=SEEDS, how=st.sampled_from(WAYS))
def test_nested_landmarks_only_help_and_never_overshoot(size: int, seed: int, how: nystrom.Landmarks) -> None:
    matrix = semidefinite(size, seed, 0.7)
    landmarks = nystrom.choose(matrix, size, how, seeded(seed))
    assert landmarks.sort().values.tolist() == list(range(size))
    gaps = [nystrom.error(matrix, nystrom.nystrom(matrix, landmarks[:k])) for k in range(1, size + 1)]
    for before, after in pairwise(gaps):
        assert after.trace <= before.trace + 1e-10
    for gap in gaps:
        assert gap.trace >= gap.best_trace - 1e-10
        assert gap.frobenius >= gap.best_frobenius - 1e-10
        assert gap.spectral >= gap.best_spectral - 1e-10
    assert gaps[0].trace > gaps[-1].trace + 1e-3
    rest = matrix - nystrom.nystrom(matrix, landmarks[: size // 2]).dense()
    assert float(torch.linalg.eigvalsh(rest).min()) > -1e-10


@FAST
@given(size=st.integers(2, 20), seed=SEEDS, decay=st.floats(0.2, 0.95))
def test_pivoted_cholesky_knows_its_error_and_keeps_the_bound(size: int, seed: int, decay: float) -> None:
    matrix = semidefinite(size, seed, decay)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    found = nystrom.pivoted_cholesky(matrix.diagonal(), lambda place: matrix[:, place], size)
    for count in range(size + 1):
        part = found.factor[:, :count]
        left = matrix - part @ part.T
        assert float(left.diagonal().sum()) == pytest.approx(float(found.traces[count]), abs=1e-10)
        if 0 < count < size:
            bound = nystrom.greedy_bound(size, count, float(values[count]))
            assert float(found.traces[count]) <= bound + 1e-10
            assert float(found.traces[count]) >= float(values[count:].sum()) - 1e-10
            same = nystrom.nystrom(matrix, found.pivots[:count])
            assert torch.allclose(same.dense(), part @ part.T, atol=1e-6)


@FAST
@given(size=st.integers(2, 20), seed=SEEDS)
def test_greedy_is_optimal_on_a_diagonal(size: int, seed: int) -> None:
    diagonal = torch.rand(size, generator=seeded(seed), dtype=torch.float64) + 0.01
    matrix = torch.diag(diagonal)
    for count in range(1, size):
        landmarks = nystrom.choose(matrix, count, "greedy")
        assert set(landmarks.tolist()) == set(diagonal.topk(count).indices.tolist())
        gap = nystrom.error(matrix, nystrom.nystrom(matrix, landmarks))
        assert gap.trace == pytest.approx(gap.best_trace, abs=1e-9)
        assert gap.spectral == pytest.approx(gap.best_spectral, abs=1e-9)


def test_leverage_finds_the_columns_that_nothing_replaces() -> None:
    """One direction in fifty columns, and one column of its own: uniform draws miss it, scores do not."""
    matrix = torch.ones(51, 51, dtype=torch.float64)
    matrix[50], matrix[:, 50] = 0, 0
    matrix[50, 50] = 0.2
    scores = ridge_leverage(matrix, 1e-3)
    assert float(scores[50]) > 0.99
    assert float(scores[:50].sum()) == pytest.approx(1, abs=1e-3)
    hits = [
        sum(50 in nystrom.choose(matrix, 2, how, seeded(seed)).tolist() for seed in range(50))
        for how in ("leverage", "uniform")
    ]
    assert hits[0] > 30
    assert hits[1] < 10


def test_landmarks_that_depend_on_each_other_do_no_harm() -> None:
    """Eight copies of each column: the core is singular, and the result still exact."""
    matrix = semidefinite(6, 3).repeat(8, 8)
    found = nystrom.nystrom(matrix, torch.arange(30))
    assert torch.allclose(found.dense(), matrix, atol=1e-8)
    inverted = matrix[:, :30] @ torch.linalg.pinv(matrix[:30, :30], rtol=1e-17) @ matrix[:30]
    assert not torch.allclose(inverted, matrix, atol=1e-8)


@FAST
@given(size=st.integers(10, 40), seed=SEEDS)
def test_products_summed_over_a_stream_are_enough(size: int, seed: int) -> None:
    """Randomised Nystrom of a second moment that is never formed; within the bound of theorem 4.1."""
    generator = seeded(seed)
    rows = torch.randn(200, size, generator=generator, dtype=torch.float64)
    rows *= 0.7 ** torch.arange(size, dtype=torch.float64)
    test = torch.randn(size, 10, generator=generator, dtype=torch.float64)
    summed = sum((part.T @ (part @ test) for part in rows.view(4, 50, size)), torch.zeros_like(test))
    matrix, found = rows.T @ rows, nystrom.from_products(summed, test)
    gap = nystrom.error(matrix, found)
    tail = torch.linalg.eigvalsh(matrix).flip(0)[5:].sum()
    assert gap.best_trace <= gap.trace <= 10 * float(tail)
    assert gap.trace < 0.2 * float(matrix.trace())
    probe = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    assert torch.allclose(found.times(probe), found.dense() @ probe)
    assert torch.allclose(found.diagonal(), found.dense().diagonal())


@FAST
@given(rows=st.integers(2, 16), columns=st.integers(2, 16), seed=SEEDS, data=st.data())
def test_interpolative_keeps_its_bounds(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    bound = data.draw(st.floats(1.01, 4))
    matrix = low_rank(rows, columns, min(rows, columns), seed)
    found = interpolative.interpolative(matrix, rank, bound)
    assert float(found.multipliers.abs().max()) <= bound * (1 + 1e-8)
    assert torch.equal(found.multipliers[:, found.columns], torch.eye(rank, dtype=torch.float64))
    values = torch.linalg.svdvals(matrix)
    after = float(values[rank]) if rank < len(values) else 0.0
    error = float(torch.linalg.matrix_norm(matrix - found.dense(matrix), 2))
    limit = interpolative.interpolative_bound(columns, rank, bound)
    assert error <= limit * after + 1e-9 * float(values[0])
    best = torch.linalg.lstsq(matrix[:, found.columns], matrix).solution
    assert torch.allclose(found.multipliers, best, atol=1e-6 * float(best.abs().max()))


def test_swaps_make_good_what_pivoting_alone_gets_wrong() -> None:
    """Kahan's matrix: QR with column pivoting leaves multipliers that grow exponentially."""
    size, cosine = 40, 0.3
    sine = (1 - cosine**2) ** 0.5
    upper = torch.eye(size, dtype=torch.float64) - cosine * torch.ones(size, size, dtype=torch.float64).triu(
        1
    )
    matrix = sine ** torch.arange(size, dtype=torch.float64)[:, None] * upper
    matrix *= 1 + 1e-10 * torch.arange(size, 0, -1)  # so that rounding does not break the ties
    plain = torch.linalg.solve(matrix[: size - 1, : size - 1], matrix[: size - 1, size - 1])
    assert float(plain.abs().max()) > 1e3
    found = interpolative.interpolative(matrix, size - 1, 2.0)
    assert float(found.multipliers.abs().max()) <= 2 * (1 + 1e-8)


@FAST
@given(rows=st.integers(2, 16), columns=st.integers(2, 16), seed=SEEDS, data=st.data())
def test_cur_is_exact_at_the_rank_and_best_for_its_columns_and_rows(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = low_rank(rows, columns, rank, seed)
    found = interpolative.cur(matrix, rank)
    assert torch.allclose(found.dense(matrix), matrix, atol=1e-7 * float(matrix.abs().max()))
    noisy = low_rank(rows, columns, rank, seed, noise=0.1)
    found = interpolative.cur(noisy, rank)
    c, r = noisy[:, found.columns], noisy[found.rows]
    best = torch.linalg.pinv(c) @ noisy @ torch.linalg.pinv(r)
    assert torch.allclose(found.middle, best, atol=1e-6 * float(best.abs().max()))
    optimum = float((noisy - truncated_svd(noisy, rank).dense()).norm())
    assert optimum - 1e-9 <= float((noisy - found.dense(noisy)).norm())
    sides = [
        interpolative.interpolative_bound(n, rank) * float(torch.linalg.svdvals(noisy)[rank])
        if rank < min(rows, columns)
        else 0.0
        for n in (rows, columns)
    ]
    assert float(torch.linalg.matrix_norm(noisy - found.dense(noisy), 2)) <= sum(sides) + 1e-8


def test_what_cannot_be_is_refused() -> None:
    matrix = semidefinite(10, 0)
    with pytest.raises(RankError, match="12 landmarks of a matrix with 10 columns: legal are 1 to 10"):
        nystrom.choose(matrix, 12)
    with pytest.raises(RankError, match="11 landmarks of a matrix with 10 columns"):
        nystrom.nystrom(matrix, torch.arange(11))
    with pytest.raises(RankError, match="11 landmarks of a matrix with 10 columns"):
        nystrom.from_products(torch.ones(10, 11), torch.ones(10, 11))
    with pytest.raises(ConfigError, match=r"different columns, 0 to 9: got \[1, 1\]"):
        nystrom.nystrom(matrix, torch.tensor([1, 1]))
    with pytest.raises(ConfigError, match=r"different columns, 0 to 9: got \[10\]"):
        nystrom.nystrom(matrix, torch.tensor([10]))
    with pytest.raises(ConfigError, match="9 x 10 matrix: Nystrom is for symmetric ones"):
        nystrom.choose(matrix[1:], 2)
    with pytest.raises(ConfigError, match="is off its transpose by .*: symmetrise it"):
        nystrom.choose(matrix + torch.eye(10).roll(1, 0), 2)
    with pytest.raises(NotPositiveDefinite, match="negative entry -1.*positive semidefinite ones"):
        nystrom.choose(matrix - 1.0 * torch.eye(10) - matrix, 2)
    hollow = torch.ones(4, 4, dtype=torch.float64) + torch.eye(4).roll(1, 0) + torch.eye(4).roll(1, 1)
    with pytest.raises(NotPositiveDefinite, match="after 1 pivots a diagonal entry is -.*not positive semi"):
        nystrom.choose(hollow, 3)
    with pytest.raises(NotPositiveDefinite, match="core of 2 landmarks fails at pivot 2"):
        nystrom.nystrom(hollow, torch.arange(2))
    with pytest.raises(ConfigError, match="landmarks 'best': legal are greedy, leverage, uniform"):
        nystrom.choose(matrix, 2, "best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"products \(10, 2\), test matrix \(10, 3\): give A T and T"):
        nystrom.from_products(torch.ones(10, 2), torch.ones(10, 3))
    with pytest.raises(RankError, match="rank 5 for a 9 x 7 matrix of rank 3 to rounding: legal are 1 to 3"):
        interpolative.interpolative(low_rank(9, 7, 3, 0), 5)
    with pytest.raises(RankError, match="rank 8 for a 9 x 7 matrix: legal are 1 to 7"):
        interpolative.cur(low_rank(9, 7, 3, 0), 8)
    with pytest.raises(ConfigError, match="bound=1: must exceed 1"):
        interpolative.interpolative(low_rank(9, 7, 3, 0), 2, 1)
    with pytest.raises(NotPositiveDefinite, match="size 3 is singular with ridge=0: raise it"):
        ridge_leverage(torch.zeros(3, 3), 0.0)


def test_a_matrix_of_zeros_is_no_trouble() -> None:
    found = nystrom.nystrom(torch.zeros(5, 5), torch.arange(2))
    assert float(found.dense().abs().max()) == 0
    assert nystrom.choose(torch.zeros(5, 5), 3, "leverage").numel() == 3


def wide(size: int, count: int, seed: int, damp: float = 1e-3) -> tuple[nystrom.WideMetric, Tensor]:
    """Return a wide metric, and the moment that it stands for."""
    moment = semidefinite(size, seed, 0.8)
    test = torch.randn(size, count, generator=seeded(seed + 1), dtype=torch.float64)
    return nystrom.WideMetric(moment.diagonal(), moment @ test, test, damp), moment


@FAST
@given(size=st.integers(3, 20), seed=SEEDS, data=st.data())
def test_a_wide_metric_is_what_it_says_without_being_formed(
    size: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, size))
    found, moment = wide(size, count, seed)
    dense, probe = found.dense(), torch.randn(size, 3, generator=seeded(seed), dtype=torch.float64)
    damped = moment.diagonal() + 1e-3 * moment.diagonal().mean()
    assert torch.allclose(dense.diagonal(), damped)
    assert torch.allclose(found.times(probe), dense @ probe)
    root = found.root_times(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(root.T @ root, dense, atol=1e-9)
    assert torch.allclose(found.inverse_root_times(root), torch.eye(size, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.factor_solve(found.factor_times(probe)), probe, atol=1e-6)
    places = torch.randperm(size, generator=seeded(seed))[: max(1, size // 2)]
    part = found.part(places)
    assert torch.allclose(part.dense(), dense[places][:, places], atol=1e-12)
    assert torch.allclose(part.times(probe[places]), dense[places][:, places] @ probe[places], atol=1e-12)
    if count == size:
        assert torch.allclose(dense, moment + 1e-3 * moment.diagonal().mean() * torch.eye(size), atol=1e-6)


def test_a_sketch_is_worth_most_of_the_moment_where_a_diagonal_is_not() -> None:
    """Error in the whole metric of matrices cut in the metric of a sketch, of the diagonal, of the whole."""
    generator, size = seeded(0), 96
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rows = torch.randn(400, size, generator=generator, dtype=torch.float64)
    rows *= torch.arange(1, size + 1).double() ** -1.0
    moment = mix.T @ rows.T @ rows @ mix / len(rows)
    weight = torch.randn(24, size, generator=generator, dtype=torch.float64)
    test = torch.randn(size, 24, generator=generator, dtype=torch.float64)
    whole, outputs = Metric(size, moment, 1e-4), Metric(24)
    metrics = (
        whole,
        nystrom.WideMetric(moment.diagonal(), moment @ test, test, 1e-4),
        Metric(size, moment.diagonal(), 1e-4),
    )
    errors = []
    for metric in metrics:
        svd = weighted_svd(weight, metric, outputs)
        errors.append(weighted_error(weight - svd.left[:, :6] @ svd.right[:6], whole, outputs))
    best, sketched, flat = errors
    assert best <= sketched < 1.25 * best
    assert flat > 3 * best


def test_a_wide_metric_refuses_what_it_cannot_use() -> None:
    with pytest.raises(
        ConfigError, match=r"a diagonal of 4, products \(4, 2\) and columns \(4, 3\): give 4 x k"
    ):
        nystrom.WideMetric(torch.ones(4), torch.ones(4, 2), torch.ones(4, 3))
    with pytest.raises(NotFinite, match="products with a moment have NaN"):
        nystrom.WideMetric(torch.ones(4), torch.full((4, 2), torch.nan), torch.ones(4, 2))
    found, _ = wide(6, 6, 0, damp=0.0)
    with pytest.raises(NotPositiveDefinite, match="diagonal part of a metric of size 6 .* raise `damp`"):
        found.root_times(torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [3, 20, 400])
def test_products_in_single_precision_are_enough_however_few_the_tokens(tokens: int) -> None:
    rows = torch.randn(tokens, 60, generator=seeded(tokens)) * 0.8 ** torch.arange(60)
    test = torch.randn(60, 30, generator=seeded(1))
    found = nystrom.WideMetric(rows.square().sum(0), rows.T @ (rows @ test), test, 1e-3)
    moment = (rows.double().T @ rows.double()).fill_diagonal_(0)
    off = found.dense().fill_diagonal_(0)
    assert float((off - moment).norm()) < 1e-2 * float(moment.norm())
    assert float(torch.linalg.eigvalsh(found.dense()).min()) > 0


def test_very_wide_layers_are_compressed_in_a_sketch(compress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a down projection in the whole metric: by the sketch nearly that by the whole moment."""
    name = "model.layers.0.mlp.down_proj"
    dense = tiny.build("llama")
    errors = []
    for limit, columns in ((stats.WIDEST_FULL, 512), (40, 40), (40, 1)):
        monkeypatch.setattr(stats, "WIDEST_FULL", limit)
        monkeypatch.setattr(stats, "SKETCH", columns)
        stats.sketch_columns.cache_clear()
        options = {"method": "svd-llm", "include": "down_proj", "rank": 6, "dtype": "float32"}
        model, _ = compress(copy.deepcopy(dense), **options)
        errors.append(model.get_submodule(name).map().dense() - dense.get_submodule(name).weight)
    monkeypatch.undo()
    stats.sketch_columns.cache_clear()
    with stats.collect(dense, [name], ["gram"]) as found, torch.no_grad():
        dense(input_ids=torch.randint(2, tiny.VOCABULARY, (8, 64), generator=seeded(0)))
    metric = Metric(48, found.moment("gram", name).mean())
    whole, sketched, poor = (weighted_error(error.detach(), metric, Metric(32)) for error in errors)
    assert abs(sketched - whole) < 0.2 * abs(poor - whole)
