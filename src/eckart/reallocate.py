"""Move rank between matrices: allocate anew by the curvature of the compressed model, at the same size."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import calibrate, models, ranks, routing
from .factors import FactoredLinear, LowRank, PivotedLinear, build, parameters
from .linalg import Metric, WeightedSVD, weighted_svd
from .models import Target
from .ranks import Curve

LowRankLinear = FactoredLinear | PivotedLinear


def movable(student: nn.Module) -> dict[str, LowRankLinear]:
    """Return the low-rank linears in the blocks by name; those that share a basis have one rank."""
    bases = models.bases(student)
    blocks = models.block_names(student)
    return {
        name: module
        for name, module in models.low_rank_modules(student).items()
        if isinstance(module, LowRankLinear)
        and models.owner(name, blocks)
        and name not in bases
        and name not in bases.values()
    }


def _curve(module: LowRankLinear, svd: WeightedSVD, share: float) -> Curve[int]:
    """Return the ranks that the module may have, without the option to become dense.

    `share` is that of the tokens that it sees: all but for an expert.
    """
    shape = (module.out_features, module.in_features)
    found = ranks.curve(module.kind, shape, 0.5 * share * svd.tail())
    if module.kind == "pivoted":  # its full rank costs what the dense matrix does
        return found
    return Curve(found.options[:-1], found.costs[:-1], found.losses[:-1])


@torch.no_grad()
def reallocated(
    student: Any,
    dense: Any,
    windows: Tensor,
    *,
    damp: float = 1e-4,
    watch: Callable[[int, int], None] | None = None,
) -> dict[str, nn.Module]:
    """Return the low-rank modules of `student` that get another rank, made of the dense matrices.

    Inputs and gradients are those of `student` on `windows` (k, seq_len), so what the other matrices lost is
    part of them. Together the matrices have no more parameters than before.

    Args:
        student: the compressed model.
        dense: the model that it comes from.
        windows: (k, seq_len).
        damp: of the metrics, in units of their mean diagonal.
        watch: called with (done, total).
    """
    modules = movable(student)
    if len(modules) < 2:
        return {}
    found = calibrate.calibrate(
        student, windows.to(student.device), list(modules), ("gram", "gradient"),
        gradient_windows=len(windows), generator=torch.Generator(), watch=watch,
    )  # fmt: skip
    own = [Target(name, (module.out_features, module.in_features)) for name, module in modules.items()]
    routing.fill(student, own, found.stats)
    svds: dict[str, WeightedSVD] = {}
    for name in modules:
        weight = models.find(dense, name).weight
        inputs, outputs = (found.stats.moment(kind, name).mean() for kind in ("gram", "gradient"))
        svds[name] = weighted_svd(
            weight, Metric(weight.shape[1], inputs, damp), Metric(weight.shape[0], outputs, damp)
        )
    curves = {
        name: _curve(module, svds[name], found.stats.moment("gradient", name).count / found.gradient_tokens)
        for name, module in modules.items()
    }
    chosen = _chosen(curves, modules)
    return {
        name: _built(module, svds[name], chosen[name])
        for name, module in modules.items()
        if chosen[name] != module.rank
    }


def _chosen(curves: Mapping[str, Curve[int]], modules: Mapping[str, LowRankLinear]) -> dict[str, int]:
    spent = sum(
        parameters(module.kind, (module.out_features, module.in_features), module.rank)
        for module in modules.values()
    )
    places = ranks.allocate(curves, spent)
    return {name: curve.options[places[name]] for name, curve in curves.items()}


def _built(module: LowRankLinear, svd: WeightedSVD, rank: int) -> nn.Module:
    like, bias = next(module.parameters()), module.dense_bias()
    low_rank = LowRank(svd.left[:, :rank], svd.right[:rank])
    made = build(low_rank, module.kind, None if bias is None else bias.double())
    return made.to(like.dtype).to(like.device)


def resize(student: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give every low-rank linear of `student` the rank that it has in `tensors`; not the weights."""
    for name, module in movable(student).items():
        part = "down" if isinstance(module, FactoredLinear) else "pivot"
        rank = len(tensors[f"{name}.{part}.weight"])
        if rank != module.rank:
            like = next(module.parameters())
            bias = module.dense_bias() is not None
            made = type(module)(module.in_features, module.out_features, rank, bias)
            models.replace(student, name, made.to(like.dtype).to(like.device))
