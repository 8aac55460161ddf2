"""Which value of its grid each entry of a matrix gets: the nearest, or one that makes good earlier errors.

W (m, n) becomes Q on a `Grid`. The loss of D = W - Q is tr(C D H D^T), H (n, n) of the inputs and
C (m, m) of the output gradients. Work is done in the dtype of the weight, float32 at least;
factors of the metrics are found in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, NotPositiveDefinite
from ..linalg import Metric, check_matrix
from .grid import Grid
from .waves import places_in_waves

DAMP = 0.01
OUTPUT_DAMP = 0.1
"""Gradients are heavy-tailed and seen on fewer tokens: their metric generalises worse than the inputs'."""
ROWS = 32
_COLUMNS = 32
_ALONE = 128


@dataclass(frozen=True, slots=True)
class Feedback:
    """How the error of one entry of a side is best made good by those that come after it.

    The metric, with its entries in `order`, is mix @ diag(pivots) @ mix.T. A pivot is what is left of
    an entry of the diagonal when those that come later have done what they can.

    Args:
        mix: (size, size) upper triangular, ones on the diagonal.
        pivots: (size,) float64.
        order: (size,) places in the order of treatment; None for their own.
    """

    mix: Tensor
    pivots: Tensor
    order: Tensor | None = None

    @classmethod
    def of(cls, size: int, moment: Tensor | None, *, damp: float = DAMP, order: bool = True) -> "Feedback":
        """Factor a metric: None for the identity, (size,) for a diagonal, (size, size).

        Args:
            size: length of the side.
            moment: the metric; it may be singular where `damp` > 0.
            damp: added to the diagonal, in units of its mean.
            order: treat the largest entries of the diagonal first: more come after to make them good.

        Raises:
            ConfigError: the metric does not fit, or damp < 0.
            NotFinite: the metric has NaN or infinite entries.
            NotPositiveDefinite: the damped metric is not positive definite.
        """
        metric = Metric(size, moment, damp)
        if moment is not None and not bool(moment.any()):
            metric = Metric(size)
        dense = metric.dense()
        places = dense.diagonal().argsort(descending=True, stable=True) if order else None
        if places is not None:
            dense = dense[places][:, places]
        flipped, info = torch.linalg.cholesky_ex(dense.flip(0, 1))
        if info.item():
            raise NotPositiveDefinite(
                f"a metric of size {size} fails at pivot {info.item()} with damp={damp}: "
                f"raise `damp`, or calibrate on more than {size} tokens"
            )
        upper = flipped.flip(0, 1)
        diagonal = upper.diagonal()
        return cls(upper / diagonal, diagonal.square(), places)

    def in_place(self) -> Tensor:
        """Return the pivots (size,) at the places of their entries."""
        if self.order is None:
            return self.pivots
        return torch.empty_like(self.pivots).index_copy_(0, self.order, self.pivots)


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Return the codes (m, n), uint8, of the grid values nearest to `weight` (m, n)."""
    return grid.codes(_working(weight))


def compensated(
    weight: Tensor, grid: Grid, inputs: Tensor | None, *, damp: float = DAMP, order: bool = True
) -> Tensor:
    """Return codes (m, n), uint8, chosen column by column for a small tr(D H D^T).

    Each column is moved, before it is rounded, by what makes good the errors of the columns before it
    (GPTQ, Frantar et al. 2022; here in the equal form of LDLQ, Chee et al. 2023, which inverts nothing).
    Equals `nearest` where H is diagonal.

    Args:
        weight: (m, n).
        grid: of the same shape.
        inputs: H (n, n), or its diagonal (n,), or None for the identity.
        damp: added to the diagonal of H, in units of its mean.
        order: treat columns with large H first.

    Raises:
        ConfigError, NotFinite, NotPositiveDefinite: as `Feedback.of`; or the grid has another shape.
    """
    return carried(weight, grid, Feedback.of(weight.shape[1], inputs, damp=damp, order=order))


def two_sided(
    weight: Tensor,
    grid: Grid,
    inputs: Tensor | None,
    outputs: Tensor | None,
    *,
    damp: float = DAMP,
    output_damp: float = OUTPUT_DAMP,
    order: bool = True,
    rows: int = ROWS,
) -> Tensor:
    """Return codes (m, n), uint8, chosen for a small tr(C D H D^T).

    Blocks of `rows` rows follow one another, each moved by the conditional mean that makes good the
    errors of the rows before it; within a block, columns follow one another as in `compensated`
    (adaptive rounding for H (x) C: Tseng et al. 2025, with blocks on the side of the outputs).

    Args:
        weight: (m, n).
        grid: of the same shape.
        inputs: H (n, n), or its diagonal, or None for the identity.
        outputs: C (m, m), likewise.
        damp, output_damp: added to the diagonals of H and C, in units of their means.
        order: treat rows with large C and columns with large H first.
        rows: >= 1; fewer are better and slower.

    Raises:
        ConfigError, NotFinite, NotPositiveDefinite: as `Feedback.of`; or the grid has another shape.
    """
    along = Feedback.of(weight.shape[1], inputs, damp=damp, order=order)
    if outputs is None or outputs.ndim == 1:
        return carried(weight, grid, along)
    down = Feedback.of(weight.shape[0], outputs, damp=output_damp, order=order)
    return carried(weight, grid, along, down, rows=rows)


def carried(
    weight: Tensor, grid: Grid, along: Feedback, down: Feedback | None = None, *, rows: int = ROWS
) -> Tensor:
    """Return codes (m, n), uint8, where errors are carried along rows, and down from block to block.

    Args:
        weight: (m, n).
        grid: of the same shape.
        along: of the side of the inputs (n).
        down: of the side of the outputs (m); None to carry nothing from row to row.
        rows: >= 1, of a block.

    Raises:
        ConfigError: the grid has another shape, or rows < 1.
        NotFinite: the weight has NaN or infinite entries.
    """
    work = _working(weight)
    if work.shape != grid.scale.shape:
        raise ConfigError(
            f"a weight {tuple(work.shape)} and a grid {tuple(grid.scale.shape)}: make it for it"
        )
    if rows < 1:
        raise ConfigError(f"rows={rows}: must be >= 1")
    places = _places(down, len(work), work)[:, None], _places(along, work.shape[1], work)
    levels, ranking = grid.levels.to(work).sort()
    found = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    found[places] = ranking[
        places_in_waves(
            work[places],
            levels,
            grid.scale[places].to(work),
            None if grid.zero is None else grid.zero[places].to(work),
            along.mix.to(work),
            None if down is None else down.mix.to(work),
            rows=len(work) if down is None else min(rows, len(work)),
            columns=_ALONE if down is None else _COLUMNS,
        )
    ].to(torch.uint8)
    return found


def expected_loss(noise: Tensor, inputs: Feedback, outputs: Feedback | None = None) -> float:
    """Return the tr(C D H D^T) to expect of rounding with feedback along one side or both.

    With F the errors of rounding the moved entries, the loss is the sum of d_j c_i F_ij^2, d the
    pivots of H and c those of C (its diagonal where `compensated` does not see it), which holds
    exactly; that F_ij^2 is `noise` on average is what is expected, and holds for fine grids.

    Args:
        noise: expected squared error of each entry (m, n), or of a row (m, 1), a column (1, n).
        inputs: of H. Pass pivots=diagonal for rounding to nearest.
        outputs: of C; None for the identity.
    """
    columns, rows = inputs.in_place(), None if outputs is None else outputs.in_place()
    share = noise.to(torch.float64) * columns
    return float((share if rows is None else share * rows[:, None]).sum())


def _working(weight: Tensor) -> Tensor:
    work = check_matrix(weight, "weight").detach()
    return work if work.dtype == torch.float64 else work.to(torch.float32)


def _places(feedback: Feedback | None, size: int, like: Tensor) -> Tensor:
    if feedback is None or feedback.order is None:
        return torch.arange(size, device=like.device)
    return feedback.order.to(like.device)
