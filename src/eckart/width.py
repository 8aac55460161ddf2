"""Narrower hidden dimensions: which units two consecutive maps keep, and the re-fit of the second.

The Nystrom approximation of what flows between the maps. A unit is a channel, or a block of channels
that only go together (a head). Matrices only, float64 throughout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import ConfigError, NotPositiveDefinite, RankError
from .linalg import Metric, check_matrix, ridge_leverage, to_float64

Landmarks = Literal["curvature", "leverage", "energy"]
_BATCHES = 48


@dataclass(frozen=True, slots=True)
class Narrowing:
    """Every width of a hidden dimension at once: nested units, and the weight that reads them.

    Args:
        order: all units (u,), the most useful first; width k keeps `order[:k]`.
        reading: the weight (m, u b), its columns in that order, times `cholesky`; float64.
        cholesky: of the metric in that order (u b, u b), lower.
        losses: what each further unit saves (u,), in the squared output metric.
    """

    order: Tensor
    reading: Tensor
    cholesky: Tensor
    losses: Tensor

    def tail(self) -> Tensor:
        """Return the squared error of every width 0 .. u, (u + 1,), descending to 0."""
        squares = self.losses.flip(0)
        return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)

    def units(self, width: int) -> Tensor:
        """Return the `width` units to keep, ascending.

        Raises:
            RankError: unless 1 <= width <= u.
        """
        if not 1 <= width <= len(self.order):
            raise RankError(f"width {width} of {len(self.order)}: legal are 1 to {len(self.order)}")
        return self.order[:width].sort().values

    def refit(self, width: int) -> Tensor:
        """Return the weight (m, width b) that reads `units(width)`, fitted by least squares.

        W' = W_S + W_R H_RS H_SS^-1, which is the solution for every output metric; W itself at full
        width.

        Raises:
            RankError: unless 1 <= width <= u.
        """
        self.units(width)
        block = self.cholesky.shape[0] // len(self.order)
        size = width * block
        solved: Tensor = torch.linalg.solve_triangular(
            self.cholesky[:size, :size], self.reading[:, :size], upper=False, left=False
        )
        # argsort of the order is where each unit, ascending, stands in it.
        return solved.view(-1, width, block)[:, self.order[:width].argsort()].flatten(1)


def narrow(weight: Tensor, inputs: Metric, outputs: Metric, order: Tensor) -> Narrowing:
    """Return every narrowing of the dimension that `weight` (m, u b) reads, along the units `order` (u,).

    The error of width k, after the re-fit, is tr(C W_R (H_RR - H_RS H_SS^-1 H_SR) W_R^T) with S the
    channels of order[:k] and R the rest. The Cholesky factor of that Schur complement is the
    trailing block of the whole one, so one decomposition holds the whole curve (Nystrom
    approximation with landmarks S: Drineas & Mahoney 2005).

    Raises:
        NotPositiveDefinite: the metric is singular to rounding.
        ConfigError: a shape does not fit, or `order` is no permutation.
    """
    work = to_float64(check_matrix(weight, "weight"))
    if work.shape != (outputs.size, inputs.size):
        raise ConfigError(
            f"a weight of {work.shape[0]} x {work.shape[1]} with metrics for {outputs.size} outputs "
            f"and {inputs.size} inputs"
        )
    count = len(order)
    if inputs.size % count or not torch.equal(order.sort().values.cpu(), torch.arange(count)):
        raise ConfigError(f"an order of {count} units for {inputs.size} channels: give a permutation of them")
    order = order.to(work.device)
    channels = torch.arange(inputs.size, device=work.device).view(count, -1)[order].flatten()
    factor, info = torch.linalg.cholesky_ex(inputs.dense().to(work)[channels[:, None], channels])
    if int(info):
        raise NotPositiveDefinite(
            f"the second moment of {inputs.size} channels fails at pivot {int(info)}: raise `damp`, or "
            f"calibrate on more than {inputs.size} tokens"
        )
    reading = work[:, channels] @ factor
    losses = outputs.factor_times(reading).square().sum(0).view(count, -1).sum(1)
    return Narrowing(order, reading, factor, losses)


def by_energy(weight: Tensor, inputs: Metric, outputs: Metric, units: int) -> Tensor:
    """Return the units (u,) by the energy that each carries alone: sum of w_j^T C w_j H_jj, descending."""
    carried = outputs.factor_times(to_float64(weight)).square().sum(0)
    energy = carried * inputs.dense().diagonal().to(carried)
    return energy.view(units, -1).sum(1).argsort(descending=True)


def by_leverage(weight: Tensor, inputs: Metric, outputs: Metric, units: int) -> Tensor:
    """Return the units (u,) by ridge leverage score diag(H (H + l I)^-1), l the mean eigenvalue of H.

    Neither `weight` nor `outputs` matters (MoDeGPT: Lin et al. 2025, arXiv:2408.09632).
    """
    moment = inputs.dense()
    scores = ridge_leverage(moment, float(moment.diagonal().mean()))
    return scores.view(units, -1).sum(1).argsort(descending=True)


def by_curvature(weight: Tensor, inputs: Metric, outputs: Metric, units: int) -> Tensor:
    """Return the units (u,) by backward elimination: those that the rest replaces best come last.

    Leaving out unit j of those that are left, the weight re-fitted each time, costs
    tr(C w_j [H^-1]_jj^-1 w_j^T) (optimal brain surgeon: Hassibi & Stork 1993). A small share of the
    units goes at a time.

    Raises:
        NotPositiveDefinite: the metric is singular to rounding.
    """
    rooted = outputs.factor_times(to_float64(weight))
    inverse = _inverse(inputs.dense().to(rooted))
    block = inputs.size // units
    left = torch.arange(units, device=rooted.device)
    gone: list[Tensor] = []
    while len(left) > 1:
        ranking = _elimination_costs(rooted, inverse, block).argsort()
        count = max(1, len(left) // _BATCHES)
        drop, stay = (_channels(part, block) for part in (ranking[:count], ranking[count:]))
        mixing = torch.linalg.solve(inverse[drop[:, None], drop], inverse[drop[:, None], stay])
        rooted = rooted[:, stay].addmm_(rooted[:, drop], mixing, alpha=-1)
        crossed = inverse[stay[:, None], drop]
        inverse = inverse[stay[:, None], stay].addmm_(crossed, mixing, alpha=-1)
        gone.append(left[ranking[:count]])
        left = left[ranking[count:]]
    return torch.cat([*gone, left]).flip(0)


def _inverse(moment: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(moment)
    if int(info):
        raise NotPositiveDefinite(f"the second moment of {len(moment)} channels is singular: raise `damp`")
    return torch.cholesky_inverse(factor)


def _channels(units: Tensor, block: int) -> Tensor:
    return (units[:, None] * block + torch.arange(block, device=units.device)).flatten()


def _elimination_costs(rooted: Tensor, inverse: Tensor, block: int) -> Tensor:
    """Return what leaving out each unit costs (u,), given C^1/2 W and H^-1 of the units that are left."""
    columns = rooted.view(len(rooted), -1, block).permute(1, 2, 0)
    if block == 1:
        return columns.square().sum((1, 2)) / inverse.diagonal()
    count = columns.shape[0]
    own = inverse.view(count, block, count, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    solved: Tensor = torch.linalg.solve(own, columns)
    return (columns * solved).sum((1, 2))


ORDERS: dict[Landmarks, Callable[[Tensor, Metric, Metric, int], Tensor]] = {
    "curvature": by_curvature,
    "leverage": by_leverage,
    "energy": by_energy,
}
LANDMARKS: tuple[Landmarks, ...] = tuple(ORDERS)
