"""Merge an adapter into a model: exactly where weights are dense, at their own rank where they are not."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .. import factors, hub, measure, models, plugin, windows
from ..errors import ModelError
from ..factors import FactoredLinear, LowRank, LowRankLinear, PivotedLinear
from ..linalg import Metric, weighted_svd
from ..measure import Comparison
from ..recipe import Recipe
from ..spectra import tail
from ..stages import Watch, silent
from . import apply as exact
from . import quantised, store
from .reading import moments
from .resize import thin_svd
from .store import Adapter, Factors, Nf4

if TYPE_CHECKING:
    from rich.console import RenderableType

How = Literal["exact", "truncated", "basis"]


@dataclass(frozen=True, slots=True)
class Row:
    """One adapted low-rank module after the merge.

    how: `truncated`: the best map of rank `rank`; `basis`: the best with the right factor that it shares.
    error: ||sum - merged|| / ||sum||, and `lost` = ||sum - merged|| / ||update||, in the metric of the
        inputs where there was text, else in Frobenius norm.
    """

    name: str
    how: How
    rank: int
    error: float
    lost: float


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did.

    rows: the low-rank modules whose sum with the update had to be cut; all others are exact.
    lost: over all of these, the share of the norm of the update that was cut away; 0 without any.
    comparison: the merged model against the sum of base and adapter, on held-out text.
    """

    source: str
    base: str | None
    exact: int
    whole: list[str]
    rows: list[Row]
    lost: float
    weighted: bool
    comparison: Comparison | None
    warnings: list[str]
    seconds: float
    dtype: str = field(default="")

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from ..render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from .cards import merged_table

        return merged_table(self)


def merge(
    model: Any,
    adapter: str | Path | Adapter,
    *,
    reading: Recipe | None = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> tuple[Any, Merged]:
    """Merge an adapter into a model and say what that cost.

    Exact to rounding for every dense matrix, embedding and whole tensor (LoRA, AdaLoRA, DoRA), the
    matrices inside low-rank modules included; ranks stay. An adapter on a low-rank module as a whole
    is merged into its factors: the best map of the module's own rank, from the QR of the stacked factors.
    Where eckart.json beside the adapter says that its base was in NF4, those weights are rounded so first:
    the updates belong to them.

    Args:
        model: a hub id, a folder (compressed or not), a .gguf file, or a model, changed in place.
        adapter: a folder, or what `store.read` returns.
        reading: text to weight and measure the cut with, and how it is read (eckart.adapt.reading).
        tokenizer: for a model given as an object.
        dtype: of the output; default: as stored.
        device: to run text on; default: the first that is there.
        trust_remote_code: run code that the model brings along.
        watch: called with (stage, done, total).

    Raises:
        ModelError: a part cannot be read, or they do not belong together (nothing was changed).
        StoreError: the adapter is damaged.
        NotPositiveDefinite: the merged map has no full rank and cannot have the pivoted form.
    """
    started = time.perf_counter()
    found = adapter if isinstance(adapter, Adapter) else store.read(adapter)
    loaded = _loaded(model, tokenizer, device, trust_remote_code)
    stored = loaded.stored
    exact.check(loaded.model, found)
    for name in () if found.storage is None else found.storage.targets:
        models.find(loaded.model, name)
    see = watch or silent
    cut = exact.low_rank(loaded.model, found)
    warnings: list[str] = []
    texts = None if reading is None else windows.read(reading, loaded.tokenizer, warnings)
    models.cast(loaded.model, torch.float32)
    if found.storage is not None:
        warnings.append(_quantise(loaded.model, found.storage))
    exact.apply(loaded.model, found, lambda done, total: see("merge", done, total))
    chosen = {name: found.factors[name] for name in cut}
    rows, comparison = _into_factors(loaded.model, chosen, reading, texts, see)
    models.cast(loaded.model, hub.dtype(dtype) if dtype else stored)
    return loaded.model, Merged(
        source=loaded.source,
        base=found.base,
        exact=len(found.factors) - len(cut),
        whole=list(found.extras),
        rows=[row for row, _ in rows],
        lost=_share(rows),
        weighted=texts is not None and texts.calibration is not None and bool(cut),
        comparison=comparison,
        warnings=warnings,
        seconds=time.perf_counter() - started,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
    )


def _loaded(model: Any, tokenizer: Any, device: str | None, remote: bool) -> hub.Loaded:
    if isinstance(model, (str, Path)):
        place = hub.device(device)
        return hub.load(str(model), compute=torch.float32, place=place, trust_remote_code=remote)
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise ModelError(f"got a {type(model).__name__}: give a hub id, a path or a transformers model")
    given: Any = model.eval()
    return hub.Loaded(given, tokenizer, given.config.name_or_path or "model", given.dtype, None)


@torch.no_grad()
def _quantise(model: Any, storage: Nf4) -> str:
    """Round the weights of `model` to what the adapter was trained on; return what to say of it."""
    for name in storage.targets:
        weight = models.find(model, name).weight
        holder = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], False, "meta"))
        holder[0].weight = torch.nn.Parameter(weight.detach().clone())
        quantised.quantise(holder, "0", double=storage.double, compute=torch.float32)
        weight.copy_(quantised.dequantised(holder[0]))
    return (
        f"the adapter was trained on NF4 weights: {len(storage.targets)} matrices were rounded to NF4 before "
        "its updates were added"
    )


def _share(rows: Sequence[tuple[Row, float]]) -> float:
    """Return the cut part of all updates in units of their norm."""
    whole = sum(norm**2 for _, norm in rows)
    return (sum((row.lost * norm) ** 2 for row, norm in rows) / whole) ** 0.5 if whole else 0.0


