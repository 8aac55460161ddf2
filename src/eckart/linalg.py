"""Decompositions of matrices: truncated, randomised and weighted SVD, symmetric roots, pivoting.

Everything is computed in float64 on the device of its input (the CPU where the device has none).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import ConfigError, NotFinite, NotPositiveDefinite, RankError

NO_FLOAT64 = ("mps",)
_SWAP_MARGIN = 1 - 1e-6


@dataclass(frozen=True, slots=True)
class SVD:
    """`left (m, r) @ diag(values (r,)) @ right (r, n)`, orthonormal sides, values descending."""

    left: Tensor
    values: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Return the product (m, n)."""
        return (self.left * self.values) @ self.right


def to_float64(matrix: Tensor) -> Tensor:
    """Return `matrix` in float64, moved to the CPU where its device has none."""
    if matrix.device.type in NO_FLOAT64:
        matrix = matrix.cpu()
    return matrix.to(torch.float64)


def check_matrix(matrix: Tensor, what: str = "matrix") -> Tensor:
    """Return `matrix` if it has two dimensions, no empty side and only finite entries.

    Raises:
        ConfigError: not two-dimensional, or empty.
        NotFinite: an entry is NaN or infinite.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ConfigError(
            f"{what} has shape {tuple(matrix.shape)}: give a matrix with at least one row and column"
        )
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise NotFinite(
            f"{what} {tuple(matrix.shape)} has {bad} NaN or infinite entries: "
            "repair the weights or leave this matrix out"
        )
    return matrix


def check_rank(rank: int, shape: tuple[int, int]) -> int:
    """Return `rank` if 1 <= rank <= min(shape), else raise RankError."""
    if not 1 <= rank <= min(shape):
        raise RankError(f"rank {rank} for a {shape[0]} x {shape[1]} matrix: legal are 1 to {min(shape)}")
    return rank


def truncated_svd(matrix: Tensor, rank: int) -> SVD:
    """Best rank-`rank` approximation of `matrix` (m, n) in Frobenius norm (Eckart & Young 1936).

    Computed in float64 by LAPACK, returned in the dtype of `matrix`.

    Raises:
        RankError: unless 1 <= rank <= min(m, n).
        NotFinite: an entry is NaN or infinite.
    """
    check_rank(rank, (check_matrix(matrix).shape[0], matrix.shape[1]))
    left, values, right = torch.linalg.svd(to_float64(matrix), full_matrices=False)
    return SVD(*(part.to(matrix) for part in (left[:, :rank], values[:rank], right[:rank])))


def randomized_svd(
    matrix: Tensor,
    rank: int,
    *,
    oversampling: int = 10,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> SVD:
    """Approximate truncated SVD of `matrix` (m, n) from a Gaussian sketch.

    Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1, with a QR factorization between the
    power iterations. The expected spectral error of the sketched range is at most
    `randomized_bound(...) * values[rank]` (their corollary 10.10); cutting it to `rank` adds at
    most `values[rank]` (theorem 9.3). Computed in float64, returned
    in the dtype of `matrix`. `generator` lives on the CPU, so every device draws the same sketch;
    without one the sketch is that of seed 0.

    Raises:
        RankError: unless 1 <= rank <= min(m, n).
        ConfigError: oversampling or power_iterations negative.
        NotFinite: an entry is NaN or infinite.
    """
    rows, columns = check_matrix(matrix).shape
    check_rank(rank, (rows, columns))
    if oversampling < 0 or power_iterations < 0:
        raise ConfigError(
            f"oversampling={oversampling}, power_iterations={power_iterations}: both must be >= 0"
        )
    work = to_float64(matrix)
    generator = generator or torch.Generator().manual_seed(0)
    width = min(rank + oversampling, rows, columns)
    sketch = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(work @ sketch.to(work.device)).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(work.T @ basis).Q
        basis = torch.linalg.qr(work @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ work, full_matrices=False)
    left = basis @ left
    return SVD(*(part.to(matrix) for part in (left[:, :rank], values[:rank], right[:rank])))


def randomized_bound(shape: tuple[int, int], rank: int, oversampling: int, power_iterations: int) -> float:
    """Factor on `values[rank]` that bounds the expected spectral error of the randomised range.

    Halko, Martinsson & Tropp 2011, corollary 10.10; infinite for oversampling below 2, where the
    corollary says nothing.
    """
    if oversampling < 2:
        return float("inf")
    tail = min(shape) - rank
    base = 1 + (rank / (oversampling - 1)) ** 0.5
    base += 2.718281828459045 * (rank + oversampling) ** 0.5 / oversampling * tail**0.5
    return float(base ** (1 / (2 * power_iterations + 1)))


class Metric:
    """A symmetric positive semidefinite weighting of one side of a matrix: identity, diagonal or full.

    `damp` is added to the diagonal in units of its mean (zeros become a negligible identity), and belongs to
    the metric: every guarantee is for the damped one. The root is computed once, when it is first asked for.

    Args:
        size: length of the side.
        moment: None for the identity, (size,) for a diagonal, (size, size) for a full metric.
        damp: >= 0, relative to the mean of the diagonal.
    """

    def __init__(self, size: int, moment: Tensor | None = None, damp: float = 0.0) -> None:
        if damp < 0:
            raise ConfigError(f"damp={damp}: must be >= 0")
        self.size = size
        self.moment = None if moment is None else self._checked(to_float64(moment), damp)

    def _checked(self, moment: Tensor, damp: float) -> Tensor:
        if tuple(moment.shape) not in ((self.size,), (self.size, self.size)):
            raise ConfigError(
                f"metric of shape {tuple(moment.shape)} for a side of {self.size}: "
                f"give ({self.size},) or ({self.size}, {self.size})"
            )
        if not bool(torch.isfinite(moment).all()):
            raise NotFinite("the metric has NaN or infinite entries: look at the calibration data")
        diagonal = moment if moment.ndim == 1 else moment.diagonal()
        if float(diagonal.min()) < 0:
            raise NotPositiveDefinite(
                f"the diagonal of a metric of size {self.size} has the negative entry "
                f"{float(diagonal.min()):.3g}: give a second moment"
            )
        if damp and not bool(diagonal.any()):
            moment = moment + 1e-30 * (1 if moment.ndim == 1 else torch.eye(self.size).to(moment))
        if moment.ndim == 1:
            return moment + damp * moment.mean()
        symmetric = (moment + moment.T).div_(2)
        symmetric.diagonal().add_(damp * symmetric.diagonal().mean())
        return symmetric

    def dense(self) -> Tensor:
        """Return the whole metric (size, size), float64."""
        if self.moment is None:
            return torch.eye(self.size, dtype=torch.float64)
        return torch.diag(self.moment) if self.moment.ndim == 1 else self.moment

    def part(self, places: Tensor) -> "Metric":
        """Return the metric of the entries at `places` alone."""
        if self.moment is None:
            return Metric(len(places))
        whole = self.moment[places]
        return Metric(len(places), whole if whole.ndim == 1 else whole[:, places])

    def times(self, matrix: Tensor) -> Tensor:
        """Return `M @ matrix` for `matrix` (size, k)."""
        return _apply(self.moment, matrix)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor | None]:
        """Return the eigenvalues, and the eigenvectors unless the metric is diagonal."""
        if self.moment is None:
            return torch.ones(self.size, dtype=torch.float64), None
        if self.moment.ndim == 1:
            return self.moment.clamp(min=0), None
        values, vectors = torch.linalg.eigh(self.moment)
        return values.clamp(min=0), vectors

    def _power(self, exponent: float) -> Tensor | None:
        if self.moment is None:
            return None
        values, vectors = self._eigen
        powers = values.pow(exponent)
        return powers if vectors is None else (vectors * powers) @ vectors.T

    @cached_property
    def _root(self) -> Tensor | None:
        return self._power(0.5)

    @cached_property
    def _inverse_root(self) -> Tensor | None:
        values = self._eigen[0]
        floor = float(values.max()) * self.size * torch.finfo(torch.float64).eps
        if float(values.min()) <= floor:
            raise NotPositiveDefinite(
                f"a metric of size {self.size} has smallest eigenvalue {float(values.min()):.3g} of "
                f"largest {float(values.max()):.3g} and must be inverted: raise `damp`, "
                f"or calibrate on more than {self.size} tokens"
            )
        return self._power(-0.5)

    @cached_property
    def _triangle(self) -> Tensor | None:
        """Return lower L, L L^T = M; None unless the metric is full and clearly positive definite."""
        if self.moment is None or self.moment.ndim == 1:
            return None
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(self.moment)
        floor = float(self.moment.diagonal().max()) * self.size * torch.finfo(torch.float64).eps
        return None if int(info) or float(factor.diagonal().min()) ** 2 <= floor else factor

    def factor_times(self, matrix: Tensor) -> Tensor:
        """Return `R @ matrix` (size, k), R^T R = M: R is a Cholesky factor or, near singularity, a root."""
        return self.root_times(matrix) if self._triangle is None else self._triangle.T @ matrix

    def factor_solve(self, matrix: Tensor) -> Tensor:
        """Return `R^-1 @ matrix` for `matrix` (size, k), with the R of `factor_times`.

        Raises:
            NotPositiveDefinite: the metric is singular to rounding.
        """
        if self._triangle is None:
            return self.inverse_root_times(matrix)
        solved: Tensor = torch.linalg.solve_triangular(self._triangle.T, matrix, upper=True)
        return solved

    def root_times(self, matrix: Tensor) -> Tensor:
        """Return `M^(1/2) @ matrix` for `matrix` (size, k)."""
        return _apply(self._root, matrix)

    def inverse_root_times(self, matrix: Tensor) -> Tensor:
        """Return `M^(-1/2) @ matrix` for `matrix` (size, k).

        Raises:
            NotPositiveDefinite: the metric is singular to rounding.
        """
        return _apply(self._inverse_root, matrix)


def _apply(operator: Tensor | None, matrix: Tensor) -> Tensor:
    """Return `operator @ matrix`, where a vector stands for a diagonal and None for the identity."""
    if operator is None:
        return matrix
    return operator[:, None] * matrix if operator.ndim == 1 else operator @ matrix


def ridge_leverage(matrix: Tensor, ridge: float) -> Tensor:
    """Return diag(A (A + ridge I)^-1) (n,): how far each column is not a combination of the others.

    They sum to the effective dimension (Alaoui & Mahoney 2015). float64.

    Raises:
        NotPositiveDefinite: A + ridge I is singular.
    """
    work = to_float64(matrix)
    eye = torch.eye(len(work), dtype=work.dtype, device=work.device)
    solved, info = torch.linalg.solve_ex(work + ridge * eye, work)
    if int(info):
        raise NotPositiveDefinite(f"size {len(work)} is singular with ridge={ridge:.3g}: raise it")
    scores: Tensor = solved.diagonal().clone()
    return scores


@dataclass(frozen=True, slots=True)
class WeightedSVD:
    """`left (m, k) @ right (k, n)` = the matrix, k = min(m, n), the first r terms of which are best.

    `spectrum (k,)` descends; cutting after r terms costs `tail()[r]` in the weighted squared norm.
    """

    left: Tensor
    right: Tensor
    spectrum: Tensor

    def tail(self) -> Tensor:
        """Return the weighted squared error of every rank 0 .. k, (k + 1,), descending to 0."""
        squares = self.spectrum.to(torch.float64).square().flip(0)
        return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def weighted_svd(weight: Tensor, inputs: Metric, outputs: Metric) -> WeightedSVD:
    """Decompose `weight` (m, n) so that every truncation minimises tr(C D H D^T), D = W - W'.

    H (n, n) is `inputs`, C (m, m) is `outputs`. The optimum is the SVD of C^1/2 W H^1/2 (generalised
    Eckart-Young), and any R with R^T R = C serves for C^1/2: R^-1 U is the same. Only that of the smaller
    side is formed; the larger enters through the Gram matrix of that size, so for the identity C this is
    also the route of Swift-SVD (eig(W H W^T)). float64 throughout, returned in float64.

    Small singular values carry an absolute error of about 1e-8 of the largest one, since the Gram
    matrix squares the condition number.

    Raises:
        NotFinite: the weight has NaN or infinite entries.
        ConfigError: a metric does not fit its side.
        NotPositiveDefinite: the metric of the smaller side is singular to rounding.
    """
    work = to_float64(check_matrix(weight, "weight"))
    if work.shape != (outputs.size, inputs.size):
        raise ConfigError(
            f"a weight of {work.shape[0]} x {work.shape[1]} with metrics for {outputs.size} outputs "
            f"and {inputs.size} inputs"
        )
    if work.shape[0] > work.shape[1]:
        flipped = weighted_svd(work.T, outputs, inputs)
        return WeightedSVD(flipped.right.T, flipped.left.T, flipped.spectrum)
    rooted = outputs.factor_times(work)
    values, vectors = torch.linalg.eigh(rooted @ inputs.times(rooted.T))
    vectors = vectors.flip(1)
    left = outputs.factor_solve(vectors)
    return WeightedSVD(left, vectors.T @ rooted, values.flip(0).clamp(min=0).sqrt())


def weighted_error(error: Tensor, inputs: Metric, outputs: Metric) -> float:
    """Return tr(C D H D^T) for `error` D (m, n), in float64."""
    work = to_float64(error)
    return float((outputs.times(work) * inputs.times(work.T).T).sum())


@dataclass(frozen=True, slots=True)
class RowSkeleton:
    """Rows `pivots (r,)` span all rows: `matrix[rest] = multipliers (m - r, r) @ matrix[pivots]`."""

    pivots: Tensor
    rest: Tensor
    multipliers: Tensor


def pivot_rows(left: Tensor, bound: float = 2.0) -> RowSkeleton:
    """Choose r rows of `left` (m, r) that span the others with |multipliers| <= `bound`.

    Starts from LU with partial pivoting and swaps rows while a multiplier exceeds the bound; each
    swap multiplies the volume of the pivot rows by that multiplier, so it ends (maxvol: Goreinov
    et al. 2010; strong rank-revealing QR has the same stopping rule). float64.

    Raises:
        ConfigError: bound <= 1, or r > m.
        NotPositiveDefinite: the columns of `left` are linearly dependent.
    """
    rows, rank = check_matrix(left, "left factor").shape
    if bound <= 1 or rank > rows:
        raise ConfigError(f"bound={bound} (must exceed 1), shape {rows} x {rank} (must not be wide)")
    basis, triangle = torch.linalg.qr(to_float64(left))
    diagonal = triangle.diagonal().abs()
    if float(diagonal.min()) <= float(diagonal.max()) * rank * torch.finfo(torch.float64).eps:
        raise NotPositiveDefinite(f"the {rows} x {rank} left factor has dependent columns: lower the rank")
    order = torch.linalg.lu(basis).P.argmax(0)
    multipliers = _multipliers(basis, order, rank)
    # Updates drift where multipliers began large, so the rule is checked on fresh ones.
    while multipliers.numel() and float(multipliers.abs().max()) > bound:
        _swap_rows(multipliers, order, rank, bound * _SWAP_MARGIN)
        multipliers = _multipliers(basis, order, rank)
    pivots, rest = order[:rank].sort().values, order[rank:].sort().values
    return RowSkeleton(pivots, rest, _multipliers(basis, torch.cat([pivots, rest]), rank))


def _multipliers(basis: Tensor, order: Tensor, rank: int) -> Tensor:
    """Return M with basis[rest] = M basis[pivots], by QR: LU may grow where the rows are well conditioned."""
    factor, triangle = torch.linalg.qr(basis[order[:rank]].T)
    right = factor.T @ basis[order[rank:]].T
    solved: Tensor = torch.linalg.solve_triangular(triangle, right, upper=True)
    return solved.T.contiguous()


def _swap_rows(multipliers: Tensor, order: Tensor, rank: int, bound: float) -> None:
    """Swap pivot rows in place until no multiplier exceeds `bound`."""
    while multipliers.numel():
        place = int(multipliers.abs().argmax())
        row, column = divmod(place, rank)
        value = multipliers[row, column].clone()
        if float(value.abs()) <= bound:
            return
        step = multipliers[row].clone()
        step[column] -= 1
        step /= value
        multipliers.addr_(multipliers[:, column].clone(), step, alpha=-1)
        multipliers[row] = -step
        multipliers[row, column] += 1
        order[[column, rank + row]] = order[[rank + row, column]]
