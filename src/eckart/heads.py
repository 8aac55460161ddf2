"""Attention heads made narrower: values with outputs in a new basis, queries with keys by pairs of rows.

The code of an architecture gives every head the same width, so what is left out stays as zeros in what
flows: only our loader runs these. Found by structure, verified by behaviour, like dimensions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import dimensions, models, width
from .dimensions import Dimension
from .factors import PartialLinear
from .linalg import Metric, to_float64
from .models import Target
from .width import Narrowing

_RIDGE = 1e-9


@dataclass(frozen=True, slots=True)
class Heads:
    """The four linears of an attention: `count` query heads in `groups` that share keys and values.

    interleaved: the rows that a position rotates together are 2j and 2j + 1 (else j and j + size / 2);
    None where queries and keys cannot lose pairs.
    """

    name: str
    query: str
    key: str
    value: str
    output: str
    count: int
    groups: int
    size: int
    interleaved: bool | None

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the four linears."""
        return (self.query, self.key, self.value, self.output)

    @property
    def values(self) -> str:
        """What the narrowing of values and outputs is called."""
        return f"{self.name}.values"

    @property
    def pairs(self) -> str:
        """What the narrowing of queries and keys is called."""
        return f"{self.name}.pairs"

    def halves(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two rows, within a head, of each of `pairs`."""
        return (2 * pairs, 2 * pairs + 1) if self.interleaved else (pairs, pairs + self.size // 2)


def found(model: Any, candidates: Sequence[Dimension]) -> list[Heads]:
    """Return the heads of the attentions among `candidates` that can be made narrower one by one.

    One attention of each build is tried: leaving out parts of values must equal not reading them,
    and a pair that is zero in the queries must not be read from the keys, nor the other way round
    (a norm of queries or keys would).
    """
    known: dict[object, tuple[int, int, int, bool | None] | None] = {}
    made = []
    for dimension in candidates:
        if dimension.kind != "attention" or len(dimension.writers) != 3:
            continue
        build = dimensions.build_of(model, dimension)
        if build not in known:
            known[build] = next(_roles(model, dimension), None)
        roles = known[build]
        if roles is not None:
            made.append(_heads(model, dimension, *roles))
    return made


@dataclass(frozen=True, slots=True)
class Cut:
    """A matrix of an attention as its heads: `count` times `size` rows, or columns."""

    side: Literal["rows", "columns"]
    count: int
    size: int

    def slices(self) -> list[slice]:
        """Return where each head stands."""
        return [slice(start, start + self.size) for start in range(0, self.count * self.size, self.size)]


def cuts(model: nn.Module) -> dict[str, Cut]:
    """Return how the projections of the attentions of `model` are made of heads, by shapes alone.

    Queries, keys and values are cut in rows, what reads them in columns; grouped keys and values have fewer
    heads. Where the three are one matrix, it is not cut. Whatever does not fit the number of heads that the
    config of the attention tells has no heads. Works on the meta device.
    """
    linears = [
        Target(name, (linear.out_features, linear.in_features))
        for name, linear in ((name, models.find(model, name)) for name in models.linear_names(model))
    ]
    mlps = {found.name for found in dimensions.find(model, linears) if found.kind == "mlp"}
    found: dict[str, Cut] = {}
    for name, group in dimensions.homes(model, linears).items():
        roles = None if name in mlps else dimensions.heads_of(group)
        if roles is not None:
            found |= _cut(_head_count(model, name), *roles)
    return found


def _head_count(model: Any, home: str) -> int:
    """Return how many query heads the attention called `home` has by its config; 0 where it does not say."""
    config = getattr(model.get_submodule(home), "config", None) or getattr(model, "config", None)
    return dimensions.head_count(config)


def _cut(count: int, reader: Target, writers: Sequence[Target]) -> dict[str, Cut]:
    inputs, rows = reader.shape[1], sorted(writer.shape[0] for writer in writers)
    if not count or inputs % count:
        return {}
    size = inputs // count
    if len(rows) == 3:
        shared, fits = rows[0], rows == [rows[0], rows[0], inputs]
    else:
        shared, rest = divmod(rows[0] - inputs, 2)
        fits = len(rows) == 1 and shared > 0 and rest == 0
    if not fits or shared % size or count % (shared // size):
        return {}
    found = {reader.name: Cut("columns", count, size)}
    if len(rows) == 3:
        found |= {writer.name: Cut("rows", writer.shape[0] // size, size) for writer in writers}
    return found


def places(per_head: Tensor, count: int, size: int) -> Tensor:
    """Return where the rows `per_head` of each of `count` heads stand."""
    return (torch.arange(count, device=per_head.device)[:, None] * size + per_head).flatten()


def _heads(
    model: Any, dimension: Dimension, query: int, key: int, value: int, interleaved: bool | None
) -> Heads:
    names = [name for name, _ in dimension.writers]
    size = models.find(model, names[value]).out_features // dimension.units
    count = models.find(model, dimension.reader).in_features // size
    return Heads(
        dimension.name, names[query], names[key], names[value], dimension.reader,
        count, dimension.units, size, interleaved,
    )  # fmt: skip


def _roles(model: Any, dimension: Dimension) -> Iterator[tuple[int, int, int, bool | None]]:
    """Yield which writer is the query, the key and the value, and how positions pair rows."""
    shapes = [models.find(model, name).weight.shape for name, _ in dimension.writers]
    inputs = models.find(model, dimension.reader).in_features
    for query, key, value in permutations(range(3)):
        if shapes[key] != shapes[value] or shapes[query][0] != inputs:
            continue
        heads = _heads(model, dimension, query, key, value, None)
        if heads.size % 4 == 0 and _values_hold(model, heads):
            conventions = [kind for kind in (False, True) if _pairs_hold(model, heads, kind)]
            yield query, key, value, conventions[0] if conventions else None


def _rest(dropped: Tensor, size: int) -> Tensor:
    """Return the rows of a head that are not `dropped`, ascending."""
    return torch.tensor(sorted(set(range(size)) - set(dropped.tolist())))


@torch.no_grad()
def _values_hold(model: Any, heads: Heads) -> bool:
    kept = torch.arange(1, heads.size, 2)
    value, output = models.find(model, heads.value), models.find(model, heads.output)
    masked = PartialLinear.slice(value, "rows", places(kept, heads.groups, heads.size))
    unread = PartialLinear.slice(output, "columns", places(kept, heads.count, heads.size))
    ids = models.probe(model)
    whole = models.probe_logits(model, ids)
    with dimensions.swapped(model, {heads.output: unread}):
        expected = models.probe_logits(model, ids)
    with dimensions.swapped(model, {heads.value: masked}):
        got = models.probe_logits(model, ids)
    return dimensions.agrees(got, expected, whole)


@torch.no_grad()
def _pairs_hold(model: Any, heads: Heads, interleaved: bool) -> bool:
    # Not every other pair: under the other convention those would pair up among themselves.
    pairs = torch.arange(0, heads.size // 2, 2)[: max(1, heads.size // 8)]
    kept = _rest(torch.cat(replace(heads, interleaved=interleaved).halves(pairs)), heads.size)
    query, key = models.find(model, heads.query), models.find(model, heads.key)
    less_query = PartialLinear.slice(query, "rows", places(kept, heads.count, heads.size))
    less_key = PartialLinear.slice(key, "rows", places(kept, heads.groups, heads.size))
    ids = models.probe(model)
    whole = models.probe_logits(model, ids)
    got = []
    for modules in ({heads.query: less_query}, {heads.key: less_key},
                    {heads.query: less_query, heads.key: less_key}):  # fmt: skip
        with dimensions.swapped(model, modules):
            got.append(models.probe_logits(model, ids))
    return all(dimensions.agrees(one, got[2], whole) for one in got[:2])


@dataclass(frozen=True, slots=True)
class ValueNarrowing:
    """Every width of the values of an attention: `basis (groups, size, size)`, then a narrowing in it.

    Row i of a group's basis is what the i-th part of its new values reads from the old ones.
    """

    basis: Tensor
    narrowing: Narrowing

    def tail(self) -> Tensor:
        """Return the squared error of every width 0 .. size."""
        return self.narrowing.tail()

    def value(self, matrix: Tensor, kept: int) -> Tensor:
        """Return `matrix` (groups size, k), a weight or a bias, in the new basis: (groups kept, k)."""
        groups, size, _ = self.basis.shape
        units = self.narrowing.units(kept)
        parts = self.basis[:, units] @ to_float64(matrix).view(groups, size, -1)
        return parts.flatten(0, 1)

    def output(self, kept: int) -> Tensor:
        """Return the weight (m, heads kept) that reads them."""
        weight = self.narrowing.refit(kept)
        return weight.view(len(weight), kept, -1).transpose(1, 2).flatten(1)


def narrow_values(heads: Heads, weight: Tensor, inputs: Metric, outputs: Metric) -> ValueNarrowing:
    """Return every narrowing of the values of `heads`, given the output weight (m, heads size).

    A group's basis is the generalised SVD of all that reads it, in the metrics of both sides; then all
    heads are re-fitted jointly at every width.
    """
    work, moment = to_float64(weight), to_float64(inputs.dense())
    share = heads.count // heads.groups
    blocks = work.view(len(work), heads.groups, share, heads.size)
    own = moment.view(heads.groups, share, heads.size, heads.groups, share, heads.size)
    bases = []
    for group in range(heads.groups):
        reads = blocks[:, group].permute(1, 0, 2)
        seen = torch.stack([own[group, head, :, group, head] for head in range(share)]).sum(0)
        asked = torch.stack([read.T @ outputs.times(read) for read in reads]).sum(0)
        bases.append(_basis(Metric(heads.size, asked, _RIDGE), Metric(heads.size, seen, _RIDGE)))
    basis = torch.stack(bases)
    whole: Tensor = torch.block_diag(*basis.repeat_interleave(share, dim=0))  # type: ignore[no-untyped-call]
    turned = torch.linalg.solve(whole, work, left=False)
    order = torch.arange(inputs.size, device=work.device).view(heads.count, heads.size).T.flatten()
    metric = Metric(inputs.size, (whole @ moment @ whole.T)[order][:, order])
    units = torch.arange(heads.size, device=work.device)
    return ValueNarrowing(basis, width.narrow(turned[:, order], metric, outputs, units))


def _basis(asked: Metric, seen: Metric) -> Tensor:
    identity = torch.eye(asked.size, dtype=torch.float64, device=asked.dense().device)
    left: Tensor = torch.linalg.svd(asked.root_times(seen.root_times(identity))).U
    rows = left.T @ asked.root_times(identity)
    norms: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / norms


@dataclass(frozen=True, slots=True)
class PairNarrowing:
    """The pairs of each group: `order (groups, size / 2)`, the most useful first, and what each saves."""

    order: Tensor
    losses: Tensor

    def tail(self) -> Tensor:
        """Return the squared error of every number of pairs 0 .. size / 2."""
        squares = self.losses.sum(0).flip(0)
        return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def narrow_pairs(heads: Heads, weight: Tensor, inputs: Metric, outputs: Metric) -> PairNarrowing:
    """Return the pairs of query rows by what zeroing each costs, given the query weight (heads size, n).

    A pair is left out for all heads of a group, which share its keys; nothing can be re-fitted, since
    positions rotate every pair by its own angle. Costs of pairs are added (CR decomposition of
    MoDeGPT, Lin et al. 2025, in the curvature metric).
    """
    work = to_float64(weight)
    error = to_float64(outputs.dense()).to(work) * (work @ inputs.times(work.T))
    share = heads.count // heads.groups
    parts = error.view(heads.groups, share, heads.size, heads.groups, share, heads.size)
    own = torch.stack([parts[group, :, :, group].sum((0, 2)) for group in range(heads.groups)])
    pairs = torch.arange(heads.size // 2, device=work.device)
    first, second = heads.halves(pairs)
    costs = own[:, first, first] + own[:, second, second] + 2 * own[:, first, second]
    order = costs.argsort(dim=1, descending=True)
    return PairNarrowing(order, costs.gather(1, order))
