"""Factored embedding tables in few bits."""

import torch
from torch import Tensor

from ..embeddings import FactoredEmbedding
from ..factors import LowRank
from ..linalg import Metric, to_float64
from .leaves import Gridded, Rounded, mixed
from .rounding import DAMP, Feedback, carried

_LEAF_DAMP = 1e-6
_SOLVE_DAMP = 1e-10
_KEPT = 0.03
"""The share that an error of `up`, where the rows can make it good, counts all the same."""


@torch.no_grad()
def quantise(
    table: FactoredEmbedding, storage: Gridded, rows: Tensor | None, tokens: Tensor | None
) -> tuple[Rounded, Rounded]:
    """Round `codes` (v, r) and `up` (d, r) of a table for a small sum over tokens t of w_t e_t^T M e_t.

    e_t is the error of a row. As in `leaves.quantise`, both factors are first written in a random basis
    between them; `up` is rounded in the metric of what the codes cannot make good, the codes are fitted to
    it anew, and each of their rows is rounded with compensation. The table itself is not changed. Fitted in
    float64, rounded in float32.

    Args:
        table: with both factors in float.
        storage: of both.
        rows: M (d, d), (d,) or None for the identity.
        tokens: w (v,), or None for ones.

    Returns:
        What becomes of `codes` and of `up`.

    Raises:
        ConfigError: a metric that does not fit.
        NotFinite, NotPositiveDefinite: as `rounding.Feedback.of`.
    """
    wide = [to_float64(part.weight.detach()) for part in (table.codes, table.up)]
    factors = mixed(LowRank(wide[0], wide[1].T))
    metric = Metric(table.embedding_dim, rows, DAMP).dense().to(factors.right)
    frequency = Metric(table.num_embeddings, tokens, DAMP)
    reach = factors.right @ metric
    made_good = reach.T @ _solved(reach @ factors.right.T, reach)
    seen = factors.left.T @ frequency.times(factors.left)
    up = _rounded(factors.right.T, storage, seen, metric - (1 - _KEPT) * made_good)
    rounded = up.values().T
    reach = rounded @ metric
    gram = reach @ rounded.T
    fitted = factors.left @ _solved(gram, reach @ factors.right.T).T
    return _rounded(fitted, storage, gram, None), up


def _rounded(weight: Tensor, storage: Gridded, inputs: Tensor, outputs: Tensor | None) -> Rounded:
    weight = weight.to(torch.float32)
    along = Feedback.of(weight.shape[1], inputs, damp=_LEAF_DAMP)
    down = None if outputs is None else Feedback.of(weight.shape[0], outputs, damp=_LEAF_DAMP)
    grid = storage.grid(weight, along.in_place())
    return Rounded(carried(weight, grid, along, down), grid, None)


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    floor = _SOLVE_DAMP * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    factor = torch.linalg.cholesky(gram + floor * torch.eye(len(gram)).to(gram))
    return torch.cholesky_solve(right, factor)
