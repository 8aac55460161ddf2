"""One matrix for several, fitted in the metric of each, with scales and low-rank differences for each.

Member l has a weight W_l (m, n), metrics H_l (n, n) and C_l (m, m) and a weight u_l; what stands for it is
diag(s_l) S + L_l R_l, and the loss is the sum over l of u_l tr(C_l D_l H_l D_l^T), D_l being W_l minus that.
Matrices only, float64 throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, NotPositiveDefinite
from .factors import LowRank
from .linalg import Metric, check_matrix, check_rank, to_float64, weighted_error, weighted_svd

_SOLVER_STEPS = 8
_SOLVER_STEPS_AGAIN = 3
_SOLVER_GAIN = 1e-5
_SWEEPS = 8
_RIDGE = 1e-12
_EXACT = 1e-12


@dataclass(frozen=True, slots=True)
class Member:
    """A matrix that is to share: `weight (m, n)`, the metrics of its sides, and how much its error counts."""

    weight: Tensor
    inputs: Metric
    outputs: Metric
    unit: float = 1.0


@dataclass(frozen=True, slots=True)
class Consensus:
    """What the members become: `scales[l][:, None] * base (m, n) + differences[l]`.

    Args:
        base: in common.
        scales: of the rows (m,), for each member; None without.
        differences: a product (m, r) (r, n) for each member; None without.
        losses: of each member.
        course: the sum of the losses of the base alone, and after every sweep; it never rises.
    """

    base: Tensor
    scales: tuple[Tensor, ...] | None
    differences: tuple[LowRank, ...] | None
    losses: tuple[float, ...]
    course: tuple[float, ...]

    def dense(self, place: int) -> Tensor:
        """Return what stands for member `place` (m, n)."""
        own = self.base if self.scales is None else self.scales[place][:, None] * self.base
        return own if self.differences is None else own + self.differences[place].dense()


def agree(
    members: Sequence[Member],
    *,
    rank: int = 0,
    scaled: bool = False,
    tolerance: float = 3e-2,
    sweeps: int = _SWEEPS,
) -> Consensus:
    """Fit what `members` share, and what each has of its own, to the least loss that alternation finds.

    The base alone, where all C_l are the same up to a factor, is the closed form (sum of u_l c_l W_l H_l)
    (sum of u_l c_l H_l)^-1, c_l the factors; elsewhere, the conjugate gradients that solve for it start
    there, with the Kronecker product of the pooled metrics for a preconditioner. Scales are a linear system
    for each member, differences the SVD in its metric. Every step is a minimisation over what it changes:
    the loss never rises. Sweeps end when one gains less than `tolerance` of the loss.

    Raises:
        ConfigError: fewer than two members, or different shapes.
        RankError: the rank of the differences exceeds min(m, n).
        NotPositiveDefinite: metrics are singular to rounding.
        NotFinite: a weight has NaN or infinite entries.
    """
    shapes = [tuple(member.weight.shape) for member in members]
    if len(members) < 2 or len(set(shapes)) > 1:
        raise ConfigError(
            f"matrices of shapes {', '.join(f'{m} x {n}' for m, n in shapes)} cannot share: give two or "
            "more of one shape"
        )
    if rank:
        check_rank(rank, (shapes[0][0], shapes[0][1]))
    run = _Run(members)
    run.solve_base()
    course = [run.loss()]
    if rank:
        run.start_differences(rank)
    if rank or scaled:
        for _ in range(sweeps):
            if scaled:
                run.solve_scales()
            if rank:
                run.solve_differences(rank)
            run.solve_base(_SOLVER_STEPS_AGAIN)
            course.append(run.loss())
            if course[-2] - course[-1] <= max(tolerance * course[-2], _EXACT * course[0]):
                break
    return Consensus(
        run.base,
        tuple(run.scales) if scaled else None,
        tuple(part.balanced() for part in run.differences) if rank else None,
        tuple(run.losses()),
        tuple(course),
    )


def agree_by_rows(first: Member, second: Member) -> Tensor:
    """Return the one matrix (m, n) that is best for two whose output metrics are diagonal, exactly.

    Row i solves t (a_i H + b_i G) = a_i x_i H + b_i y_i G. Both metrics become diagonal in one basis, P with
    G = P P^T and H = P Q P^T, and there each entry is a weighted mean (Golub & Van Loan, section 8.7).

    Raises:
        ConfigError: different shapes, or an output metric that is not diagonal.
        NotPositiveDefinite: the input metric of the second is singular to rounding.
    """
    shapes = [tuple(member.weight.shape) for member in (first, second)]
    flat = all(m.outputs.moment is None or m.outputs.moment.ndim == 1 for m in (first, second))
    if shapes[0] != shapes[1] or not flat:
        raise ConfigError(
            f"{shapes[0][0]} x {shapes[0][1]} and {shapes[1][0]} x {shapes[1][1]}: give two matrices of one "
            "shape, with output metrics that are diagonal"
        )
    one, other = (to_float64(check_matrix(member.weight, "weight")) for member in (first, second))
    rows = [member.unit * diagonal(member.outputs).to(one)[:, None] for member in (first, second)]
    triangle, info = torch.linalg.cholesky_ex(second.inputs.dense().to(one))
    if int(info):
        raise NotPositiveDefinite(f"a metric of size {len(triangle)} is singular: raise `damp`")
    half = torch.linalg.solve_triangular(triangle, first.inputs.dense().to(one), upper=False)
    values, basis = torch.linalg.eigh(torch.linalg.solve_triangular(triangle, half.T, upper=False))
    into = triangle @ basis
    ours, theirs = rows[0] * values.clamp(min=0), rows[1]
    total = ours + theirs
    # Where neither looks, either will do.
    mixed = torch.where(total > 0, (ours * (one @ into) + theirs * (other @ into)) / total, one @ into)
    found: Tensor = torch.linalg.solve_triangular(triangle, mixed @ basis.T, upper=False, left=False)
    return found


class _Run:
    """A fit on its way."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.weights = [to_float64(check_matrix(member.weight, "weight")) for member in members]
        like = self.weights[0]
        self.scales = [like.new_ones(len(like)) for _ in members]
        self.differences: list[LowRank] = []
        # A member counts on one side by its weight and the trace of the other side.
        self.shares = [m.unit * float(diagonal(m.outputs).sum()) for m in members]
        heights = [m.unit * float(diagonal(m.inputs).sum()) for m in members]
        self.inputs = _Inverse(pooled([m.inputs for m in members], self.shares).to(like))
        self.outputs = _Inverse(pooled([m.outputs for m in members], heights).to(like))
        self.base = self.mean(range(len(members)))

    def target(self, place: int) -> Tensor:
        """Return what the scaled base is to be for a member."""
        weight = self.weights[place]
        return weight - self.differences[place].dense() if self.differences else weight

    def own(self, place: int) -> Tensor:
        """Return the scaled base."""
        return self.scales[place][:, None] * self.base

    def mean(self, places: Sequence[int]) -> Tensor:
        """Return the base for some of the members that is best where all C_l are alike and no scales are."""
        if len(places) < len(self.members):
            kept = [self.members[place].inputs for place in places]
            inverse = _Inverse(pooled(kept, [self.shares[p] for p in places]).to(self.weights[0]))
        else:
            inverse = self.inputs
        terms = [self.shares[p] * self.members[p].inputs.times(self.target(p).T) for p in places]
        return inverse.times(torch.stack(terms).sum(0)).T

    def weighed(self, place: int, error: Tensor) -> Tensor:
        """Return u C error H: half the gradient of the loss of a member."""
        member = self.members[place]
        return member.unit * member.outputs.times(member.inputs.times(error.T).T)

    def losses(self) -> list[float]:
        """Return the loss of every member."""
        return [
            member.unit * weighted_error(self.target(place) - self.own(place), member.inputs, member.outputs)
            for place, member in enumerate(self.members)
        ]

    def loss(self) -> float:
        """Return the whole loss."""
        return sum(self.losses())

    def solve_base(self, steps: int = _SOLVER_STEPS) -> None:
        """Minimise over the base by preconditioned conjugate gradients, from where it is."""
        places = range(len(self.members))
        errors = [self.weighed(p, self.target(p) - self.own(p)) for p in places]
        left = torch.stack([s[:, None] * e for s, e in zip(self.scales, errors, strict=True)]).sum(0)
        first: float | None = None
        direction, before = torch.zeros_like(left), 1.0
        for _ in range(steps):
            steep = self.outputs.times(self.inputs.times(left.T).T)
            now = float((left * steep).sum())
            direction = steep + now / before * direction
            bent = torch.stack(
                [s[:, None] * self.weighed(p, s[:, None] * direction) for p, s in enumerate(self.scales)]
            ).sum(0)
            curvature = float((direction * bent).sum())
            if curvature <= 0 or now <= 0:
                return
            step = now / curvature
            self.base = self.base + step * direction
            left, before = left - step * bent, now
            gain = step * now
            first = first or gain
            if gain <= _SOLVER_GAIN * first:
                return

    def solve_scales(self) -> None:
        """Minimise over the scales of each member: (C * S H S^T) s = diag(C T H S^T)."""
        for place, member in enumerate(self.members):
            metric = member.outputs.dense().to(self.base) * (self.base @ member.inputs.times(self.base.T))
            slope = (self.weighed(place, self.target(place) - self.own(place)) * self.base).sum(1)
            ridge = _RIDGE * metric.diagonal().mean() * torch.eye(len(metric)).to(metric)
            change, info = torch.linalg.solve_ex(member.unit * (metric + ridge), slope)
            if not int(info):  # rows of zeros have no scale: theirs stays
                self.scales[place] = self.scales[place] + change

    def solve_differences(self, rank: int) -> None:
        """Minimise over the difference of each member."""
        self.differences = [self._cut(place, self.own(place), rank) for place in range(len(self.members))]

    def start_differences(self, rank: int) -> None:
        """Start with differences from what the others agree on, one member after another.

        The base then moves to what is left. Alternation from the base of all would give two members
        opposite differences, which is stationary and wastes half of them.
        """
        like = self.weights[0]
        empty = LowRank(like.new_zeros(len(like), 1), like.new_zeros(1, like.shape[1]))
        plain, base = [self._cut(p, self.own(p), rank) for p in range(len(self.members))], self.base
        self.differences = plain
        alone = self.loss()
        self.differences = [empty for _ in self.members]
        for place in range(len(self.members)):
            others = [other for other in range(len(self.members)) if other != place]
            self.differences[place] = self._cut(place, self.mean(others), rank)
        self.base = self.mean(range(len(self.members)))
        self.solve_base()
        if self.loss() > alone:
            self.differences, self.base = plain, base

    def _cut(self, place: int, own: Tensor, rank: int) -> LowRank:
        member = self.members[place]
        found = weighted_svd(self.weights[place] - own, member.inputs, member.outputs)
        return LowRank(found.left[:, :rank], found.right[:rank])


