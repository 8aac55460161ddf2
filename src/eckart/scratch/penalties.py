"""Penalties on matrices that seek low rank: values and gradients, exact, for a matrix and for its factors.

A matrix `weight (m, n)` needs a decomposition, which its `anchor` holds: it may be kept for some steps. With
the anchor of the matrix itself value and gradient are exact; in between, the gradient is that of a function
that touches the penalty where the anchor was taken, from below (nuclear) or from above (tail). Factors
`left (m, r) @ right (r, n)` need none: what they need is decomposed in r x r, exactly, every time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..linalg import check_rank, to_float64

_NEWTON_SCHULZ_STEPS = 12


class Pull(NamedTuple):
    """A penalty's value, and its gradient in the one matrix or in (left, right)."""

    value: Tensor
    gradients: tuple[Tensor, ...]


class Penalty(Protocol):
    """A function of matrices that is lower where rank is lower."""

    def anchor(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return what of the decomposition of `weight` (m, n) the gradient needs."""

    def on_matrix(self, weight: Tensor, anchor: tuple[Tensor, ...]) -> Pull:
        """Return value and gradient at `weight` (m, n)."""

    def on_factors(self, left: Tensor, right: Tensor) -> Pull:
        """Return value and gradients at `left (m, r) @ right (r, n)`."""


def polar_by_svd(weight: Tensor) -> Tensor:
    """Return U V^T (m, n) of the singular value decomposition of `weight`, in float64 inside.

    Directions whose singular value is zero to rounding are left out, so that the result is the
    subgradient of least norm.
    """
    left, values, right = torch.linalg.svd(to_float64(weight), full_matrices=False)
    floor = values[0] * max(weight.shape) * torch.finfo(weight.dtype).eps
    found: Tensor = (left * (values > floor)) @ right
    return found.to(weight)


def polar_by_newton_schulz(weight: Tensor) -> Tensor:
    """Return nearly U V^T (m, n) by products alone: 12 steps of X <- (3 X - X X^T X) / 2, in float32.

    Singular values s of X, scaled by the Frobenius norm, tend to 1 monotonically from below: those above 1 %
    of the norm come within 1 %, smaller ones remain below 1 (Higham 2008, section 8.3). A lower bound of the
    exact direction, for devices that are slow at decompositions.
    """
    wide = weight.shape[0] < weight.shape[1]
    found = (weight if wide else weight.T).float()
    norm = found.norm()
    found = found / norm if float(norm) > 0 else found
    for _ in range(_NEWTON_SCHULZ_STEPS):
        found = 1.5 * found - 0.5 * (found @ found.T) @ found
    return (found if wide else found.T).to(weight)


@dataclass(frozen=True, slots=True)
class Nuclear:
    """The nuclear norm, sum of the singular values (Fazel 2002).

    Of factors, its bound (|left|^2 + |right|^2) / 2 in Frobenius norms, which is attained where they are
    balanced (Srebro et al. 2004, lemma 1). The gradient in a matrix is U V^T, exact with
    `polar_by_svd` and shortened along small singular values with `polar_by_newton_schulz`.
    """

    polar: Callable[[Tensor], Tensor] = polar_by_svd

    def anchor(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return U V^T (m, n)."""
        return (self.polar(weight),)

    def on_matrix(self, weight: Tensor, anchor: tuple[Tensor, ...]) -> Pull:
        """Return <U V^T, weight>, the norm at the anchor and at most that elsewhere, and U V^T."""
        return Pull((anchor[0] * weight).sum(), (anchor[0],))

    def on_factors(self, left: Tensor, right: Tensor) -> Pull:
        """Return the bound and its gradients, the factors themselves."""
        return Pull((left.square().sum() + right.square().sum()) / 2, (left, right))


@dataclass(frozen=True, slots=True)
class Tail:
    """Half the squared singular values beyond the first `rank`: half the squared distance to that rank.

    The gradient is weight - truncated weight (Eckart & Young 1936), unique where the two singular values at
    the cut differ. Between anchors it is half the energy outside the anchor's subspace, at least the tail.
    """

    rank: int

    def anchor(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the first singular vectors of the shorter side, (min(m, n), rank).

        Raises:
            RankError: unless 1 <= rank <= min(m, n).
        """
        check_rank(self.rank, (weight.shape[0], weight.shape[1]))
        work = to_float64(weight if weight.shape[0] <= weight.shape[1] else weight.T)
        vectors = torch.linalg.eigh(work @ work.T).eigenvectors
        return (vectors[:, -self.rank :].to(weight),)

    def on_matrix(self, weight: Tensor, anchor: tuple[Tensor, ...]) -> Pull:
        """Return half the energy outside the anchor's subspace, and what is outside it (m, n)."""
        (basis,) = anchor
        if weight.shape[0] <= weight.shape[1]:
            rest = weight - basis @ (basis.T @ weight)
        else:
            rest = weight - (weight @ basis) @ basis.T
        return Pull(rest.square().sum() / 2, (rest,))

    def on_factors(self, left: Tensor, right: Tensor) -> Pull:
        """Return half the tail of the product, and its gradients; zero where the rank is below already."""
        core = _Core.of(left, right)
        beyond = torch.arange(len(core.values)).to(core.values.device) >= self.rank
        values = core.values * beyond
        return Pull((values.square().sum() / 2).to(left), core.pulled(values))


@dataclass(frozen=True, slots=True)
class StableRank:
    """|weight|_F^2 / |weight|_2^2, at most the rank (Rudelson & Vershynin 2007). It does not depend on scale.

    The gradient, 2 W / s^2 - 2 |W|_F^2 / s^3 u v^T with the first singular triplet, is orthogonal to W and
    exists where the first two singular values differ. Between anchors the triplet is that of the anchor.
    """

    def anchor(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return u (m,) and v (n,) of the largest singular value."""
        left, _, right = torch.linalg.svd(to_float64(weight), full_matrices=False)
        return left[:, 0].to(weight), right[0].to(weight)

    def on_matrix(self, weight: Tensor, anchor: tuple[Tensor, ...]) -> Pull:
        """Return |W|_F^2 / (u^T W v)^2 and its gradient (m, n) at the anchor's u and v."""
        first, second = anchor
        top, energy = first @ weight @ second, weight.square().sum()
        slope = 2 * weight / top**2 - (2 * energy / top**3) * torch.outer(first, second)
        return Pull(energy / top**2, (slope,))

    def on_factors(self, left: Tensor, right: Tensor) -> Pull:
        """Return the stable rank of the product, and its gradients."""
        core = _Core.of(left, right)
        top, energy = core.values[0], core.values.square().sum()
        slope = 2 * core.values / top**2
        slope[0] -= 2 * energy / top**3
        return Pull((energy / top**2).to(left), core.pulled(slope))


@dataclass(frozen=True, slots=True)
class Orthogonality:
    """A quarter of the squared inner products between columns of left, and between rows of right.

    Zero where the product of the factors is its own singular value decomposition up to scale, so that it can
    be cut by leaving out columns. For factors alone.
    """

    def anchor(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Refuse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"penalty orthogonality is for factors, and here is a matrix of {tuple(weight.shape)}: factor it "
            "first (keep or rank), or use nuclear, tail or stable-rank"
        )

    def on_matrix(self, weight: Tensor, anchor: tuple[Tensor, ...]) -> Pull:
        """Refuse, as `anchor` does."""
        self.anchor(weight)
        raise AssertionError("unreachable")

    def on_factors(self, left: Tensor, right: Tensor) -> Pull:
        """Return the value and its gradients: left and right times their Gram matrices without diagonals."""
        columns, rows = _without_diagonal(left.T @ left), _without_diagonal(right @ right.T)
        value = (columns.square().sum() + rows.square().sum()) / 4
        return Pull(value, (left @ columns, rows @ right))


def _without_diagonal(gram: Tensor) -> Tensor:
    return gram - torch.diag(gram.diagonal())


def frobenius(left: Tensor, right: Tensor) -> Pull:
    """Return half of |left @ right|_F^2 and its gradients, by Gram matrices (r, r).

    What decay of the product takes off (Khodak et al. 2021, equation 3); weight decay takes off the factors
    what the nuclear norm would.
    """
    columns, rows = left.T @ left, right @ right.T
    return Pull((columns * rows).sum() / 2, (left @ rows, columns @ right))


@dataclass(frozen=True, slots=True)
class _Core:
    """The singular values of a product of factors, and what turns a function of them into gradients."""

    values: Tensor
    left: Tensor
    right: Tensor
    factors: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> "_Core":
        columns, mix = torch.linalg.qr(to_float64(left))
        rows, other = torch.linalg.qr(to_float64(right).T)
        inner, values, outer = torch.linalg.svd(mix @ other.T)
        return cls(values, columns @ inner, outer @ rows.T, (left, right))

    def pulled(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients in the factors of a function with these derivatives in the singular values."""
        left, right = self.factors
        scaled = self.left * slopes
        return (
            (scaled @ (self.right @ to_float64(right).T)).to(left),
            ((to_float64(left).T @ scaled) @ self.right).to(right),
        )
