"""From weights and statistics to decompositions, transformer block by transformer block.

A block's statistics are freed when it is factored, so that an executor may own one block at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import methods, models, width
from .calibrate import Calibrated, calibrate, calibrate_batches
from .dimensions import Dimension
from .heads import Heads, PairNarrowing, ValueNarrowing, narrow_pairs, narrow_values
from .linalg import Metric, WeightedSVD, weighted_svd
from .losses import Batches
from .models import Target
from .quant import noise
from .quant.noise import Noise
from .readings import Reading
from .recipe import Recipe
from .stacking import stacked_svd
from .stats import Stats
from .width import Narrowing
from .windows import Rows

_ZERO = "zero"

Found = WeightedSVD | Narrowing | ValueNarrowing | PairNarrowing


class Decomposition(Protocol):
    """What choices and modules are made of, wherever it is kept: see `Part`."""

    @property
    def unit(self) -> float:
        """Return what turns its squared errors into loss per token."""
        ...

    @property
    def decomposed(self) -> bool:
        """Tell whether it has ranks, or widths, to choose from."""
        ...

    @property
    def found(self) -> Found | None:
        """Return the decomposition itself."""
        ...

    @property
    def svd(self) -> WeightedSVD:
        """Return the decomposition of a matrix."""
        ...

    @property
    def narrowing(self) -> Narrowing:
        """Return the decomposition of a hidden dimension."""
        ...

    def losses(self) -> Tensor:
        """Return the estimated loss per token of every rank, or width, from 0 to all (k + 1,)."""
        ...

    def noises(self) -> Noise | None:
        """Return what rounding adds to the loss per token, per unit of a storage's noise, where asked for."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """A decomposed matrix, or the weight that reads a decomposed hidden dimension.

    `found` is None for a matrix that keeps its rank, and `noise` where nothing is stored in few bits.
    """

    found: Found | None
    unit: float
    noise: Noise | None = None

    @property
    def decomposed(self) -> bool:
        """Tell whether it has ranks, or widths, to choose from."""
        return self.found is not None

    def losses(self) -> Tensor:
        """Return the estimated loss per token of every rank, or width, from 0 to all (k + 1,)."""
        assert self.found is not None
        return self.unit * self.found.tail()

    def noises(self) -> Noise | None:
        """Return what rounding adds to the loss per token, per unit of a storage's noise, where asked for."""
        return None if self.noise is None else self.noise.times(self.unit)

    @property
    def svd(self) -> WeightedSVD:
        """The decomposition of a matrix."""
        assert isinstance(self.found, WeightedSVD)
        return self.found

    @property
    def narrowing(self) -> Narrowing:
        """The decomposition of a hidden dimension."""
        assert isinstance(self.found, Narrowing)
        return self.found


@dataclass(frozen=True, slots=True)
class Decomposed:
    """Everything that choices are made of: serves every budget.

    Args:
        parts: by the name of a matrix, a dimension, or what is made narrower in heads.
        dimensions: hidden dimensions that may be made narrower.
        heads: attentions whose heads may be.
        blocks: what it costs to leave out each block that may be.
        bases: names of the matrices that share a right factor; their parts are cuts of one decomposition.
        readings: matrices of one input that may have a common right factor; each has a part for the stack.
    """

    parts: Mapping[str, Decomposition]
    dimensions: Sequence[Dimension]
    heads: Sequence[Heads]
    blocks: Mapping[str, float]
    bases: Sequence[tuple[str, ...]] = ()
    readings: Sequence[Reading] = ()

    def reading(self, basis: tuple[str, ...]) -> Reading | None:
        """Return the reading whose stack has the right factor common to the matrices `basis`, if one has."""
        return next((found for found in self.readings if found.members == basis), None)

    def shared(self) -> dict[str, tuple[Heads, str]]:
        """Return, for each linear of `heads`, its heads and the part that it shares with another."""
        found: dict[str, tuple[Heads, str]] = {}
        for own in self.heads:
            found |= dict.fromkeys((own.value, own.output), (own, own.values))
            found |= dict.fromkeys((own.query, own.key), (own, own.pairs))
        return found

    def losses(self) -> dict[str, Tensor]:
        """Return the estimated loss of every rank or width, by name."""
        return {name: part.losses() for name, part in self.parts.items() if part.decomposed}

    def noises(self) -> dict[str, Noise]:
        """Return what rounding adds, by name."""
        found = {name: part.noises() for name, part in self.parts.items()}
        return {name: noise for name, noise in found.items() if noise is not None}


