"""Symmetric positive semidefinite matrices from a few of their columns: Nystrom, pivoted Cholesky.

Nothing here knows of models. Everything is computed in float64 on the device of its input, like
eckart.linalg.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .errors import ConfigError, NotFinite, NotPositiveDefinite, RankError
from .linalg import Metric, check_matrix, ridge_leverage, to_float64

Landmarks = Literal["greedy", "leverage", "uniform"]
_EPSILON = torch.finfo(torch.float64).eps
_SHIFTS = (1, 10, 100, 1_000)


@dataclass(frozen=True, slots=True)
class Nystrom:
    """`vectors (n, k) @ diag(values (k,)) @ vectors^T`, orthonormal columns, values descending, >= 0.

    Never above the matrix A that it stands for: A minus it is positive semidefinite, to rounding.
    """

    vectors: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        """Return the product (n, n)."""
        return (self.vectors * self.values) @ self.vectors.T

    def times(self, matrix: Tensor) -> Tensor:
        """Return the product with `matrix` (n, j), without the (n, n) matrix."""
        return self.vectors @ (self.values[:, None] * (self.vectors.T @ matrix))

    def diagonal(self) -> Tensor:
        """Return the diagonal (n,) of the product."""
        return self.vectors.square() @ self.values


@dataclass(frozen=True, slots=True)
class Gap:
    """An error in three norms, each beside that of the best approximation of the same rank.

    Args:
        trace, frobenius, spectral: norms of the difference.
        best_trace, best_frobenius, best_spectral: those of the eigenvalues that are left out by the optimum.
    """

    trace: float
    frobenius: float
    spectral: float
    best_trace: float
    best_frobenius: float
    best_spectral: float


def error(matrix: Tensor, found: Nystrom) -> Gap:
    """Return how far `found` is from `matrix` (n, n), and how far the best matrix of its rank is."""
    work = _semidefinite(matrix)
    left = torch.linalg.eigvalsh(work - found.dense()).abs()
    tail = torch.linalg.eigvalsh(work).flip(0)[len(found.values) :].abs()
    norms = [
        (float(values.sum()), float(values.norm()), float(values.max()) if len(values) else 0.0)
        for values in (left, tail)
    ]
    return Gap(*norms[0], *norms[1])


def _semidefinite(matrix: Tensor) -> Tensor:
    """Return `matrix` in float64 if it is symmetric and has no negative diagonal entry."""
    work = to_float64(check_matrix(matrix))
    if work.shape[0] != work.shape[1]:
        raise ConfigError(f"a {work.shape[0]} x {work.shape[1]} matrix: Nystrom is for symmetric ones")
    gap, size = float((work - work.T).abs().max()), float(work.abs().max())
    if gap > 1e-5 * size:
        raise ConfigError(f"a matrix of size {len(work)} is off its transpose by {gap:.3g}: symmetrise it")
    if float(work.diagonal().min()) < 0:
        raise NotPositiveDefinite(
            f"the diagonal of a matrix of size {len(work)} has the negative entry "
            f"{float(work.diagonal().min()):.3g}: Nystrom is for positive semidefinite ones"
        )
    return (work + work.T) / 2


def _count(count: int, size: int) -> int:
    if not 1 <= count <= size:
        raise RankError(f"{count} landmarks of a matrix with {size} columns: legal are 1 to {size}")
    return count


@dataclass(frozen=True, slots=True)
class PivotedCholesky:
    """`factor (n, k) @ factor^T` equals the matrix in the columns `pivots (k,)`; the rest is semidefinite.

    `traces (k + 1,)` is the trace of what is left after 0 .. k pivots: the error in the trace norm, exactly.
    """

    factor: Tensor
    pivots: Tensor
    traces: Tensor


def pivoted_cholesky(diagonal: Tensor, column: Callable[[int], Tensor], count: int) -> PivotedCholesky:
    """Take, `count` times, the column with the largest diagonal entry of what is left.

    Needs the diagonal (n,) and `count` of the columns alone, each asked for when it is chosen. The error in
    the trace norm is at most `greedy_bound` (Harbrecht, Peters & Schneider 2012, theorem 3.2 and before).

    Args:
        diagonal: of a symmetric positive semidefinite matrix.
        column: returns column j (n,).
        count: of the pivots; where nothing is left they are arbitrary, and their columns of the factor 0.

    Raises:
        RankError: unless 1 <= count <= n.
        NotPositiveDefinite: what is left gets a negative diagonal entry beyond rounding.
    """
    rest = to_float64(diagonal).clone()
    size, scale = len(rest), float(rest.abs().max())
    factor = rest.new_zeros(size, _count(count, size))
    taken = torch.zeros(size, dtype=torch.bool, device=rest.device)
    pivots, traces = [], [float(rest.sum())]
    for step in range(count):
        place = int(rest.masked_fill(taken, -torch.inf).argmax())
        pivot = float(rest[place])
        if float(rest.min()) < -size * 100 * _EPSILON * scale:
            raise NotPositiveDefinite(
                f"after {step} pivots a diagonal entry is {float(rest.min()):.3g} of {scale:.3g}: the matrix "
                "is not positive semidefinite"
            )
        if pivot > size * _EPSILON * scale:
            own = to_float64(column(place)) - factor[:, :step] @ factor[place, :step]
            factor[:, step] = own.masked_fill(taken, 0.0) / pivot**0.5
            rest -= factor[:, step].square()
        taken[place] = True
        rest[place] = 0.0
        pivots.append(place)
        traces.append(float(rest.clamp(min=0).sum()))
    return PivotedCholesky(factor, torch.tensor(pivots, device=rest.device), rest.new_tensor(traces))


def greedy_bound(size: int, count: int, eigenvalue: float) -> float:
    """Return the largest trace that `count` greedy pivots of a matrix (size, size) can leave.

    (n - k) 4^k times eigenvalue k + 1, the first that the optimum leaves out: complete pivoting is a
    rank-revealing QR of a square root (Gu & Eisenstat 1996, section 2).
    """
    return (size - count) * 4.0**count * eigenvalue


def choose(
    matrix: Tensor, count: int, how: Landmarks = "greedy", generator: torch.Generator | None = None
) -> Tensor:
    """Return `count` landmarks of a symmetric positive semidefinite `matrix` (n, n), in the order of choice.

    The first k of `count` are a choice of k, so that errors along them decrease.

    Args:
        matrix: to approximate.
        count: of the columns.
        how: `greedy` by pivoted Cholesky; `leverage` drawn by ridge leverage scores, the ridge the mean of
            what the best approximation of rank `count` leaves (Cohen, Musco & Musco 2017); `uniform`
            drawn alike.
        generator: on the CPU, for the two that draw; without one, that of seed 0.

    Raises:
        RankError: unless 1 <= count <= n.
        ConfigError: not symmetric, or no such way.
        NotPositiveDefinite: the matrix is not positive semidefinite.
    """
    work = _semidefinite(matrix)
    _count(count, len(work))
    if how == "greedy":
        return pivoted_cholesky(work.diagonal(), lambda place: work[:, place], count).pivots
    if how not in ("leverage", "uniform"):
        raise ConfigError(f"landmarks {how!r}: legal are greedy, leverage, uniform")
    chances = torch.ones(len(work), dtype=torch.float64)
    if how == "leverage":
        values = torch.linalg.eigvalsh(work).flip(0).clamp(min=0)
        ridge = max(float(values[count:].sum()) / count, len(work) * _EPSILON * float(values[0]))
        # A column of zeros has score 0 and may still be asked for.
        chances = ridge_leverage(work, ridge).cpu().clamp(min=_EPSILON) if ridge else chances
    generator = generator or torch.Generator().manual_seed(0)
    return torch.multinomial(chances, count, generator=generator).to(work.device)


def nystrom(matrix: Tensor, landmarks: Tensor) -> Nystrom:
    """Approximate a symmetric positive semidefinite `matrix` (n, n) by its columns at `landmarks` (k,).

    A[:, S] A[S, S]^+ A[S, :] (Williams & Seeger 2001), exact where k columns span the matrix. Landmarks that
    depend on each other do no harm: see `from_products`.

    Raises:
        RankError: more landmarks than columns, or none.
        ConfigError: not symmetric; a landmark twice, or not among the columns.
        NotPositiveDefinite: the matrix is not positive semidefinite.
    """
    work = _semidefinite(matrix)
    _count(len(landmarks), len(work))
    places = landmarks.to(work.device)
    if len(set(places.tolist())) != len(places) or not 0 <= int(places.min()) <= int(places.max()) < len(
        work
    ):
        raise ConfigError(f"landmarks must be different columns, 0 to {len(work) - 1}: got {places.tolist()}")
    test = torch.zeros(len(work), len(places), dtype=work.dtype, device=work.device)
    test[places, torch.arange(len(places), device=work.device)] = 1.0
    return from_products(work[:, places], test)


def from_products(products: Tensor, test: Tensor, precision: float = _EPSILON) -> Nystrom:
    """Approximate a symmetric positive semidefinite A (n, n) by `products` A T (n, k) with `test` T (n, k).

    A T (T^T A T)^+ T^T A: Nystrom for columns of the identity, randomised Nystrom for Gaussian ones, for
    which the expected error is within a small factor of the best of rank k - 2 (Tropp et al. 2017,
    theorem 4.1). The products may be summed over a stream. The pseudo-inverse is a Cholesky factorization
    with a shift of the size of rounding, taken off again (their algorithm 3; Frangella, Tropp & Udell
    2023, algorithm 2.1): the smallest of 1, 10, 100 and 1,000 times rounding that is enough.

    Args:
        products, test: as above.
        precision: the relative error of the products; default: that of float64.

    Raises:
        ConfigError: the two do not fit.
        RankError: more columns than rows.
        NotPositiveDefinite: A is not positive semidefinite.
    """
    work, test = to_float64(check_matrix(products, "products")), to_float64(check_matrix(test, "test matrix"))
    if work.shape != test.shape:
        raise ConfigError(f"products {tuple(work.shape)}, test matrix {tuple(test.shape)}: give A T and T")
    _count(work.shape[1], len(work))
    test, size = test.to(work.device), float(work.norm())
    if size == 0:
        return Nystrom(torch.linalg.qr(test).Q, work.new_zeros(work.shape[1]))
    core, gram = test.T @ work, test.T @ test
    core = (core + core.T) / 2
    for times in _SHIFTS:
        shift = times * precision * size
        triangle, info = torch.linalg.cholesky_ex(core + shift * gram)
        if not int(info):
            break
    else:
        raise NotPositiveDefinite(
            f"the core of {len(core)} landmarks fails at pivot {int(info)}: the matrix is not positive "
            "semidefinite, or the columns of the test matrix depend on each other"
        )
    half = torch.linalg.solve_triangular(triangle, (work + shift * test).T, upper=False).T
    vectors, roots, _ = torch.linalg.svd(half, full_matrices=False)
    return Nystrom(vectors, (roots.square() - shift).clamp(min=0))


class WideMetric(Metric):
    """H = V diag(values) V^T + diag(rest), which has the diagonal of the moment that it stands for.

    The low-rank part is the Nystrom approximation of the moment from `products`, its product with random
    columns, and never above it (`from_products`). Everything costs O(n k) for k columns.
    What looks at `moment` finds the diagonal.

    Args:
        diagonal: of the moment (n,).
        products: the moment times `test` (n, k).
        test: (n, k), the columns.
        damp: >= 0, added to the diagonal in units of its mean.

    Raises:
        ConfigError: shapes do not fit, or damp is negative.
        NotFinite: a product is NaN or infinite.
        NotPositiveDefinite: the moment is not positive semidefinite.
    """

    def __init__(self, diagonal: Tensor, products: Tensor, test: Tensor, damp: float = 0.0) -> None:
        size = len(diagonal)
        if products.shape != test.shape or len(products) != size:
            raise ConfigError(
                f"a diagonal of {size}, products {tuple(products.shape)} and columns {tuple(test.shape)}: "
                f"give {size} x k both times"
            )
        if not bool(torch.isfinite(products).all()):
            raise NotFinite(
                "products with a moment have NaN or infinite entries: look at the calibration data"
            )
        super().__init__(size, diagonal, damp)
        assert self.moment is not None
        precision = torch.finfo(products.dtype).eps
        found = from_products(products.to(self.moment), test.to(self.moment), precision)
        self.vectors, self.values = found.vectors, found.values
        self.rest = (self.moment - found.diagonal()).clamp(min=0)

    @classmethod
    def _made(cls, vectors: Tensor, values: Tensor, rest: Tensor) -> "WideMetric":
        made = cls.__new__(cls)
        made.vectors, made.values, made.rest = vectors, values, rest
        made.size, made.moment = len(rest), rest + vectors.square() @ values
        return made

    def dense(self) -> Tensor:
        """Return the whole metric (size, size), float64."""
        return (self.vectors * self.values) @ self.vectors.T + torch.diag(self.rest)

    def part(self, places: Tensor) -> "WideMetric":
        """Return the metric of the entries at `places` alone."""
        return self._made(self.vectors[places], self.values, self.rest[places])

    def times(self, matrix: Tensor) -> Tensor:
        """Return `H @ matrix` for `matrix` (size, k)."""
        low_rank = self.vectors @ (self.values[:, None] * (self.vectors.T @ matrix))
        return low_rank + self.rest[:, None] * matrix

    @cached_property
    def _inner(self) -> tuple[Tensor, Tensor]:
        """Return U (n, k) and m (k,) with H = D^1/2 (I + U diag(m) U^T) D^1/2, D the diagonal part."""
        assert self.moment is not None
        least, most = float(self.rest.min()), float(self.moment.max())
        if least <= most * self.size * torch.finfo(torch.float64).eps:
            raise NotPositiveDefinite(
                f"the diagonal part of a metric of size {self.size} has smallest entry {least:.3g}, the "
                f"whole largest {most:.3g}, and must be inverted: raise `damp`"
            )
        half = self.vectors * self.values.sqrt() / self.rest.sqrt()[:, None]
        basis, roots, _ = torch.linalg.svd(half, full_matrices=False)
        return basis, roots.square()

    def factor_times(self, matrix: Tensor) -> Tensor:
        """Return `R @ matrix`, as `root_times`."""
        return self.root_times(matrix)

    def factor_solve(self, matrix: Tensor) -> Tensor:
        """Return `R^-1 @ matrix`, as `inverse_root_times`."""
        return self.inverse_root_times(matrix)

    def root_times(self, matrix: Tensor) -> Tensor:
        """Return `R @ matrix` for `matrix` (size, k), with R^T R = H: a square root, but no symmetric one.

        Raises:
            NotPositiveDefinite: the diagonal part has a zero, to rounding.
        """
        basis, terms = self._inner
        scaled = self.rest.sqrt()[:, None] * matrix
        return scaled + basis @ (((1 + terms).sqrt() - 1)[:, None] * (basis.T @ scaled))

    def inverse_root_times(self, matrix: Tensor) -> Tensor:
        """Return `R^-1 @ matrix` for `matrix` (size, k), with the R of `root_times`.

        Raises:
            NotPositiveDefinite: the diagonal part has a zero, to rounding.
        """
        basis, terms = self._inner
        mixed = matrix + basis @ (((1 + terms).rsqrt() - 1)[:, None] * (basis.T @ matrix))
        return mixed / self.rest.sqrt()[:, None]
