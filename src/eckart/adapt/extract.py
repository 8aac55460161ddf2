"""A LoRA adapter out of a fully fine-tuned model: the best low-rank part of every matrix's change."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import hub, measure, windows
from ..errors import ConfigError, ModelError
from ..factors import LowRank
from ..linalg import Metric, weighted_error, weighted_svd
from ..measure import Comparison
from ..ranks import Energy, Fixed
from ..recipe import Recipe
from ..spectra import singular_values
from ..stages import Watch, silent
from . import apply as exact
from . import checkpoints, fitting, spectrum
from .checkpoints import Checkpoint
from .difference import relative, subtract
from .fitting import Pairs
from .reading import moments
from .spectrum import Budget, Noise, Rule
from .store import Adapter, Factors

if TYPE_CHECKING:
    from rich.console import RenderableType

Carry = Literal["all", "small", "none"]
CARRY: tuple[Carry, ...] = ("all", "small", "none")


@dataclass(frozen=True, slots=True)
class Row:
    """One matrix that differs and became factors.

    norm: ||D||_F of the difference D. change: norm / ||W||_F. error: ||D - D'||_F / ||D||_F, with what
    rounding the factors cost. weighted_norm, weighted: norm and error in the metric of the inputs, None
    without text.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    norm: float
    change: float
    error: float
    weighted_norm: float | None
    weighted: float | None


@dataclass(frozen=True, slots=True)
class Other:
    """One tensor that differs and is no matrix of an nn.Linear; `carried`: whole, in the adapter."""

    name: str
    shape: tuple[int, ...]
    change: float
    carried: bool