def by_block(model: nn.Module, found: Sequence[Target]) -> list[list[Target]]:
    """Group targets by transformer block, in order; those outside the blocks come last, together."""
    prefixes = [f"{name}." for name in models.all_blocks(model)]
    groups: list[list[Target]] = [[] for _ in range(len(prefixes) + 1)]
    for target in found:
        place = next((i for i, prefix in enumerate(prefixes) if target.name.startswith(prefix)), -1)
        groups[place].append(target)
    return [group for group in groups if group]


def statistics_of(
    recipe: Recipe,
    model: Any,
    names: Sequence[str],
    rows: Rows | None,
    watch: Callable[[int, int], None] | None = None,
) -> Calibrated:
    """Return the statistics of the modules `names` that `recipe` asks for, on windows or batches."""
    statistics = recipe.statistics()
    if rows is None or not statistics:
        return Calibrated(Stats(), 0, 0)
    generator = torch.Generator().manual_seed(recipe.seed)
    if isinstance(rows, Batches):
        return calibrate_batches(
            model, rows, names, statistics, labels=recipe.labels, generator=generator, watch=watch
        )
    return calibrate(
        model, rows, names, statistics,
        gradient_windows=max(1, recipe.gradient_tokens // rows.shape[1]), labels=recipe.labels,
        generator=generator, watch=watch,
    )  # fmt: skip


def factor(
    recipe: Recipe,
    model: nn.Module,
    found: Sequence[Target],
    dimensions: Sequence[Dimension],
    heads: Sequence[Heads],
    calibrated: Calibrated,
    progress: Callable[[int, int], None],
    bases: Sequence[tuple[str, ...]] = (),
    readings: Sequence[Reading] = (),
) -> tuple[dict[str, Part], list[str]]:
    """Return the decomposition of every target and dimension, and warnings about moments that lack tokens.

    The statistics are used up: those of a block are freed as soon as it is done.
    """
    parts: dict[str, Part] = {}
    short: dict[str, int] = {}
    done = 0
    for group in _joined(by_block(model, found), bases):
        own = {target.name for target in group}
        inside = [dimension for dimension in dimensions if dimension.reader in own]
        own_heads = [attention for attention in heads if attention.output in own]
        together = [names for names in bases if own.issuperset(names)]
        alone = [target for target in group if not any(target.name in names for names in together)]
        roots: dict[str, Metric] = {}
        parts |= factor_block(recipe, model, alone, inside, own_heads, calibrated, short, roots)
        for reading in readings:
            if own.issuperset(reading.members):
                parts[reading.name] = factor_reading(recipe, model, group, reading, calibrated, roots)
        for names in together:
            parts |= factor_basis(recipe, model, [t for t in group if t.name in names], calibrated)
        if not recipe.stores:  # what is rounded later is rounded in these metrics
            calibrated.stats.forget([name for target in group for name in target.modules])
        done += len(group)
        progress(done, len(found))
    return parts, shortages(recipe, short)


def shortages(recipe: Recipe, short: Mapping[str, int]) -> list[str]:
    """Return the warnings about moments of a kind that lack so many tokens."""
    zero = (
        "some matrices read nothing but zeros, or have no gradient, on the calibration data: they seem to "
        "cost nothing, and are cut as if all inputs were alike"
    )
    return [
        zero
        if kind == _ZERO
        else f"too few tokens for the rank of some {kind} moments: {need:,} are needed, damping "
        f"({recipe.damp:g}) fills the gap"
        for kind, need in short.items()
    ]


def _joined(groups: list[list[Target]], bases: Sequence[tuple[str, ...]]) -> list[list[Target]]:
    """Join the groups that hold matrices which share a basis: they are decomposed together."""
    if not bases:
        return groups
    joined: list[list[Target]] = []
    place = {name: names[0] for names in bases for name in names}
    for group in groups:
        firsts = {place[target.name] for target in group if target.name in place}
        known = next((old for old in joined if any(t.name in firsts for t in old)), None)
        if known is None:
            joined.append(list(group))
        else:
            known.extend(group)
    return joined


def factor_basis(
    recipe: Recipe, model: nn.Module, members: Sequence[Target], calibrated: Calibrated
) -> dict[str, Part]:
    """Decompose matrices that share a right factor, as one above the other, in the mean of their metrics."""
    method, stats = recipe.resolved_method(), calibrated.stats
    weights = [models.weight(model, target) for target in members]
    width = members[0].shape[1]
    if method.inputs == "identity":
        inputs = Metric(width)
    else:
        moments = [stats.moment(method.inputs, target.name).mean() for target in members]
        inputs = Metric(width, torch.stack(moments).mean(0), recipe.damp)
    rows = torch.cat([weight.to(torch.float64) for weight in weights])
    found = weighted_svd(rows, inputs, Metric(len(rows)))
    cuts = torch.split(found.left, [target.shape[0] for target in members])
    return {
        target.name: Part(WeightedSVD(left, found.right, found.spectrum), 1.0)
        for target, left in zip(members, cuts, strict=True)
    }


def factor_reading(
    recipe: Recipe,
    model: nn.Module,
    group: Sequence[Target],
    reading: Reading,
    calibrated: Calibrated,
    shared: dict[str, Metric],
) -> Part:
    """Decompose matrices that read the same input as one above the other, each in its own output metric.

    They see the same tokens, so the unit of one is that of all.
    """
    members = [target for target in group if target.name in reading.members]
    metrics = [matrix_metrics(recipe, target, calibrated, shared) for target in members]
    weights = [models.weight(model, target) for target in members]
    unit = loss_unit(recipe.resolved_method(), calibrated, members[0].name)
    return Part(stacked_svd(weights, metrics[0][0], [outputs for _, outputs in metrics]), unit)


def factor_block(
    recipe: Recipe,
    model: nn.Module,
    group: Sequence[Target],
    dimensions: Sequence[Dimension],
    heads: Sequence[Heads],
    calibrated: Calibrated,
    short: dict[str, int],
    shared: dict[str, Metric] | None = None,
) -> dict[str, Part]:
    """Decompose the matrices of one block; matrices that read the same input share its metric's root.

    Matrices that can only be narrowed (form width) are not decomposed by themselves. `shared` keeps these
    metrics from one call to the next.
    """
    method, stats = recipe.resolved_method(), calibrated.stats
    shared = {} if shared is None else shared
    outputs = {attention.output: attention for attention in heads}
    queries = {attention.query: attention for attention in heads if attention.interleaved is not None}
    readers = {dimension.reader: dimension for dimension in dimensions}
    parts: dict[str, Part] = {}
    for target in group:
        weight, unit = models.weight(model, target), loss_unit(method, calibrated, target.name)
        metrics = matrix_metrics(recipe, target, calibrated, shared)
        svd = weighted_svd(weight, *metrics) if target.form(method.low_rank) is not None else None
        rounding = _noise(target, weight, metrics, svd) if recipe.stores else None
        if svd is not None or rounding is not None:
            parts[target.name] = Part(svd, unit, rounding)
        if target.name in readers:
            dimension = readers[target.name]
            order = width.ORDERS[method.landmarks](weight, *metrics, dimension.units)
            parts[dimension.name] = Part(width.narrow(weight, *metrics, order), unit)
        if target.name in outputs:
            parts[outputs[target.name].values] = Part(
                narrow_values(outputs[target.name], weight, *metrics), unit
            )
        if target.name in queries:
            parts[queries[target.name].pairs] = Part(
                narrow_pairs(queries[target.name], weight, *metrics), unit
            )
        for kind in method.statistics():
            moment = stats.moment(kind, target.name)
            if methods.is_zero(moment):
                short[_ZERO] = 1
            elif methods.shortage(moment):
                short[kind] = max(short.get(kind, 0), moment.total.shape[0])
    return parts


def _noise(target: Target, weight: Tensor, metrics: tuple[Metric, Metric], svd: WeightedSVD | None) -> Noise:
    """Return what rounding `target` costs; an embedding table is stored with a row for each token."""
    inputs, outputs = metrics
    if target.embedding:
        flipped = None if svd is None else WeightedSVD(svd.right.T, svd.left.T, svd.spectrum)
        return noise.of_matrix(weight.T, outputs, inputs, flipped)
    return noise.of_matrix(weight, inputs, outputs, svd)


def matrix_metrics(
    recipe: Recipe, target: Target, calibrated: Calibrated, shared: dict[str, Metric]
) -> tuple[Metric, Metric]:
    """Return H and C of one matrix; `shared` holds the H of the inputs seen so far in the block."""
    method, stats = recipe.resolved_method(), calibrated.stats
    damp, alpha = recipe.damp, recipe.alpha
    if target.head is not None:
        return methods.tied_metrics(method, stats, target.name, target.head, target.shape, damp, alpha)
    outputs, inputs = target.shape
    # A Fisher diagonal belongs to one weight; the other input statistics to all that read the input.
    leader = target.name if method.inputs == "fisher" else stats.leader(target.name)
    if leader not in shared:
        shared[leader] = methods.input_metric(method, stats, target.name, inputs, damp, alpha)
    return shared[leader], methods.output_metric(method, stats, target.name, outputs, damp)


def loss_unit(method: methods.Method, calibrated: Calibrated, name: str) -> float:
    """Return (N_module / N) / 2, which turns tr(C D H D^T) into loss per token; 1 where C is not known."""
    if method.outputs != "gradient":
        return 1.0
    seen = calibrated.stats.moment("gradient", name).count
    return seen / calibrated.loss_terms / 2
