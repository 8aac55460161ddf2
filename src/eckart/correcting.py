"""Store whole matrices in few bits with low-rank corrections, their ranks shared out by curvature."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import models
from .calibrate import Calibrated
from .factorize import loss_unit, matrix_metrics
from .linalg import Metric, to_float64, weighted_error
from .models import Target
from .quant import correction, leaves, rounding, storage
from .quant.corrected import CorrectedLinear
from .quant.correction import Fit, Rounders
from .quant.storage import Storage
from .quant.stored import StoredLinear
from .recipe import FLOAT, Recipe

Metrics = tuple[Metric, Metric]


@dataclass(frozen=True, slots=True)
class Whole:
    """A matrix that keeps its rank: what it was calibrated as, the nn.Linear that it is now, its storage."""

    target: Target
    name: str
    storage: str


@torch.no_grad()
def correct(
    recipe: Recipe,
    model: nn.Module,
    wanted: Sequence[Whole],
    calibrated: Calibrated,
    progress: Callable[[int, int], None],
) -> None:
    """Store the matrices `wanted` of `model`, in place, each with a correction of what that breaks.

    Matrices are rounded with compensation in the metric of the recipe's method (eckart.quant.leaves), which
    leaves less in it than rounding to nearest does at any rank; those of loftq to nearest, as published.
    Those of eckart are rounded again when their rank is known, in metrics without the dearest directions
    (eckart.quant.correction.relieved), and the better one is kept.

    The corrections take at most the bytes of `recipe.factors_rank` in every matrix. Where the method has
    gradients, the ranks are those of least loss by what is left in its metric at every rank; else the losses
    have no common unit, and all matrices get that rank. A matrix of rank 0 is stored alone.

    Args:
        recipe: correction, method, damping.
        model: in the dtype that it computes in.
        wanted: nn.Linear of it.
        calibrated: the statistics of the method and of the correction.
        progress: called with (done, total), two steps for each matrix.
    """
    first: dict[str, dict[str, Tensor]] = {}
    losses: dict[str, Tensor] = {}
    for done, whole in enumerate(wanted, 1):
        metrics = matrix_metrics(recipe, whole.target, calibrated, {})
        job = _Job(recipe, model, whole, metrics)
        first[whole.name] = job.packed(job.round(job.linear.weight.detach()))
        if _shared_out(recipe):
            unit = loss_unit(recipe.resolved_method(), calibrated, whole.target.name)
            losses[whole.name] = correction.tails(job.error(first[whole.name]), *metrics, unit)
        progress(done, 2 * len(wanted))
    ranks = _ranks(recipe, wanted, losses)
    for done, whole in enumerate(wanted, 1):
        metrics = matrix_metrics(recipe, whole.target, calibrated, {})
        job = _Job(recipe, model, whole, metrics)
        job.put(first.pop(whole.name), ranks[whole.name], calibrated)
        progress(len(wanted) + done, 2 * len(wanted))


def _shared_out(recipe: Recipe) -> bool:
    return recipe.resolved_method().outputs == "gradient"


def _ranks(recipe: Recipe, wanted: Sequence[Whole], losses: Mapping[str, Tensor]) -> dict[str, int]:
    shapes = {whole.name: whole.target.shape for whole in wanted}
    ranks = {name: min(recipe.factors_rank, *shape) for name, shape in shapes.items()}
    if not _shared_out(recipe):
        return ranks

    def cost(name: str, rank: int) -> int:
        return factor_bytes(recipe.factors_storage, shapes[name], rank)

    return correction.allocate_ranks(losses, cost, sum(cost(name, rank) for name, rank in ranks.items()))


def factor_bytes(stored: str, shape: tuple[int, int], rank: int) -> int:
    """Return the bytes of a correction of a matrix (m, n); of one stored in float, its parameters."""
    rows, columns = shape
    if stored == FLOAT:
        return rank * (rows + columns)
    kind = storage.get(stored)
    return kind.bytes((rows, rank)) + kind.bytes((rank, columns))


@dataclass(frozen=True, slots=True)
class _Job:
    """One matrix, and the metrics (H, C) in which it is rounded."""

    recipe: Recipe
    model: nn.Module
    whole: Whole
    metrics: Metrics

    @property
    def linear(self) -> nn.Linear:
        return models.find(self.model, self.whole.name)

    @property
    def storage(self) -> Storage:
        return storage.get(self.whole.storage)

    @property
    def method(self) -> correction.Method:
        assert self.recipe.correction is not None
        return correction.get(self.recipe.correction)

    def round(self, weight: Tensor) -> leaves.Rounded:
        """Return codes and grid of `weight` (m, n)."""
        if self.recipe.correction == "loftq":
            grid = self.storage.grid(weight)
            return leaves.Rounded(grid.codes(weight), grid, None)
        plain = nn.Linear(weight.shape[1], weight.shape[0], False, "meta")
        plain.weight = nn.Parameter(weight)
        return leaves.quantise(plain, {"": self.storage}, *(metric.moment for metric in self.metrics))[""]

    def round_relieved(self, weight: Tensor, rank: int) -> leaves.Rounded:
        """Return codes and grid of `weight` (m, n) that is to have a correction of `rank`.

        Half of its directions are taken out on each side: better on most matrices than all on one side.
        """
        inputs, outputs = self.metrics
        along = Metric(inputs.size, inputs.moment, rounding.DAMP).dense()
        down = Metric(outputs.size, outputs.moment, rounding.OUTPUT_DAMP).dense()
        down = correction.relieved(down, rank - rank // 2)
        if rank > 1:
            along = correction.relieved(along, rank // 2)
        plain = nn.Linear(weight.shape[1], weight.shape[0], False, "meta")
        plain.weight = nn.Parameter(weight)
        return leaves.quantise(plain, {"": self.storage}, along, down, damp=0.0, output_damp=0.0)[""]

    def error(self, packed: Mapping[str, Tensor]) -> Tensor:
        """Return what is wrong with the matrix as it is packed, float64."""
        weight = self.linear.weight.detach()
        return to_float64(weight) - to_float64(self.storage.decode(packed, self.whole.target.shape))

    def put(self, packed: dict[str, Tensor], rank: int, calibrated: Calibrated) -> None:
        """Put the stored matrix into the model with a correction of `rank`; `packed` is it, rounded alone."""
        fit = None
        if rank:
            packed, fit = self._fitted(packed, rank, calibrated)
        codes, grid = self.storage.unpack(packed, self.whole.target.shape)
        made: nn.Module = StoredLinear.of(self.linear, self.storage, codes, grid)
        if fit is not None:
            made = _with(made, fit, self.recipe.factors_storage, self.linear.weight.dtype)
        models.replace(self.model, self.whole.name, made)

    def _fitted(
        self, packed: dict[str, Tensor], rank: int, calibrated: Calibrated
    ) -> tuple[dict[str, Tensor], Fit]:
        """Return what is packed at the end, and its correction."""
        method, name = self.method, self.whole.target.name
        moments = {kind: calibrated.stats.moment(kind, name).mean() for kind in method.statistics()}
        metrics = method.metrics(self.whole.target.shape, moments, self.recipe.damp)
        rounders = _rounders(self.recipe.factors_storage)
        if method.steps == 1:
            candidates = [packed]
            if self.recipe.correction == "eckart":
                candidates.append(self.packed(self.round_relieved(self.linear.weight.detach(), rank)))
            errors = [self.error(one) for one in candidates]
            fits = [correction.fit(error, rank, *metrics, rounders) for error in errors]
            left = [
                weighted_error(error - fit.factors.dense(), *metrics)
                for error, fit in zip(errors, fits, strict=True)
            ]
            best = left.index(min(left))
            return candidates[best], fits[best]
        found = correction.correct(
            self.linear.weight.detach(),
            lambda matrix: self.round(matrix).values().to(matrix.dtype),
            rank,
            *metrics,
            steps=method.steps,
            rounders=rounders,
        )
        return self.packed(self.round(found.target)), Fit(found.factors, found.unrounded)

    def packed(self, found: leaves.Rounded) -> dict[str, Tensor]:
        """Return the tensors to store."""
        return self.storage.pack(found.codes, found.grid)


def _rounders(stored: str) -> Rounders | None:
    if stored == FLOAT:
        return None
    kind = storage.get(stored)

    def nearest(factor: Tensor) -> Tensor:
        return kind.grid(factor).rounded(factor)

    return Rounders(nearest, nearest)


def _with(base: nn.Module, fit: Fit, stored: str, dtype: torch.dtype) -> CorrectedLinear:
    """Return `base` with the correction as it is stored."""
    made = CorrectedLinear.of(base, fit.factors, dtype)
    if stored == FLOAT:
        return made
    kind = storage.get(stored)
    for name, factor in (("up", fit.unrounded.left), ("down", fit.unrounded.right)):
        plain, grid = made.get_submodule(name), kind.grid(factor)
        assert isinstance(plain, nn.Linear)
        setattr(made, name, StoredLinear.of(plain, kind, grid.codes(factor), grid))
    return made
