"""Ranks before training: where the loss falls fastest per parameter of an adapter."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..linalg import check_matrix
from ..spectra import singular_values
from ..stages import Watch
from . import losses, spectrum, targets
from .batches import Batch, evaluating
from .tuning import Tuning


def ranks(
    model: Any,
    chosen: Sequence[str],
    tuning: Tuning,
    batches: Sequence[Batch],
    around: Callable[[], AbstractContextManager[Any]],
    watch: Watch,
) -> dict[str, int]:
    """Return the rank of each of `chosen`: uniform, or by the spectra of the gradients of `batches`.

    A step of eta times the best rank-r part of a gradient G lowers the loss, to first order, by eta times the
    sum of the r largest squared singular values of G (that part is where LoRA-GA begins, Wang et al. 2024). A
    rank of an (m, n) matrix costs m + n parameters, so one threshold on gain per parameter, over all
    matrices, spends the budget best. A matrix may get none.

    Raises:
        RankError: the budget does not hold one rank of any matrix.
        NotFinite: a gradient is NaN or infinite.
    """
    if tuning.rank != "auto":
        return dict.fromkeys(chosen, tuning.rank_at_start)
    shapes = targets.shapes(model, chosen)
    budget = tuning.budget or tuning.auto_rank * sum(map(sum, shapes.values()))
    spectra = _spectra(model, chosen, batches, around, watch)
    found = spectrum.share(spectrum.Budget(budget), spectra, shapes)
    return {name: int(found[name]) for name in chosen}


def _spectra(
    model: Any,
    chosen: Sequence[str],
    batches: Sequence[Batch],
    around: Callable[[], AbstractContextManager[Any]],
    watch: Watch,
) -> dict[str, Tensor]:
    """Return the singular values of the gradient of the summed loss at each weight, on the CPU.

    A weight that the loss does not depend on has a gradient of zero. The model is left as it was, with the
    gradients that it has.
    """
    learning = {name: models.find(model, name).weight for name in chosen}
    before = [(one, one.requires_grad, one.grad) for one in model.parameters()]
    model.requires_grad_(False)
    for weight in learning.values():
        weight.requires_grad_(True)
    try:
        for parameter, _, _ in before:
            parameter.grad = None
        with evaluating(model), torch.enable_grad():
            for index, batch in enumerate(batches):
                with around():
                    found = losses.run(model, batch)
                found.sum().backward()  # type: ignore[no-untyped-call]
                watch("look at gradients", index + 1, len(batches))
        return {name: _spectrum(name, weight) for name, weight in learning.items()}
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _spectrum(name: str, weight: Tensor) -> Tensor:
    if weight.grad is None:
        return torch.zeros(min(weight.shape), dtype=torch.float64)
    return singular_values(check_matrix(weight.grad.float(), f"the gradient of {name}")).cpu()