@dataclass(frozen=True, slots=True)
class Extracted:
    """What an extraction found.

    `before` and `after` compare the base, without and with the adapter, to the tuned model on held-out
    text; None without text. `unchanged` counts tensors that are equal. `error` and `weighted` are over all
    matrices, relative to the whole difference. `bytes` are those of the tensors, `file_bytes` those of the
    weight file once it is written.
    """

    base: str
    tuned: str
    rule: str
    rows: list[Row]
    others: list[Other]
    unchanged: int
    parameters: int
    bytes: int
    dtype: str
    error: float
    weighted: float | None
    before: Comparison | None
    after: Comparison | None
    warnings: list[str]
    seconds: float
    file_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values; an infinite change is None."""
        values = asdict(self)
        for row in (*values["rows"], *values["others"]):
            row["change"] = row["change"] if row["change"] < float("inf") else None
        return values

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from ..render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from .cards import extracted_table

        return extracted_table(self)


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    params: int | None = None,
    noise: bool = False,
    carry: Carry = "small",
    reading: Recipe | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> tuple[Adapter, Extracted]:
    """Return the adapter that makes `base` the nearest to `tuned` that its ranks allow.

    Exact (to rounding in the dtype of the adapter) where a difference has that rank. Tensors are read one
    pair at a time; with text the base is loaded to see its inputs, and both for the measurement.

    Args:
        base: hub id, folder or .gguf file (which is loaded).
        tuned: the same, of the same shapes.
        rank: at most this rank for every matrix, or
        energy: the share of every (weighted) squared spectrum to hold, or
        params: parameters of all factors together, for the least summed (weighted) squared error, or
        noise: the terms above the threshold of eckart.spectra.noise_threshold (unweighted).
        carry: what becomes of other tensors that differ: `all` go into the adapter whole, `small`: those
            of one dimension (norms and biases), `none`.
        reading: text to weight by and to measure on (eckart.adapt.reading.reading): the error is then
            tr(D H D^T), H the second moment of the base model's inputs.
        dtype: of the factors; default: that of the tuned model.
        device: to run text on.
        trust_remote_code: run code that a model brings along.
        watch: called with (stage, done, total).

    Raises:
        ConfigError: not exactly one rule for ranks, or an illegal value.
        ModelError: the two models do not fit, or no matrix differs.
        RankError: the budget holds no term.
        NotFinite: a weight is NaN or infinite.
    """
    started, see = time.perf_counter(), watch or silent
    chosen = spectrum.rule(rank, energy, params, noise)
    if carry not in CARRY:
        raise ConfigError(f"carry {carry!r}: legal are {', '.join(CARRY)}")
    wanted = None if dtype is None else hub.dtype(dtype)
    view, warnings = _opened(base, tuned, trust_remote_code), list[str]()
    text = None if reading is None else _read(str(base), reading, device, trust_remote_code, warnings)
    if text is not None and text.texts.calibration is not None:
        seen = text.loaded.model, text.texts.calibration, list(view.pairs.linears)
        view = replace(view, metrics=moments(*seen, text.damp, see))
    stored = wanted or view.tuned.dtype
    factors, rows = _factors(view, chosen, stored, see)
    others, extras, options = _others(view, carry)
    adapter = Adapter(factors, extras, {"base_model_name_or_path": str(base), **options})
    warnings += _remarks(view, chosen, rows, others)
    if not factors:
        raise ModelError(_refusal(rows, others))
    before, after = _quality(text, str(tuned), adapter, see, trust_remote_code)
    return adapter, Extracted(
        base=str(base),
        tuned=str(tuned),
        rule=spectrum.describe(chosen),
        rows=rows,
        others=others,
        unchanged=view.count - len(rows) - len(others),
        parameters=adapter.parameters,
        bytes=adapter.bytes,
        dtype=_short(stored),
        error=_total([(row.norm, row.error) for row in rows]),
        weighted=_weighted_total(rows) if view.metrics else None,
        before=before,
        after=after,
        warnings=warnings,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True)
class _View:
    """Both models, what belongs to what, and the metrics of the inputs by module."""

    base: Checkpoint
    tuned: Checkpoint
    pairs: Pairs
    metrics: Mapping[str, Metric]

    @property
    def count(self) -> int:
        """The number of tensors that are compared."""
        return len(self.pairs.linears) + len(self.pairs.others)

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        """Return the weight of the linear `module` in the base, and the difference in float64."""
        key = self.pairs.linears[module]
        before = self.base.read(key)
        return before, subtract(key, before, self.tuned.read(key))


def _opened(base: str | Path, tuned: str | Path, remote: bool) -> _View:
    skeleton = hub.skeleton(str(base), trust_remote_code=remote)
    own, other = (
        checkpoints.by_module(
            checkpoints.open_checkpoint(source, trust_remote_code=remote), trust_remote_code=remote
        )
        for source in (base, tuned)
    )
    config = hub.load_config(str(tuned), trust_remote_code=remote)
    return _View(own, other, fitting.pair(own, other, skeleton, config), {})


@dataclass(frozen=True, slots=True)
class _Text:
    """The base in memory, the text to run through it, and the damping of what it shows."""

    loaded: hub.Loaded
    texts: windows.TextWindows
    damp: float


def _read(base: str, reading: Recipe, device: str | None, remote: bool, warnings: list[str]) -> _Text:
    loaded = hub.load(base, place=hub.device(device), trust_remote_code=remote)
    measure.check_length(loaded.model, reading.seq_len)
    return _Text(loaded, windows.read(reading, loaded.tokenizer, warnings), reading.damp)


def _factors(
    view: _View, chosen: Rule, dtype: torch.dtype, watch: Watch
) -> tuple[dict[str, Factors], list[Row]]:
    ranks = _budgeted(view, chosen, watch) if isinstance(chosen, Budget) else {}
    factors, rows = {}, []
    for done, name in enumerate(view.pairs.linears, 1):
        before, difference = view.read(name)
        if bool(difference.any()):
            rule = chosen if not isinstance(chosen, Budget) else ranks[name]
            made = _decomposed(difference, view.metrics.get(name), rule, dtype)
            rows.append(_row(name, before, difference, made, view.metrics.get(name)))
            if made.rank:
                factors[name] = made
        watch("factor", done, len(view.pairs.linears))
    return factors, rows


def _budgeted(view: _View, chosen: Budget, watch: Watch) -> dict[str, int]:
    """Return the ranks of a budget: they need the spectra of all matrices before the first is cut."""
    spectra, shapes = {}, {}
    for done, name in enumerate(view.pairs.linears, 1):
        _, difference = view.read(name)
        if bool(difference.any()):
            spectra[name] = singular_values(difference, view.metrics.get(name))
            shapes[name] = (difference.shape[0], difference.shape[1])
        watch("spectra", done, len(view.pairs.linears))
    return spectrum.share(chosen, spectra, shapes)


def _decomposed(
    difference: Tensor, metric: Metric | None, rule: Fixed | Energy | Noise | int, dtype: torch.dtype
) -> Factors:
    outputs, inputs = difference.shape
    found = weighted_svd(difference, metric or Metric(inputs), Metric(outputs))
    if isinstance(rule, int):
        rank = rule
    else:
        # Noise is white in the weights, not in the metric of the inputs.
        plain = isinstance(rule, Noise) and metric is not None
        values = singular_values(difference) if plain else found.spectrum
        rank = spectrum.rank(rule, values, (outputs, inputs))
    product = LowRank(found.left[:, :rank], found.right[:rank])
    product = product.balanced() if rank else product
    return Factors(product.left.to(dtype), product.right.to(dtype))


def _row(name: str, before: Tensor, difference: Tensor, made: Factors, metric: Metric | None) -> Row:
    left = difference - made.delta()
    norm = float(difference.norm())
    whole, cut = None, None
    if metric is not None:
        whole, cut = (
            max(weighted_error(part, metric, Metric(len(part))), 0.0) ** 0.5 for part in (difference, left)
        )
    return Row(
        name=name,
        shape=(difference.shape[0], difference.shape[1]),
        rank=made.rank,
        norm=norm,
        change=relative(difference, before),
        error=float(left.norm()) / norm,
        weighted_norm=whole,
        weighted=None if cut is None or not whole else cut / whole,
    )


def _others(view: _View, carry: Carry) -> tuple[list[Other], dict[str, Tensor], dict[str, Any]]:
    """Return what else differs, what of it goes along whole, and what the config must say of that."""
    found: list[Other] = []
    extras: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    for name, own in view.pairs.others.items():
        before, after = view.base.read(own), view.tuned.read(name)
        difference = subtract(name, before, after)
        if not bool(difference.any()):
            continue
        carried = carry == "all" or (carry == "small" and after.ndim <= 1)
        found.append(Other(name, tuple(after.shape), relative(difference, before), carried))
        if not carried:
            continue
        # PEFT replaces a module whole: what did not change goes along.
        module = name.rpartition(".")[0]
        for key in view.pairs.modules.get(module, (name,)):
            extras[key] = view.tuned.read(key)
        if name in view.pairs.tied:
            extras[view.pairs.tied[name]] = after
            options = {"ensure_weight_tying": True, "modules_to_save": [module]}
    if options:
        alone = {key.rpartition(".")[0] for key in extras} - {
            view.pairs.tied[key].rpartition(".")[0] for key in view.pairs.tied
        }
        options["modules_to_save"] = sorted(alone)
    return found, extras, options


def _remarks(view: _View, chosen: Rule, rows: list[Row], others: list[Other]) -> list[str]:
    found = []
    dropped = [other for other in others if not other.carried]
    if dropped:
        largest = max(dropped, key=lambda other: other.change)
        found.append(
            f"{len(dropped)} tensors differ and are not in the adapter, most of all {largest.name} by "
            f"{largest.change:.2g} of its norm: --carry all takes them along whole"
        )
    found += [
        f"{Path(one.source).name} was loaded whole: its files do not hold tensors under its modules' names"
        for one in (view.base, view.tuned)
        if one.how == "memory"
    ]
    if isinstance(chosen, Fixed) and any(chosen.rank > min(row.shape) for row in rows):
        count = sum(chosen.rank > min(row.shape) for row in rows)
        found.append(f"rank {chosen.rank} is above min(m, n) of {count} matrices: they got their full rank")
    costly = sum(row.rank * sum(row.shape) >= row.shape[0] * row.shape[1] for row in rows)
    if costly:
        found.append(
            f"{costly} updates have as many parameters as their dense matrix, or more: lower the rank"
        )
    if view.base.dtype != view.tuned.dtype:
        found.append(
            f"the base is stored in {_short(view.base.dtype)} and the tuned in {_short(view.tuned.dtype)}: "
            "the difference holds the rounding of the narrower"
        )
    return found


def _refusal(rows: list[Row], others: list[Other]) -> str:
    reason = "no matrix differs" if others else "the two models are equal"
    if rows:
        reason = f"every one of {len(rows)} differences has rank 0 by this rule: choose a rank or an energy"
    if others:
        reason += f"; {len(others)} other tensors do, which alone make no LoRA"
    return f"no adapter comes of it: {reason}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _total(parts: list[tuple[float, float]]) -> float:
    """Return the relative error of all, given (norm, relative error) of each."""
    whole = sum(norm**2 for norm, _ in parts)
    return (sum((norm * error) ** 2 for norm, error in parts) / whole) ** 0.5 if whole else 0.0


def _weighted_total(rows: list[Row]) -> float:
    return _total([(row.weighted_norm or 0.0, row.weighted or 0.0) for row in rows])


def _quality(
    text: _Text | None, tuned: str, adapter: Adapter, watch: Watch, remote: bool
) -> tuple[Comparison | None, Comparison | None]:
    if text is None or not isinstance(text.texts.held_out, Tensor):
        return None, None
    model, rows = text.loaded.model, text.texts.held_out
    other = hub.load(tuned, place=model.device, trust_remote_code=remote).model
    before = measure.compare(model, other, rows, lambda at, of: watch("evaluate base", at, of))
    exact.apply(model, adapter)
    return before, measure.compare(model, other, rows, lambda at, of: watch("evaluate adapter", at, of))