def diagonal(metric: Metric) -> Tensor:
    """Return the diagonal of a metric, float64."""
    if metric.moment is None:
        return torch.ones(metric.size, dtype=torch.float64)
    return metric.moment if metric.moment.ndim == 1 else metric.moment.diagonal()


def pooled(metrics: Sequence[Metric], shares: Sequence[float]) -> Tensor:
    """Return the weighted sum of `metrics`: (n,) where all are diagonal, (n, n) otherwise."""
    flat = all(metric.moment is None or metric.moment.ndim == 1 for metric in metrics)
    parts = [diagonal(metric) if flat else metric.dense() for metric in metrics]
    return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(0)


class _Inverse:
    """The inverse of pooled metrics, factored once."""

    def __init__(self, metric: Tensor) -> None:
        self.flat = metric.ndim == 1
        self.factor, failed = metric, int(float(metric.min()) <= 0) if self.flat else 0
        if not self.flat:
            self.factor, info = torch.linalg.cholesky_ex(metric)
            failed = int(info)
        if failed:
            size = len(metric)
            raise NotPositiveDefinite(
                f"the metrics of size {size} of matrices that share are singular together: raise `damp`, or "
                f"calibrate on more than {size} tokens"
            )

    def times(self, matrix: Tensor) -> Tensor:
        """Return the inverse times `matrix` (n, k)."""
        if self.flat:
            return matrix / self.factor[:, None]
        return torch.cholesky_solve(matrix, self.factor)
