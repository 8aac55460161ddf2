"""Singular values, plain or in metrics, and what they say: ranks, noise, how the energy is spread.

Nothing here knows of models or names. Energy is the squared (weighted) Frobenius norm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .errors import ConfigError
from .linalg import Metric, check_matrix, to_float64

ENERGIES = (0.9, 0.95, 0.99, 0.999)
"""Shares of the energy whose ranks are told."""
SHARES = (0.05, 0.1)
"""Shares of the singular values whose energy is told, the largest first."""
TOP = 256
"""A number of singular values whose energy is told."""
_MEDIAN_POINTS = 20_000


def singular_values(matrix: Tensor, inputs: Metric | None = None, outputs: Metric | None = None) -> Tensor:
    """Return the singular values (k,) of C^1/2 `matrix` H^1/2, k = min(m, n), descending.

    H (n, n) is `inputs`, C (m, m) is `outputs`, the identity by default. From the eigenvalues of the smaller
    Gram matrix, in float64 throughout: what is below `resolution` of the largest is rounding.

    Raises:
        NotFinite: an entry is NaN or infinite.
        ConfigError: the matrix is empty, or a metric does not fit its side.
    """
    work = to_float64(check_matrix(matrix))
    rows, columns = work.shape
    inputs, outputs = inputs or Metric(columns), outputs or Metric(rows)
    if (rows, columns) != (outputs.size, inputs.size):
        raise ConfigError(
            f"a matrix of {rows} x {columns} with metrics for {outputs.size} outputs and {inputs.size} inputs"
        )
    if rows > columns:
        return singular_values(work.T, outputs, inputs)
    rooted = outputs.factor_times(work)
    values: Tensor = torch.linalg.eigvalsh(rooted @ inputs.times(rooted.T))
    return values.flip(0).clamp(min=0).sqrt()


def resolution(shape: tuple[int, int]) -> float:
    """Return below which share of the largest a value of `singular_values` may be rounding alone.

    The Gram matrix squares the values, and float64 has a relative error of eps times the longer side.
    """
    return math.sqrt(max(shape) * torch.finfo(torch.float64).eps)


def tail(values: Tensor) -> Tensor:
    """Return the squared error of every rank 0 .. k, (k + 1,), descending to 0."""
    squares = values.to(torch.float64).square().flip(0)
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def rank_at(values: Tensor, fraction: float) -> int:
    """Return the fewest terms that hold `fraction` of the squared spectrum `values` (k,); 0 of nothing."""
    errors = tail(values)
    return int((errors > (1 - fraction) * errors[0]).sum())


def held(values: Tensor, count: int) -> float:
    """Return the share of the energy that the `count` largest of `values` (k,) hold; 1 of nothing."""
    errors = tail(values)
    whole = float(errors[0])
    return 1 - float(errors[min(count, len(values))]) / whole if whole else 1.0


def stable_rank(values: Tensor) -> float:
    """Return ||W||_F^2 / ||W||_2^2 of the singular values `values` (k,); 0 of nothing."""
    largest = float(values[0])
    return float(values.to(torch.float64).square().sum()) / largest**2 if largest else 0.0


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of values / sum(values) (Roy & Vetterli 2007, definition 1); 0 of nothing."""
    work = values.to(torch.float64)
    total = float(work.sum())
    if not total:
        return 0.0
    shares = work / total
    return math.exp(-float(torch.xlogy(shares, shares).sum()))


def condition(values: Tensor, shape: tuple[int, int]) -> float:
    """Return the largest over the smallest of `values` (k,); infinite where `resolution` hides that."""
    largest, smallest = float(values[0]), float(values[-1])
    return largest / smallest if smallest > largest * resolution(shape) else math.inf


def noise_threshold(values: Tensor, shape: tuple[int, int]) -> float:
    """Return below which a singular value of a matrix of `shape` (m, n) is noise of unknown strength.

    lambda(beta) / sqrt(mu(beta)) times the median singular value, with beta the ratio of the sides,
    lambda the optimal hard threshold for known noise and mu the median of the Marchenko-Pastur law
    (Gavish & Donoho 2014, equations 11 and 17 and section III.E). For a signal of low rank in white
    noise, in the large, no threshold has a lower mean squared error.
    """
    beta = min(shape) / max(shape)
    root = math.sqrt(beta * beta + 14 * beta + 1)
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
    return known / math.sqrt(_marchenko_pastur_median(beta)) * float(values.median())


@lru_cache(maxsize=64)
def _marchenko_pastur_median(beta: float) -> float:
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # x = low + (high - low) sin^2(t): smooth where the density has a root or, at beta 1, a pole.
    angle = (torch.arange(_MEDIAN_POINTS, dtype=torch.float64) + 0.5) * (math.pi / 2 / _MEDIAN_POINTS)
    points = low + (high - low) * angle.sin().square()
    mass = (angle.sin() * angle.cos()).square() / points
    share = (mass.cumsum(0) - mass / 2) / mass.sum()
    return float(points[int(torch.searchsorted(share, 0.5))])


@dataclass(frozen=True, slots=True)
class Noise:
    """What of a plain spectrum white noise would explain.

    sigma: standard deviation of the entries, had they given the median singular value.
    edge: the largest singular value of such noise, in the large.
    above: how many singular values are larger.
    """

    sigma: float
    edge: float
    above: int


def noise(values: Tensor, shape: tuple[int, int]) -> Noise:
    """Return the edge of Marchenko & Pastur for the singular values `values` (k,) of a matrix of `shape`.

    sigma = median / sqrt(max(m, n) mu(beta)) as Gavish & Donoho (2014, section III.E) estimate it, mu being
    the median of the law; edge = sigma (sqrt(m) + sqrt(n)). The median is that of noise as long as fewer than
    half of the values are signal. Of a finite matrix of noise a value or two may lie above, by a share of
    about min(m, n)^(-2/3) (Johnstone 2001).
    """
    longer, root = max(shape), math.sqrt(min(shape) / max(shape))
    sigma = float(values.median()) / math.sqrt(longer * _marchenko_pastur_median(root * root))
    edge = sigma * math.sqrt(longer) * (1 + root)
    floor = float(values[0]) * resolution(shape)
    return Noise(sigma, edge, int((values > max(edge, floor)).sum()))


@dataclass(frozen=True, slots=True)
class Measures:
    """What one spectrum says.

    energy: the squared (weighted) Frobenius norm.
    largest: the spectral norm.
    ranks: the fewest terms that hold each of ENERGIES.
    condition: infinite where it cannot be told (`condition`).
    held: the share of the energy in each of SHARES of the values, their number rounded up.
    held_top: the share in the TOP largest; None where there are not so many.
    """

    energy: float
    largest: float
    ranks: tuple[int, ...]
    stable_rank: float
    effective_rank: float
    condition: float
    held: tuple[float, ...]
    held_top: float | None


def measure(values: Tensor, shape: tuple[int, int]) -> Measures:
    """Return what the singular values `values` (k,), descending, of a matrix of `shape` (m, n) say."""
    return Measures(
        energy=float(values.square().sum()),
        largest=float(values[0]),
        ranks=tuple(rank_at(values, fraction) for fraction in ENERGIES),
        stable_rank=stable_rank(values),
        effective_rank=effective_rank(values),
        condition=condition(values, shape),
        held=tuple(held(values, count) for count in counts(len(values))),
        held_top=held(values, TOP) if len(values) >= TOP else None,
    )


def counts(size: int, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """Return how many of `size` values each of `shares` of them are, rounded up."""
    return tuple(math.ceil(share * size) for share in shares)