@torch.no_grad()
def _into_factors(
    model: Any,
    chosen: Mapping[str, Factors],
    reading: Recipe | None,
    texts: windows.TextWindows | None,
    watch: Watch,
) -> tuple[list[tuple[Row, float]], Comparison | None]:
    """Merge into low-rank modules; return a row with the norm of the update for each, and the comparison."""
    if not chosen:
        return [], None
    # With text the sum of base and adapter is needed, to see its inputs and to compare with.
    whole = None if texts is None else _sum(model, chosen)
    metrics: dict[str, Metric] = {}
    if whole is not None and reading is not None and texts is not None and texts.calibration is not None:
        metrics = moments(whole, texts.calibration, list(chosen), reading.damp, watch)
    shared = {name for pair in models.bases(model).items() for name in pair}
    rows = []
    for done, (name, one) in enumerate(chosen.items(), 1):
        module = model.get_submodule(name)
        metric = metrics.get(name) or Metric(module.in_features)
        rows.append(_project(module, name, one, metric) if name in shared else _cut(model, name, one, metric))
        watch("merge into factors", done, len(chosen))
    if texts is None or texts.held_out is None:
        return rows, None
    return rows, measure.compare(model, whole, texts.held_out, lambda at, of: watch("evaluate", at, of))


def _sum(model: Any, chosen: Mapping[str, Factors]) -> Any:
    """Return the unmerged sum as a dense model of its own."""
    dense = plugin.densify(copy.deepcopy(model))
    exact.apply(dense, Adapter(chosen))
    return dense


def _map(module: LowRankLinear) -> LowRank:
    """Return the map of `module` as a product, in float64 on the CPU."""
    wide = copy.deepcopy(module).to(device="cpu").to(torch.float64).map()
    if isinstance(wide, LowRank):
        return wide
    pivots, rest = wide.skeleton.pivots, wide.skeleton.rest
    left = wide.rows.new_zeros(len(pivots) + len(rest), len(pivots))
    left[pivots] = torch.eye(len(pivots), dtype=torch.float64)
    left[rest] = wide.skeleton.multipliers
    return LowRank(left, wide.rows)


def _stacked(own: LowRank, one: Factors) -> LowRank:
    """Return the sum of both as one product of more terms."""
    update = one.product()
    left = torch.cat([own.left, update.left.cpu()], dim=1)
    right = torch.cat([own.right, update.right.cpu()])
    if one.magnitude is not None:
        norms = ((left @ (right @ right.T)) * left).sum(1).sqrt()
        left = left * (one.magnitude.cpu().double() / norms)[:, None]
    return LowRank(left, right)


def _difference(first: LowRank, second: LowRank) -> LowRank:
    left = torch.cat([first.left, -second.left], dim=1)
    return LowRank(left, torch.cat([first.right, second.right]))


def norm(product: LowRank, metric: Metric) -> float:
    """Return sqrt(tr(D H D^T)) of D = left @ right without forming D, H being `metric`."""
    _, triangle = torch.linalg.qr(product.left)
    return float(metric.root_times((triangle @ product.right).T).norm())


def best(product: LowRank, rank: int, metric: Metric) -> tuple[LowRank, float]:
    """Return the best approximation of `product` of rank `rank` in `metric`, and its weighted error.

    By the QR of the left factor and the (weighted) SVD of what it leaves: k x n for k terms.
    """
    if metric.moment is None:
        svd = thin_svd(product)
        kept = LowRank(svd.left[:, :rank] * svd.values[:rank], svd.right[:rank])
        return kept, float(tail(svd.values)[rank].sqrt())
    basis, core = torch.linalg.qr(product.left)
    found = weighted_svd(core @ product.right, metric, Metric(len(core)))
    kept = LowRank(basis @ found.left[:, :rank], found.right[:rank])
    return kept, float(found.tail()[rank].sqrt())


def _cut(model: Any, name: str, one: Factors, metric: Metric) -> tuple[Row, float]:
    """Put the best approximation of the sum in the place of the module, in its form and rank."""
    module: LowRankLinear = model.get_submodule(name)
    own = _map(module)
    whole = _stacked(own, one)
    kept, error = best(whole, module.rank, metric)
    bias = module.dense_bias()
    if bias is not None:
        bias = bias.detach().cpu().double()
        bias = bias if one.bias is None else bias + one.bias.cpu().double() * one.scale
    made = factors.build(kept, module.kind, bias).to(next(module.parameters()))
    models.replace(model, name, made)
    return _row(
        name, "truncated", module.rank, error, norm(whole, metric), norm(_difference(whole, own), metric)
    )


def _project(
    module: FactoredLinear | PivotedLinear, name: str, one: Factors, metric: Metric
) -> tuple[Row, float]:
    """Change the left factor alone, by least squares: others read the right one as well."""
    assert isinstance(module, FactoredLinear)
    own = _map(module)
    whole = _stacked(own, one)
    basis = own.right
    weighted = metric.times(basis.T)
    gram, cross = basis @ weighted, whole.left @ (whole.right @ weighted)
    kept = LowRank(torch.linalg.solve(gram, cross.T).T, basis)
    module.up.weight.copy_(kept.left)
    if one.bias is not None:
        module.up.bias.add_(one.bias.to(module.up.bias) * one.scale)
    error = norm(_difference(whole, kept), metric)
    return _row(name, "basis", module.rank, error, norm(whole, metric), norm(_difference(whole, own), metric))


def _row(name: str, how: How, rank: int, error: float, whole: float, update: float) -> tuple[Row, float]:
    lost = error / update if update else 0.0
    return Row(name, how, rank, error / whole if whole else 0.0, lost), update
