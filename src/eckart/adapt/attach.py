"""Put PEFT's layers on a model, as the settings say, and start them."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import stats
from ..errors import ConfigError, ModelError, RankError
from ..factors import LowRank
from ..linalg import Metric, to_float64, weighted_error
from ..quant import correction
from ..stages import Watch
from . import quantised, targets
from .batches import Batch
from .store import Nf4
from .tuning import CORRECTING, MUTATING, Init, Tuning

ADAPTER = "default"
_ALLOCATIONS = 50
"""AdaLoRA gives up ranks so many times between its first and its last phase."""
_FEWEST = 10
"""Steps that AdaLoRA needs."""
_ORTHOGONALITY = 0.5
"""Weight of AdaLoRA's regulariser, as PEFT has it."""
_FIRST, _LAST = 0.1, 0.3
"""The shares of the steps before AdaLoRA begins to allocate, and after it has ended."""


@dataclass(frozen=True, slots=True)
class Attached:
    """A model to train.

    Args:
        model: with PEFT's layers, or the bare model for method full.
        ranks: of each adapted matrix at the start.
        start: for initialisations that change the base: what was taken out of it.
        storage: qlora: how the base is stored now.
        error: qlora: the share of the quantisation error, in the metric of the inputs, that is left by the
            start of the adapter; None where it starts from zero.
        notes: what the user should know.
    """

    model: Any
    ranks: Mapping[str, int]
    start: Mapping[str, LowRank]
    error: float | None
    notes: tuple[str, ...]
    storage: Nf4 | None = None


def attach(
    model: Any,
    tuning: Tuning,
    ranks: Mapping[str, int],
    batches: Sequence[Batch],
    *,
    steps: int,
    passes: int,
    compute: torch.dtype,
    around: Callable[[], AbstractContextManager[Any]],
    watch: Watch,
) -> Attached:
    """Make `model`, in place, what `tuning` trains.

    Args:
        model: a causal language model on its device.
        ranks: of each linear map to adapt; those of rank 0 are left alone.
        batches: one example each, for what looks at data first.
        steps: that the training will have.
        passes: backward passes a step over all devices, for AdaLoRA's regulariser, which each of them adds.
        compute: dtype of products with quantised weights.
        around: context to compute in.
        watch: called with (stage, done, total).

    Raises:
        ConfigError: PEFT or bitsandbytes is missing.
        RankError: a rank that the initialisation cannot have.
    """
    if tuning.method == "full":
        model.requires_grad_(True)
        return Attached(model, {}, {}, None, ())
    chosen = {name: rank for name, rank in ranks.items() if rank}
    notes = _check_ranks(chosen, targets.shapes(model, list(chosen)), tuning)
    model.requires_grad_(False)
    corrections: dict[str, LowRank] = {}
    error, storage = None, None
    if tuning.method == "qlora":
        storage, more = _storage(model, tuning, chosen)
        notes += more
        wanted = [name for name in chosen if name in storage.targets and tuning.starting in CORRECTING]
        kinds = _statistics(tuning.starting)
        moments = _moments(model, wanted, kinds, batches, around, watch)
        corrections, error = _quantised(model, storage, chosen, tuning, moments, compute, watch)
    config = _config(model, tuning, chosen, steps, passes)
    with torch.random.fork_rng(devices=[]), known_warnings():
        torch.manual_seed(tuning.seed)
        made = _with_layers(model, config, tuning, batches)
    for name, factors in corrections.items():
        _put(made, name, factors)
    start = {name: _value(made, name) for name in chosen} if tuning.starting in MUTATING else {}
    found = {name: _layer(made, name).r[ADAPTER] for name in chosen}
    return Attached(made, found, start, error, notes, storage)


