"""Low-rank corrections of what quantisation does to a matrix: W ~ Q + L R.

Published methods differ in the metric in which the error is minimised and in how often Q and L R are
fitted to one another, so they are rows of data over one function.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..factors import LowRank
from ..linalg import Metric, check_matrix, check_rank, to_float64, weighted_error, weighted_svd
from ..methods import InputMetric, OutputMetric
from ..ranks import Curve, allocate
from ..stats import Statistic

Quantise = Callable[[Tensor], Tensor]
"""Return what a storage makes of a matrix: of the same shape, dequantised; of zeros it makes zeros."""
SWEEPS = 4
"""Passes over both factors, each fitted again to the rounded other one."""

_RELIEVED = 0.03
"""The share that an error counts, all the same, where a correction can make it good."""


@dataclass(frozen=True, slots=True)
class Method:
    """One choice along the axes of correction.

    inputs: metric H on the input side. `identity`; `absolute`: diagonal, (E|x|)^2; `gram`: E[x x^T].
    outputs: metric C on the output side. `identity`; `gradient`: E[g g^T].
    steps: how often Q = quantise(W - L R) and L R = best(W - Q) alternate; 1: Q = quantise(W).
    factors: whether the method as published rounds the factors, too.
    """

    inputs: InputMetric
    outputs: OutputMetric
    steps: int
    source: str
    factors: bool = False

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics that the two metrics are made of."""
        inputs: tuple[Statistic, ...] = () if self.inputs == "identity" else (self.inputs,)
        return inputs if self.outputs == "identity" else (*inputs, "gradient")

    def metrics(
        self, shape: tuple[int, int], moments: Mapping[Statistic, Tensor], damp: float
    ) -> tuple[Metric, Metric]:
        """Return (H, C) for a matrix of `shape` (m, n), damped by `damp` (relative).

        Args:
            shape: of the matrix.
            moments: the means over tokens: `absolute` (n,), `gram` (n, n), `gradient` (m, m).
            damp: see Metric.

        Raises:
            ConfigError: a statistic that the method needs is missing, or does not fit.
        """
        missing = [name for name in self.statistics() if name not in moments]
        if missing:
            raise ConfigError(f"the correction needs the statistic {missing[0]!r}: collect it")
        inputs = None if self.inputs == "identity" else to_float64(moments[self.inputs])
        if inputs is not None and self.inputs == "absolute":
            inputs = inputs.square()
        outputs = None if self.outputs == "identity" else moments["gradient"]
        return Metric(shape[1], inputs, damp), Metric(shape[0], outputs, damp)


METHODS: dict[str, Method] = {
    "lorc": Method("identity", "identity", 1, "Yao et al. 2023, arXiv:2303.08302"),
    "lqer": Method("absolute", "identity", 1, "Zhang et al. 2024, arXiv:2402.02446, L2QER"),
    "qera": Method("gram", "identity", 1, "Zhang et al. 2024, arXiv:2410.06040, QERA-exact"),
    "eora": Method("gram", "identity", 1, "Liu et al. 2024, arXiv:2410.21271"),
    "loftq": Method("identity", "identity", 5, "Li et al. 2023, arXiv:2310.08659"),
    "caldera": Method("gram", "identity", 15, "Saha et al. 2024, arXiv:2405.18886", factors=True),
    "eckart": Method("gram", "gradient", 1, "this package, docs/low-precision.md"),
}
"""The rows `qera` and `eora` are one: two names of the same optimum."""


