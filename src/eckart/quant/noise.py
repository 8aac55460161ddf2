"""What rounding a matrix to few bits costs, estimated before anything is rounded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import Metric, WeightedSVD, to_float64
from .rounding import DAMP, OUTPUT_DAMP, Feedback

_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Noise:
    """The estimated weighted squared error tr(C D H D^T) of rounding, per unit of a storage's `noise`.

    Args:
        dense: of the matrix itself.
        low_rank: (k + 1,) of its two factors at every rank.
    """

    dense: float
    low_rank: Tensor | None = None

    def times(self, unit: float) -> "Noise":
        """Return it in another unit."""
        return Noise(unit * self.dense, None if self.low_rank is None else unit * self.low_rank)


def of_matrix(weight: Tensor, inputs: Metric, outputs: Metric, svd: WeightedSVD | None = None) -> Noise:
    """Return the noise of `weight` (m, n), and of its factors where it is decomposed.

    An error of variance v_ij in entry (i, j), independent of the others, costs c_i h_j v_ij after error
    compensation on both sides, with c and h the pivots of the metrics
    (eckart.quant.rounding.Feedback); v follows the size of the entries
    of its block of 64.
    """
    work = to_float64(weight)
    columns, rows = _pivots(inputs, DAMP), _pivots(outputs, OUTPUT_DAMP)
    dense = float(rows @ _block_squares(work) @ _block_sums(columns))
    if svd is None:
        return Noise(dense)
    # In the gauge of the decomposition the left factor is orthonormal in C and the right one has the spectrum
    # for its norms in H: an error in a right row counts 1, one in a left column the spectrum squared.
    outputs_size, inputs_size = work.shape
    right = svd.right.square().sum(1) / inputs_size * columns.sum()
    left = svd.left.square().sum(0) * svd.spectrum.square() / outputs_size * rows.sum()
    terms = (right + left).cumsum(0)
    return Noise(dense, torch.cat([terms.new_zeros(1), terms]))


def _pivots(metric: Metric, damp: float) -> Tensor:
    # A diagonal may be as long as the vocabulary: there is nothing to factor.
    if metric.moment is None or metric.moment.ndim == 1:
        moment = torch.ones(metric.size) if metric.moment is None else metric.moment
        return to_float64(moment) * (1 + damp)
    return Feedback.of(metric.size, metric.moment, damp=damp).in_place()


def _block_squares(matrix: Tensor) -> Tensor:
    """Return the mean squares (m, blocks) over blocks of 64 along the rows."""
    parts = [part.square().mean(1) for part in torch.split(matrix, _BLOCK, dim=1)]
    return torch.stack(parts, dim=1)


def _block_sums(values: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in torch.split(values, _BLOCK)])
