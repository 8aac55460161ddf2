"""Make blocks share their matrices: fitted in the metric of each, stored once, trained once."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import accounting, hub, kinds, losses, memory, models, plugin, running, sharing, windows
from .accounting import sizes
from .calibrate import Calibrated
from .consensus import Consensus, Member, agree
from .errors import ConfigError, ModelError, RankError
from .factorize import loss_unit, matrix_metrics, statistics_of
from .factors import LowRank
from .groups import Sharing
from .joined import Joined
from .linalg import Metric, weighted_error
from .models import Target
from .recipe import Recipe
from .result import Measured, Module, Quality
from .shared import SharedLinear
from .stages import Watch, silent
from .stores import stored


def check(recipe: Recipe, wanted: Sharing) -> None:
    """Raise ConfigError where the weights are to be fitted in a metric of data and there is none."""
    if recipe.stores:
        raise ConfigError("shared matrices are stored in the output dtype: leave out storage")
    if wanted.start == "fit":
        recipe.check_text()


def join(
    recipe: Recipe, wanted: Sharing, loaded: hub.Loaded, watch: Watch | None = None
) -> tuple[Any, Joined]:
    """Let blocks of the model share matrices, in place, fitted in the metric of the recipe's method.

    Raises:
        ConfigError: a block that there is not, or text is missing.
        ModelError: the model is compressed, or matrices that should share have different shapes.
        RankError: differences have a higher rank than a matrix.
        NotFinite: a weight, a statistic or a logit is NaN or infinite.
    """
    show: Watch = watch or silent
    check(recipe, wanted)
    model, warnings, clock = kinds.unfold(_dense(loaded.model)), list[str](), time.perf_counter()
    groups = sharing.twins(model, wanted, recipe.exclude)
    targets = [target for target in models.targets(model) if any(target.name in group for group in groups)]
    _check_rank(wanted.differences, targets)
    texts = windows.read(recipe, loaded.tokenizer, warnings)
    dtype = hub.dtype(recipe.dtype) if recipe.dtype else loaded.stored
    before = sizes(model, targets, dtype)

    def measured(stage: str) -> list[Measured | None]:
        return [
            None if rows is None else running.quality(model, rows, lambda at, of: show(stage, at, of))
            for rows in (texts.held_out, texts.foreign)
        ]

    dense = measured("measure before")
    seen = texts.calibration if wanted.start == "fit" else None
    names = [target.name for target in targets]
    calibrated = statistics_of(recipe, model, names, seen, lambda at, of: show("calibrate", at, of))
    rows = put(recipe, wanted, model, groups, calibrated, dtype, lambda at, of: show("share", at, of))
    models.tie(model)
    kinds.fold(model)
    plugin.mark(model)
    with accounting.rounded(model, targets, dtype) as after:
        now = measured("measure after")
    return model, Joined(
        **_made_from(recipe, loaded, dtype, calibrated),
        modules=[rows[target.name] for target in targets],
        before=before,
        after=after,
        dense=dense[0],
        compressed=now[0],
        held_out=texts.own_text,
        predicted_increase=_predicted(recipe, wanted, rows),
        calibration_unit=running.unit(texts),
        seconds={"all": time.perf_counter() - clock},
        peak_memory=memory.peak_bytes(losses.device_of(model)),
        warnings=warnings,
        foreign=Quality.of(dense[1], None, now[1]),
        sharing=wanted,
        joined={group[0]: group for group in groups},
    )


def _made_from(
    recipe: Recipe, loaded: hub.Loaded, dtype: torch.dtype, calibrated: Calibrated
) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "source": loaded.source,
        "architecture": type(loaded.model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "source_bytes": loaded.bytes,
        "calibration_tokens": calibrated.tokens,
        "gradient_tokens": calibrated.gradient_tokens,
    }


def _predicted(recipe: Recipe, wanted: Sharing, rows: Mapping[str, Module]) -> float | None:
    """Return the estimated increase of the loss, where the metrics have its unit."""
    known = wanted.start == "fit" and recipe.resolved_method().outputs == "gradient"
    return sum(row.loss for row in rows.values()) if known else None


def _dense(model: Any) -> Any:
    """Return `model` if nothing of it is compressed."""
    if models.low_rank_modules(model) or stored(model):
        raise ModelError(
            "the model is compressed already, and only dense matrices can share: eckart.densify it first, or "
            "take its source"
        )
    return model


def _check_rank(rank: int, targets: Sequence[Target]) -> None:
    for target in targets:
        if rank > min(target.shape):
            raise RankError(
                f"differences of rank {rank} for {target.name}, which is {target.shape[0]} x "
                f"{target.shape[1]}: legal are 0 to {min(target.shape)}; or leave it out with --exclude"
            )


@torch.no_grad()
def put(
    recipe: Recipe,
    wanted: Sharing,
    model: nn.Module,
    groups: Sequence[tuple[str, ...]],
    calibrated: Calibrated,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
) -> dict[str, Module]:
    """Put shared modules in the place of all matrices in `groups`, in place; return a row for each.

    The statistics are used up.
    """
    rows: dict[str, Module] = {}
    metrics: dict[str, Metric] = {}
    generator, blocks, last = torch.Generator().manual_seed(wanted.seed), models.block_names(model), None
    for done, group in enumerate(groups, 1):
        if models.owner(group[0], blocks) != last:
            metrics, last = {}, models.owner(group[0], blocks)
        weights = [models.find(model, name).weight.detach() for name in group]
        if wanted.start == "first":
            found = _first(weights, wanted, generator)
            members = [Member(weight, Metric(weight.shape[1]), Metric(len(weight))) for weight in weights]
        else:
            members = [_member(recipe, model, name, calibrated, metrics) for name in group]
            found = agree(members, rank=wanted.differences, scaled=wanted.scales)
        modules = _modules(model, group, found, dtype)
        for place, name in enumerate(group):
            models.replace(model, name, modules[place])
            rows[name] = _row(name, members[place], modules[place], found.losses[place], place == 0)
        calibrated.stats.forget(group)
        progress(done, len(groups))
    return rows


def _member(
    recipe: Recipe, model: nn.Module, name: str, calibrated: Calibrated, metrics: dict[str, Metric]
) -> Member:
    weight = models.find(model, name).weight.detach()
    target = Target(name, (weight.shape[0], weight.shape[1]))
    inputs, outputs = matrix_metrics(recipe, target, calibrated, metrics)
    return Member(weight, inputs, outputs, loss_unit(recipe.resolved_method(), calibrated, name))


def _first(weights: Sequence[Tensor], wanted: Sharing, generator: torch.Generator) -> Consensus:
    """Take the first of the weights for all; differences are zero, and can be trained: L = 0, R is random."""
    base, rank = weights[0].double(), wanted.differences
    (rows, columns), count = base.shape, len(weights)
    differences = None
    if rank:
        random = [
            (2 * torch.rand(rank, columns, generator=generator, dtype=torch.float64) - 1) / columns**0.5
            for _ in weights
        ]
        differences = tuple(LowRank(base.new_zeros(rows, rank), right.to(base)) for right in random)
    scales = tuple(base.new_ones(rows) for _ in weights) if wanted.scales else None
    return Consensus(base, scales, differences, (0.0,) * count, (0.0,))


def _modules(
    model: nn.Module, group: Sequence[str], found: Consensus, dtype: torch.dtype
) -> list[SharedLinear]:
    """Return the module of each, all with one base, rounded to `dtype` once and computed in as before."""
    like = models.find(model, group[0])

    def rounded(value: Tensor) -> Tensor:
        return value.to(dtype).to(like.weight).contiguous()

    with torch.device("meta"):
        base = nn.Linear(like.in_features, like.out_features, bias=False)
    base.weight = nn.Parameter(rounded(found.base))
    modules = []
    for place, name in enumerate(group):
        difference = None if found.differences is None else found.differences[place]
        if difference is not None:
            difference = LowRank(rounded(difference.left), rounded(difference.right))
        scale = None if found.scales is None else rounded(found.scales[place])
        modules.append(SharedLinear.of(base, difference, scale, models.find(model, name).bias))
    return modules


def _row(name: str, member: Member, module: SharedLinear, loss: float, first: bool) -> Module:
    size = member.weight.numel()
    own = sum(value.numel() for key, value in module.named_parameters() if key not in ("bias", "base.weight"))
    whole = member.unit * weighted_error(member.weight, member.inputs, member.outputs)
    return Module(
        name=name,
        shape=(module.out_features, module.in_features),
        form=module.kind,
        rank=module.rank,
        before=size,
        after=own + (size if first else 0),
        energy=1 - loss / whole if whole else 1.0,
        loss=loss,
    )
