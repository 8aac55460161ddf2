"""What a model is run on, and how its loss is measured: windows of text, or batches of any model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import batches, losses, measure, models, objectives
from .batches import Batch, Call, Key
from .errors import ConfigError, NotFinite
from .losses import Batches, MeasuredLoss
from .measure import Perplexity
from .objectives import Loss, Objective
from .recipe import Recipe
from .windows import Rows, Windows

_HELD_OUT = 0.1
_TRIALS = 4


def check(recipe: Recipe, material: Windows, model: Any) -> None:
    """Refuse what needs windows of a causal language model, and windows that the model cannot take.

    Raises:
        ConfigError: the recipe asks for what is for causal language models only, or has too long windows.
        ModelError: the model looks ahead.
    """
    if material.is_text:
        if material.held_out is not None:
            measure.check_length(model, recipe.seq_len)
            measure.check_causal(model)
        return
    method = recipe.resolved_method()
    asked = {
        "heal": recipe.heal is not None,
        "stock": recipe.stock,
        "depth": recipe.depth,
        f"method {recipe.method}": method.target == "anchored",
        "foreign_text": bool(recipe.foreign_text),
    }
    given = [name for name, wanted in asked.items() if wanted]
    if given:
        raise ConfigError(f"{' and '.join(given)}: only for causal language models on text; leave it out")


def unit(material: Windows) -> str:
    """Return what the statistics are means over: tokens, or samples where there are no sequences."""
    rows = material.calibration
    if not isinstance(rows, Batches) or batches.masks(rows.calls[0], rows.sides):
        return "tokens"
    return "samples"


def quality(
    model: Any, rows: Rows, progress: Callable[[int, int], None] | None = None
) -> Perplexity | MeasuredLoss:
    """Return the perplexity of `model` on windows of text, or its loss on batches."""
    if isinstance(rows, Batches):
        return losses.measured(model, rows, progress)
    return measure.perplexity(model, rows, progress)


def losses_of(model: Any, rows: Rows) -> Tensor:
    """Return the mean loss of each window, or batch (k,), float64, on the CPU."""
    return (
        losses.batch_losses(model, rows) if isinstance(rows, Batches) else measure.window_losses(model, rows)
    )


def outputs(model: nn.Module, material: Windows) -> Callable[[], Tensor]:
    """Return what gives the outputs of `model`, as it is then, on always the same small input."""
    rows = material.calibration if material.calibration is not None else material.held_out
    if not isinstance(rows, Batches):
        return partial(models.probe_logits, model, models.probe(model))
    return partial(_outputs, model, losses.fitted(model, rows.calls[0]), rows)


@torch.no_grad()
def _outputs(model: nn.Module, batch: Batch, rows: Batches) -> Tensor:
    found = rows.objective.rows(batches.call(model, batch), batch)
    return torch.cat([row.flatten() for row in found])


def remembered(model: nn.Module, material: Windows) -> Windows:
    """Return `material` with the outputs of `model`, the dense one, where they will be compared with."""
    kept = {
        name: losses.remember(model, rows)
        for name in ("trial", "held_out", "foreign")
        if isinstance(rows := getattr(material, name), Batches)
    }
    return material.with_rows(**kept)


def of_batches(
    model: nn.Module,
    calls: Sequence[Call],
    held_out: Sequence[Call] | None = None,
    *,
    loss: Loss | None = None,
    masks: Mapping[Key, Key] | None = None,
    inputs: Sequence[Key] | None = None,
    gradients: int | None = None,
    objective: Objective | None = None,
) -> Windows:
    """Return what to run `model` on, of batches that it can be called with.

    Args:
        model: the dense model.
        calls: to calibrate on.
        held_out: to measure on; default: the last tenth of `calls`, at least one, left out of calibration.
        loss: (outputs, batch) -> losses of the terms, or their sum; default: the model's own loss, else how
            far its outputs are from those of the dense model (eckart.objectives).
        masks: argument with a sequence -> argument with its mask; default: those of transformers.
        inputs: the arguments that the model gets of each batch, by name or by position; default: all.
        gradients: how many of the batches to take gradients on; default: all.
        objective: how the loss is measured, instead of `loss`.

    Raises:
        ConfigError: a batch cannot be passed to a model, there are too few, or the loss is not known.
    """
    calls = list(calls)
    batches.check(calls)
    own = held_out is None
    if held_out is None:
        if len(calls) < 2:
            raise ConfigError("got one batch: give two at least, or eval_batches to measure on")
        cut = max(1, round(_HELD_OUT * len(calls)))
        calls, held_out = calls[:-cut], calls[-cut:]
    sides = batches.sides_of(model, masks)
    both = [batches.narrowed(part, inputs) for part in (calls, held_out)]
    first = losses.fitted(model, batches.without_padded_labels(both[0][0], sides))
    unit = "token" if batches.masks(first, sides) else "sample"
    what = objective or (
        objectives.default(model, first, sides) if loss is None else objectives.Given(loss, sides, unit)
    )
    calibration, measured = (
        Batches(tuple(batches.without_padded_labels(one, sides) for one in part), what, sides, gradients)
        for part in both
    )
    return Windows(calibration, calibration.first(_TRIALS), measured, own)


def check_fits(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise NotFinite if one of `tensors`, cast to `dtype`, is not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"{name} does not fit {dtype}: choose dtype bfloat16 or float32")
