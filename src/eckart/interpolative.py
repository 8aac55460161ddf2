"""Matrices from a few of their own columns and rows: interpolative and CUR decompositions.

Nothing here knows of models. Everything is computed in float64 on the device of its input, like
eckart.linalg.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, RankError
from .linalg import check_matrix, check_rank, to_float64

_EPSILON = torch.finfo(torch.float64).eps
_SWAP_MARGIN = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class Interpolative:
    """`matrix[:, columns] @ multipliers (r, n)`: the identity at `columns (r,)`, bounded elsewhere."""

    columns: Tensor
    multipliers: Tensor

    def dense(self, matrix: Tensor) -> Tensor:
        """Return the approximation (m, n) of `matrix`."""
        return matrix[:, self.columns].to(self.multipliers) @ self.multipliers


def interpolative(matrix: Tensor, rank: int, bound: float = 2.0) -> Interpolative:
    """Choose `rank` columns of `matrix` (m, n), and the least-squares map from them to all.

    Pivoted QR, then swaps of strong rank-revealing QR while one gains more than `bound` in volume: no
    multiplier exceeds the bound, and the spectral error is at most `interpolative_bound(...)` times
    singular value r + 1 (Gu & Eisenstat 1996, theorem 3.2; Cheng et al. 2005). float64.

    Raises:
        RankError: unless 1 <= rank <= rank of the matrix, to rounding.
        ConfigError: bound <= 1.
        NotFinite: an entry is NaN or infinite.
    """
    work = to_float64(check_matrix(matrix))
    check_rank(rank, (work.shape[0], work.shape[1]))
    if bound <= 1:
        raise ConfigError(f"bound={bound}: must exceed 1")
    order = _pivoted_columns(work, rank)
    while True:
        triangle, multipliers, left = _split(work, order, rank)
        if not len(left):
            break
        inverse = torch.linalg.solve_triangular(triangle, torch.eye(rank).to(triangle), upper=True)
        gains = multipliers.square() + inverse.square().sum(1)[:, None] * left.square()
        place = int(gains.argmax())
        if float(gains.flatten()[place]) <= (bound * _SWAP_MARGIN) ** 2:
            break
        row, column = divmod(place, len(left))
        order[[row, rank + column]] = order[[rank + column, row]]
    whole = work.new_zeros(rank, work.shape[1])
    whole[:, order[:rank]] = torch.eye(rank).to(work)
    whole[:, order[rank:]] = multipliers
    return Interpolative(order[:rank].clone(), whole)


def _pivoted_columns(work: Tensor, rank: int) -> Tensor:
    """Return all columns (n,), the first `rank` by the largest norm of what those before leave."""
    rest, chosen = work.clone(), torch.zeros(work.shape[1], dtype=torch.bool, device=work.device)
    scale, pivots = float(work.square().sum(0).max()) ** 0.5, []
    for step in range(rank):
        norms = rest.square().sum(0).masked_fill(chosen, -1.0)
        place = int(norms.argmax())
        norm = float(norms[place].clamp(min=0)) ** 0.5
        if norm <= max(work.shape) * _EPSILON * scale:
            raise RankError(
                f"rank {rank} for a {work.shape[0]} x {work.shape[1]} matrix of rank {step} to rounding: "
                f"legal are {'1 to ' + str(step) if step else 'none'}"
            )
        unit = rest[:, place] / norm
        rest -= torch.outer(unit, unit @ rest)
        chosen[place] = True
        pivots.append(place)
    others = (~chosen).nonzero().flatten()
    return torch.cat([torch.tensor(pivots, device=work.device), others])


def _split(work: Tensor, order: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return R_11, R_11^-1 R_12 and the norms of the columns of R_22 of a QR factorization in this order."""
    basis, triangle = torch.linalg.qr(work[:, order[:rank]])
    others = work[:, order[rank:]]
    inside = basis.T @ others
    left = (others - basis @ inside).square().sum(0).sqrt()
    return triangle, torch.linalg.solve_triangular(triangle, inside, upper=True), left


def interpolative_bound(columns: int, rank: int, bound: float = 2.0) -> float:
    """Return the factor on singular value rank + 1 that bounds the spectral error of `interpolative`."""
    return float((1 + bound**2 * rank * (columns - rank)) ** 0.5)


@dataclass(frozen=True, slots=True)
class CUR:
    """`matrix[:, columns] @ middle (r, r) @ matrix[rows]`: real columns and rows, and what joins them."""

    columns: Tensor
    rows: Tensor
    middle: Tensor

    def dense(self, matrix: Tensor) -> Tensor:
        """Return the approximation (m, n) of `matrix`."""
        work = to_float64(matrix)
        return work[:, self.columns] @ self.middle @ work[self.rows]


def cur(matrix: Tensor, rank: int, bound: float = 2.0) -> CUR:
    """Approximate `matrix` (m, n) by `rank` of its columns and `rank` of its rows.

    Both are chosen as by `interpolative`, and U = C^+ W R^+ is the best in Frobenius norm for them (Stewart
    1999; Sorensen & Embree 2016), solved by the triangles of two QR factorizations, never by an inverse of
    W[rows, columns]. The spectral error is at most the sum of those of the two interpolative decompositions.
    Exact where the matrix has this rank. float64.

    Raises:
        RankError: unless 1 <= rank <= rank of the matrix, to rounding.
        ConfigError: bound <= 1.
        NotFinite: an entry is NaN or infinite.
    """
    work = to_float64(matrix)
    columns, rows = interpolative(work, rank, bound).columns, interpolative(work.T, rank, bound).columns
    (left, upper), (right, lower) = torch.linalg.qr(work[:, columns]), torch.linalg.qr(work[rows].T)
    middle = torch.linalg.solve_triangular(upper, left.T @ work @ right, upper=True)
    return CUR(columns, rows, torch.linalg.solve_triangular(lower, middle.T, upper=True).T.contiguous())