def get(name: str) -> Method:
    """Return the row `name` of METHODS.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"correction {name!r}: legal are {', '.join(METHODS)}")
    return METHODS[name]


@dataclass(frozen=True, slots=True)
class Rounders:
    """What becomes of the two factors of a correction, given in float32, when they are stored in few bits."""

    left: Quantise
    right: Quantise


@dataclass(frozen=True, slots=True)
class Fit:
    """A low-rank matrix `factors`, and what was rounded to it, in float32: `factors` where nothing was."""

    factors: LowRank
    unrounded: LowRank


@dataclass(frozen=True, slots=True)
class Correction:
    """A matrix as `quantised (m, n) + factors (m, r) (r, n)`.

    target: what `quantised` is the quantisation of, in the dtype of the weight.
    unrounded: what `factors` are the rounding of, in float32.
    before, after: the error tr(C D H D^T) of quantise(W) and of the sum, in the metric of the fit.
    """

    quantised: Tensor
    factors: LowRank
    target: Tensor
    unrounded: LowRank
    before: float
    after: float

    def dense(self) -> Tensor:
        """Return the sum (m, n), float64."""
        return to_float64(self.quantised) + self.factors.dense()


def correct(
    weight: Tensor,
    quantise: Quantise,
    rank: int,
    inputs: Metric,
    outputs: Metric,
    *,
    steps: int = 1,
    rounders: Rounders | None = None,
) -> Correction:
    """Return Q and L R that minimise tr(C (W - Q - L R) H (W - Q - L R)^T) by alternation, the best of them.

    Q = quantise(W - L R) begins with L R = 0. Without rounders the error is never above that of the best
    correction of quantise(W), which is what one step gives, and falls with the rank if `steps` is 1. With
    rounders it is never above that of quantise(W) alone.

    Args:
        weight: W (m, n).
        quantise: see Quantise; it is given matrices in the dtype of the weight.
        rank: of L R.
        inputs: H (n, n).
        outputs: C (m, m).
        steps: how often both are fitted.
        rounders: what the factors become; None: they stay float64.

    Raises:
        RankError: unless 1 <= rank <= min(m, n).
        ConfigError: steps below 1, a metric that does not fit its side, or a quantiser that changes shapes.
        NotFinite: the weight, or what the quantiser makes of it, is NaN or infinite.
        NotPositiveDefinite: the metric of the smaller side is singular to rounding.
    """
    rows, columns = check_matrix(weight, "weight").shape
    check_rank(rank, (rows, columns))
    if steps < 1:
        raise ConfigError(f"steps={steps}: must be at least 1")
    whole, target = to_float64(weight), weight
    before, best = 0.0, None
    for step in range(steps):
        quantised = _applied(quantise, target, "quantised weight")
        error = whole - to_float64(quantised)
        before = before if step else weighted_error(error, inputs, outputs)
        found = fit(error, rank, inputs, outputs, rounders)
        after = weighted_error(error - found.factors.dense(), inputs, outputs)
        if best is None or after < best.after:
            best = Correction(quantised, found.factors, target, found.unrounded, before, after)
        target = (whole - found.factors.dense()).to(weight.dtype)
    assert best is not None
    return best


def _applied(quantise: Quantise, matrix: Tensor, what: str) -> Tensor:
    found = check_matrix(quantise(matrix), what)
    if found.shape != matrix.shape:
        raise ConfigError(
            f"{what} has shape {tuple(found.shape)}, not that of what it stands for, "
            f"{tuple(matrix.shape)}: a quantiser returns the dequantised matrix"
        )
    return found


def fit(error: Tensor, rank: int, inputs: Metric, outputs: Metric, rounders: Rounders | None = None) -> Fit:
    """Return the L R of `rank` that is nearest to `error` (m, n) in the metric, float64.

    Without rounders it is the optimum (Eckart-Young for C^1/2 E H^1/2), in balanced factors. With them each
    factor is fitted by least squares in the metric to the other as it was rounded, in turns, and the best
    pair is kept (Saha et al. 2024, algorithm 2); a correction of zeros where every pair is worse.

    Raises:
        RankError, ConfigError, NotFinite, NotPositiveDefinite: as `correct`.
    """
    check_rank(rank, (error.shape[0], error.shape[1]))
    svd = weighted_svd(error, inputs, outputs)
    start = LowRank(svd.left[:, :rank], svd.right[:rank]).balanced()
    if rounders is None:
        return Fit(start, start)
    zeros = LowRank(torch.zeros_like(start.left), torch.zeros_like(start.right))
    unrounded = LowRank(zeros.left.to(torch.float32), zeros.right.to(torch.float32))
    best, least = Fit(zeros, unrounded), weighted_error(error, inputs, outputs)
    work, wish = to_float64(error), start.right.to(torch.float32)
    right = _rounded(rounders.right, wish, "right factor")
    for _ in range(SWEEPS):
        left_wish = _best_left(work, right, inputs).to(torch.float32)
        left = _rounded(rounders.left, left_wish, "left factor")
        for sweep_end in (False, True):
            if sweep_end:
                wish = _best_left(work.T, left.T, outputs).T.to(torch.float32)
                right = _rounded(rounders.right, wish, "right factor")
            loss = weighted_error(work - left @ right, inputs, outputs)
            if loss < least:
                best, least = Fit(LowRank(left, right), LowRank(left_wish, wish)), loss
    return best


def _rounded(rounder: Quantise, factor: Tensor, what: str) -> Tensor:
    return to_float64(_applied(rounder, factor, f"rounded {what}"))


def _best_left(error: Tensor, right: Tensor, inputs: Metric) -> Tensor:
    """Return the L that minimises the error of L R in the metric, whatever the metric of the outputs."""
    weighted = inputs.times(right.T)
    inverse: Tensor = torch.linalg.pinv(right @ weighted, hermitian=True)
    return error @ weighted @ inverse


def relieved(metric: Tensor, rank: int) -> Tensor:
    """Return `metric` (size, size), float64, with its `rank` largest eigenvalues at a share of themselves.

    A matrix that is rounded in it leaves its error in these directions, the dearest, where a correction of
    that rank then makes it good.

    Raises:
        RankError: unless 1 <= rank <= size.
    """
    check_rank(rank, (len(metric), len(metric)))
    work = to_float64(metric)
    values, vectors = torch.linalg.eigh(work)
    dear = vectors[:, -rank:]
    taken: Tensor = (dear * ((1 - _RELIEVED) * values[-rank:])) @ dear.T
    return work - taken


def tails(error: Tensor, inputs: Metric, outputs: Metric, unit: float = 1.0) -> Tensor:
    """Return what is left of `unit` * tr(C E H E^T), E = `error` (m, n), at every rank 0 .. k, (k + 1,).

    It descends to 0 at k = min(m, n).

    Raises:
        ConfigError, NotFinite, NotPositiveDefinite: as eckart.linalg.weighted_svd.
    """
    return unit * weighted_svd(error, inputs, outputs).tail()


def allocate_ranks(
    losses: Mapping[str, Tensor],
    cost: Callable[[str, int], int],
    budget: int,
    *,
    multiple: int = 1,
) -> dict[str, int]:
    """Choose the rank of every correction: least summed loss, with at most `budget` bytes in all.

    Args:
        losses: of every rank 0 .. k of each matrix, in one unit for all of them (see `tails`).
        cost: bytes of a correction of a matrix, by its name, and of a rank >= 1; it rises with the rank.
        budget: bytes; rank 0 costs none.
        multiple: ranks are multiples of it.

    Returns:
        The rank per name; 0: no correction.

    Raises:
        ConfigError: budget below 0 or multiple below 1.
    """
    if budget < 0 or multiple < 1:
        raise ConfigError(f"budget={budget}, multiple={multiple}: legal are at least 0 and at least 1")
    curves: dict[str, Curve[int]] = {}
    for name, loss in losses.items():
        ranks = tuple(range(0, len(loss), multiple))
        costs = (0, *(cost(name, rank) for rank in ranks[1:]))
        curves[name] = Curve(ranks, costs, tuple(float(loss[rank]) for rank in ranks))
    return {name: curves[name].options[place] for name, place in allocate(curves, budget).items()}
