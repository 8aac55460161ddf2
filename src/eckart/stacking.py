"""Maps that read one input, as one map: the best right factor that is common to all of them."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from .errors import ConfigError
from .linalg import Metric, WeightedSVD, weighted_svd


class StackedMetric(Metric):
    """C = diag(C_1, ..., C_k): the metric of outputs that stand one above the other, block by block.

    What looks at `moment` finds the diagonal; the blocks between different outputs are zero.

    Args:
        parts: the metrics of the outputs, from top to bottom.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, parts: Sequence[Metric]) -> None:
        if not parts:
            raise ConfigError("no metric to stack: give one for each of the maps")
        super().__init__(sum(part.size for part in parts))
        self.parts = tuple(parts)
        self.moment = torch.cat([_diagonal(part) for part in parts])

    @cached_property
    def _ends(self) -> list[int]:
        ends = [0]
        for part in self.parts:
            ends.append(ends[-1] + part.size)
        return ends

    def _each(self, how: str, matrix: Tensor) -> Tensor:
        cuts = (matrix[start:end] for start, end in pairwise(self._ends))
        return torch.cat([getattr(part, how)(cut) for part, cut in zip(self.parts, cuts, strict=True)])

    def dense(self) -> Tensor:
        """Return the whole metric (size, size), float64."""
        whole: Tensor = torch.block_diag(*(part.dense() for part in self.parts))  # type: ignore[no-untyped-call]
        return whole

    def part(self, places: Tensor) -> "StackedMetric":
        """Return the metric of the entries at `places` alone, which ascend."""
        found = []
        for own, (start, end) in zip(self.parts, pairwise(self._ends), strict=True):
            inside = places[(places >= start) & (places < end)] - start
            if len(inside):
                found.append(own.part(inside))
        return StackedMetric(found)

    def times(self, matrix: Tensor) -> Tensor:
        """Return `C @ matrix` for `matrix` (size, k)."""
        return self._each("times", matrix)

    def factor_times(self, matrix: Tensor) -> Tensor:
        """Return `R @ matrix` (size, k), R^T R = C, R of the same blocks."""
        return self._each("factor_times", matrix)

    def factor_solve(self, matrix: Tensor) -> Tensor:
        """Return `R^-1 @ matrix` for `matrix` (size, k), with the R of `factor_times`."""
        return self._each("factor_solve", matrix)

    def root_times(self, matrix: Tensor) -> Tensor:
        """Return `C^(1/2) @ matrix` for `matrix` (size, k)."""
        return self._each("root_times", matrix)

    def inverse_root_times(self, matrix: Tensor) -> Tensor:
        """Return `C^(-1/2) @ matrix` for `matrix` (size, k)."""
        return self._each("inverse_root_times", matrix)


def _diagonal(metric: Metric) -> Tensor:
    if metric.moment is None:
        return torch.ones(metric.size, dtype=torch.float64)
    return metric.moment if metric.moment.ndim == 1 else metric.moment.diagonal()


def stacked_svd(weights: Sequence[Tensor], inputs: Metric, outputs: Sequence[Metric]) -> WeightedSVD:
    """Decompose maps `weights` (m_i, n) of one input so that every cut has the best common right factor.

    Cut after r terms, L (sum m_i, r) R (r, n) minimises sum_i tr(C_i D_i H D_i^T) over all D_i = W_i - L_i R:
    it is the optimum for the stacked map in H and diag(C_1, ..., C_k) (eckart.linalg.weighted_svd), since a
    common right factor is nothing but the rank of the stack. The loss is in the unit of each map's own.

    Raises:
        ConfigError: there are not as many metrics as maps, or a shape does not fit.
        NotFinite, NotPositiveDefinite: as weighted_svd.
    """
    if len(weights) != len(outputs):
        raise ConfigError(f"{len(weights)} maps and {len(outputs)} output metrics: give one for each")
    rows = torch.cat([weight.to(torch.float64) for weight in weights])
    return weighted_svd(rows, inputs, StackedMetric(outputs))