@contextlib.contextmanager
def known_warnings() -> Iterator[None]:
    """Silence what PEFT makes transformers and itself warn about, by name, where nothing is wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def peft_package() -> Any:
    """Return PEFT, imported when it is needed.

    Raises:
        ConfigError: it is not installed.
    """
    quantised.quiet()
    try:
        import peft
    except ImportError as error:
        raise ConfigError("adapters need PEFT: pip install 'eckart[tune]'") from error
    return peft


def _check_ranks(
    ranks: Mapping[str, int], sizes: Mapping[str, tuple[int, int]], tuning: Tuning
) -> tuple[str, ...]:
    above = [name for name, rank in ranks.items() if rank > min(sizes[name])]
    if not above:
        return ()
    shape = " x ".join(map(str, sizes[above[0]]))
    what = f"rank {ranks[above[0]]} of {above[0]}, which is {shape}"
    if tuning.starting in (*MUTATING, *CORRECTING, "eva"):
        most = min(min(sizes[name]) for name in above)
        raise RankError(
            f"{what}: init {tuning.starting!r} takes singular vectors, of which there are at most "
            f"{most}; lower the rank, or leave such matrices out with --exclude"
        )
    return (f"{what}: more than the matrix can have; the rest is parameters without use",)


def _statistics(init: Init) -> tuple[stats.Statistic, ...]:
    """Return what a start looks at, and the metric that its error is told in."""
    needed = correction.get(quantised.CORRECTIONS[init]).statistics() if init in CORRECTING else ()
    return tuple(dict.fromkeys(("gram", *needed)))


@torch.no_grad()
def _moments(
    model: Any,
    names: Sequence[str],
    kinds: Sequence[stats.Statistic],
    batches: Sequence[Batch],
    around: Callable[[], AbstractContextManager[Any]],
    watch: Watch,
) -> stats.Stats:
    with stats.collect(model, names, kinds) as gathered:
        for index, batch in enumerate(batches):
            with around():
                model(input_ids=batch["input_ids"], use_cache=False)
            watch("look at inputs", index + 1, len(batches))
    return gathered


def _storage(model: Any, tuning: Tuning, chosen: Mapping[str, int]) -> tuple[Nf4, tuple[str, ...]]:
    """Return what is quantised, and what to say of the rest.

    Raises:
        ModelError: nothing can be.
    """
    every = dict.fromkeys([*targets.names(model), *chosen])
    narrow = [name for name in every if not quantised.fits(model.get_submodule(name))]
    if len(narrow) == len(every):
        raise ModelError(
            "no linear map has a multiple of 64 inputs, as NF4 needs: take method lora, which quantises none"
        )
    notes = (
        (f"{len(narrow)} linear maps stay as they are, not in NF4: their inputs are no multiple of 64",)
        if narrow
        else ()
    )
    return Nf4(tuning.double, tuple(name for name in every if name not in set(narrow))), notes


def _quantised(
    model: Any,
    storage: Nf4,
    ranks: Mapping[str, int],
    tuning: Tuning,
    moments: stats.Stats,
    compute: torch.dtype,
    watch: Watch,
) -> tuple[dict[str, LowRank], float | None]:
    """Quantise every linear map of the blocks; return corrections, and the share of the error they leave."""
    found: dict[str, LowRank] = {}
    before = after = 0.0
    for index, name in enumerate(storage.targets):
        weight = quantised.quantise(model, name, double=storage.double, compute=compute)
        if tuning.starting in CORRECTING and name in ranks:
            module, method = model.get_submodule(name), quantised.CORRECTIONS[tuning.starting]
            seen = {kind: moments.moment(kind, name).mean() for kind in _statistics(tuning.starting)}
            found[name] = quantised.residual(weight, module, seen, ranks[name], method)
            error = to_float64(weight) - to_float64(quantised.dequantised(module))
            inputs, outputs = Metric(weight.shape[1], seen["gram"]), Metric(weight.shape[0])
            before += weighted_error(error, inputs, outputs)
            after += weighted_error(error - found[name].dense(), inputs, outputs)
        watch("quantise", index + 1, len(storage.targets))
    return found, after / before if before else None


def _config(model: Any, tuning: Tuning, ranks: Mapping[str, int], steps: int, passes: int) -> Any:
    peft = peft_package()
    rank = tuning.rank_at_start
    common = {
        "task_type": "CAUSAL_LM",
        "target_modules": short_names(model, list(ranks)),
        "lora_dropout": tuning.dropout,
    }
    if tuning.method == "adalora":
        first, last = round(_FIRST * steps), max(1, round(_LAST * steps))
        if steps < _FEWEST:
            raise ConfigError(
                f"{steps} steps are too few for adalora to allocate ranks: give at least {_FEWEST}"
            )
        return peft.AdaLoraConfig(
            **common, init_r=rank, target_r=tuning.rank, lora_alpha=tuning.alpha or 2 * rank,
            tinit=first, tfinal=last, deltaT=max(1, (steps - first - last) // _ALLOCATIONS),
            total_step=steps, orth_reg_weight=_ORTHOGONALITY / passes,
        )  # fmt: skip
    patterns: dict[str, Any] = {}
    if any(own != rank for own in ranks.values()):
        patterns["rank_pattern"] = {name.replace(".", r"\."): own for name, own in ranks.items()}
        if tuning.alpha is None:
            patterns["alpha_pattern"] = {key: 2 * own for key, own in patterns["rank_pattern"].items()}
    kinds: dict[str, Any] = {"default": True, **dict.fromkeys(CORRECTING, True)}
    extra: dict[str, Any] = {}
    if tuning.starting == "eva":
        extra["eva_config"] = peft.EvaConfig(use_label_mask=tuning.task == "generation")
    if tuning.starting == "corda":
        from peft.tuners.lora.config import CordaConfig

        extra["corda_config"] = CordaConfig()
    return peft.LoraConfig(
        **common, **patterns, **extra, r=rank, lora_alpha=tuning.alpha or 2 * rank,
        use_rslora=tuning.rslora, use_dora=tuning.method == "dora",
        init_lora_weights=kinds.get(tuning.starting, tuning.starting),
    )  # fmt: skip


def short_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the shortest ends of `names` by which PEFT finds exactly these modules of `model`."""
    every = [name for name, _ in model.named_modules()]
    wanted = set(names)
    for parts in (1, 2, 3):
        ends = sorted({".".join(name.split(".")[-parts:]) for name in names})
        found = {name for name in every if any(name == end or name.endswith(f".{end}") for end in ends)}
        if found == wanted:
            return ends
    return list(names)


