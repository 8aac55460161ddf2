"""One order of outputs for several pivoted maps: pivots that span the rows of each of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ConfigError, NotPositiveDefinite
from .factors import Pivoted, PivotedLinear, fill_pivoted
from .linalg import RowSkeleton, check_matrix, to_float64

BOUND = 4.0
"""Of |multipliers|: twice that of pivots chosen for one map alone."""


def joint_order(lefts: Sequence[Tensor], bound: float = BOUND) -> Tensor | None:
    """Return an order (m,) of rows whose first r span each of `lefts` (m, r), at its own rank r.

    Rows are taken one by one, each time the one that makes the product of the volumes largest: Gram-Schmidt
    with pivoting (Businger & Golub 1965), of all matrices at once. One of a smaller rank has the first of the
    pivots of one of a larger. float64, O(m r^2).

    Returns:
        The order; None where it would need a multiplier beyond `bound`. Others may do with less.

    Raises:
        ConfigError: bound <= 1, or matrices that are wide or of different heights.
        NotPositiveDefinite: the columns of one are linearly dependent.
    """
    shapes = [tuple(check_matrix(left, "left factor").shape) for left in lefts]
    if bound <= 1 or len({rows for rows, _ in shapes}) != 1 or any(rows < rank for rows, rank in shapes):
        raise ConfigError(
            f"bound={bound} (must exceed 1), left factors of shapes {shapes} (as many rows each, none wide)"
        )
    bases = [_basis(left) for left in lefts]
    order = _greedy(bases)
    return None if order is None or any(_largest(basis, order) > bound for basis in bases) else order


def _basis(left: Tensor) -> Tensor:
    basis: Tensor
    basis, triangle = torch.linalg.qr(to_float64(left))
    sizes = triangle.diagonal().abs()
    if float(sizes.min()) <= float(sizes.max()) * len(sizes) * torch.finfo(torch.float64).eps:
        raise NotPositiveDefinite(
            f"the {left.shape[0]} x {left.shape[1]} left factor has dependent columns: lower the rank"
        )
    return basis


def _greedy(bases: Sequence[Tensor]) -> Tensor | None:
    """Return the order; None where the rows of one matrix that are left are spanned by those of another."""
    left = [basis.clone() for basis in bases]
    sizes = [part.square().sum(1) for part in left]
    free = torch.ones(len(left[0]), dtype=torch.bool, device=left[0].device)
    taken = []
    for count in range(max(basis.shape[1] for basis in bases)):
        open_ = [place for place, basis in enumerate(bases) if count < basis.shape[1]]
        gain = torch.stack([sizes[place].clamp(min=0) for place in open_]).log().sum(0)
        row = int(torch.where(free, gain, -torch.inf).argmax())
        if not bool(torch.isfinite(gain[row])):
            return None
        taken.append(row)
        free[row] = False
        for place in open_:
            unit = left[place][row] / left[place][row].norm()
            along = left[place] @ unit
            left[place].addr_(along, unit, alpha=-1)
            sizes[place] -= along.square()
    return torch.cat([torch.tensor(taken, device=free.device), free.nonzero().view(-1)])


def _largest(left: Tensor, order: Tensor) -> float:
    rank = left.shape[1]
    return 0.0 if rank == len(left) else float(_multipliers(left, order).abs().max())


def _multipliers(left: Tensor, order: Tensor) -> Tensor:
    rank = left.shape[1]
    solved: Tensor = torch.linalg.solve(left[order[:rank]].T, left[order[rank:]].T)
    return solved.T.contiguous()


def left_of(pivoted: Pivoted) -> Tensor:
    """Return the left factor (m, r), float64, whose product with `pivoted.rows` is the map."""
    skeleton = pivoted.skeleton
    multipliers = to_float64(skeleton.multipliers)
    left = multipliers.new_zeros(len(skeleton.pivots) + len(skeleton.rest), len(skeleton.pivots))
    left[skeleton.pivots] = torch.eye(len(skeleton.pivots)).to(left)
    left[skeleton.rest] = multipliers
    return left


def repivoted(pivoted: Pivoted, order: Tensor) -> Pivoted:
    """Return the same map with the first r rows of `order` (m,) as pivots and the others after them. float64.

    Raises:
        torch.linalg.LinAlgError: these rows do not span the others.
    """
    left, rank = left_of(pivoted), pivoted.rows.shape[0]
    rows = left[order[:rank]] @ to_float64(pivoted.rows)
    return Pivoted(rows, RowSkeleton(order[:rank], order[rank:], _multipliers(left, order)))


@torch.no_grad()
def align(modules: Sequence[PivotedLinear], bound: float = BOUND) -> bool:
    """Give `modules` one order of outputs, in place; False, and nothing changed, where none keeps the bound.

    The maps stay what they are but for rounding to their dtype.
    """
    maps = [module.map() for module in modules]
    order = joint_order([left_of(found) for found in maps], bound)
    if order is None:
        return False
    for module, found in zip(modules, maps, strict=True):
        bias = module.dense_bias()
        fill_pivoted(module, repivoted(found, order), None if bias is None else to_float64(bias))
    return True