def _with_layers(
    model: Any,
    config: Any,
    tuning: Tuning,
    batches: Sequence[Batch],
) -> Any:
    """Return PEFT's model; the initialisations that look at data see `batches`."""
    peft = peft_package()
    if tuning.starting == "corda":

        def run() -> None:
            # Not under autocast, which PEFT's covariances would be multiplied under.
            for batch in batches:
                model(input_ids=batch["input_ids"], use_cache=False)

        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, run_model=run)
    made = peft.get_peft_model(model, config, low_cpu_mem_usage=tuning.starting == "eva")
    if tuning.starting == "eva":
        given = [dict(batch) for batch in batches]
        peft.initialize_lora_eva_weights(made, given, show_progress_bar=False)
    return made


def _layer(made: Any, name: str) -> Any:
    return made.base_model.model.get_submodule(name)


def _value(made: Any, name: str) -> LowRank:
    """Return the update of a LoRA layer, a copy with the scale in the left factor."""
    layer = _layer(made, name)
    scale = layer.scaling[ADAPTER]
    left: Tensor = layer.lora_B[ADAPTER].weight.detach() * scale
    return LowRank(left, layer.lora_A[ADAPTER].weight.detach().clone())


@torch.no_grad()
def _put(made: Any, name: str, factors: LowRank) -> None:
    layer = _layer(made, name)
    root = layer.scaling[ADAPTER] ** 0.5
    layer.lora_B[ADAPTER].weight.copy_(factors.left / root)
    layer.lora_A[ADAPTER].weight.copy_(factors.right / root)


def updates(made: Any, names: Sequence[str]) -> dict[str, LowRank]:
    """Return the update that each adapted map has now, its scale in the left factor (LoRA and AdaLoRA).

    AdaLoRA's are cut to the ranks that it kept; the function is the same.
    """
    return {name: _kept(_layer(made, name)) if _is_adalora(made) else _value(made, name) for name in names}


def _is_adalora(made: Any) -> bool:
    return bool(made.peft_config[ADAPTER].peft_type == "ADALORA")


def _kept(layer: Any) -> LowRank:
    values = layer.lora_E[ADAPTER].detach()[:, 0]
    kept = values != 0
    scale = layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)
    left = layer.lora_B[ADAPTER].detach()[:, kept] * (values[kept] * scale)
    return LowRank(left, layer.lora_A[ADAPTER].detach()[kept].clone())
