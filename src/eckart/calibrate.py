"""Run a causal language model over calibration windows and gather the statistics of its matrices."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import models
from .errors import NotFinite
from .stats import Statistic, Stats, collect

OF_GRADIENTS: tuple[Statistic, ...] = ("gradient", "fisher")


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The statistics, and how many tokens each kind of them saw."""

    stats: Stats
    tokens: int
    gradient_tokens: int


@contextmanager
def _gradients_from(entry: nn.Module, model: nn.Module) -> Iterator[None]:
    """Let gradients start at the output of `entry`; parameters need none, which saves their products."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)

    def start(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(torch.is_grad_enabled())

    handle = entry.register_forward_hook(start)
    try:
        yield
    finally:
        handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


def loss_gradient(
    logits: Tensor, window: Tensor, labels: Literal["text", "sampled"], generator: torch.Generator
) -> Tensor:
    """Return the gradient of the summed next-token loss at the logits (seq_len, v) of one window.

    It is softmax minus one-hot, written down rather than differentiated, which saves two tensors
    of the size of the logits. The labels are the window's own, or drawn from the model.

    Raises:
        NotFinite: a logit is NaN or infinite.
    """
    chances = logits.detach().float().softmax(-1)
    if not bool(torch.isfinite(chances).all()):
        raise NotFinite(
            "the logits on the calibration text are NaN or infinite: load the model in a wider dtype"
        )
    targets = window[1:]
    if labels == "sampled":
        targets = torch.multinomial(chances[:-1].cpu(), 1, generator=generator)[:, 0].to(window.device)
    chances[torch.arange(len(targets)), targets] -= 1
    chances[-1] = 0  # the last token has nothing to predict
    return chances.to(logits.dtype)


def calibrate(
    model: Any,
    windows: Tensor,
    names: Sequence[str],
    statistics: Sequence[Statistic],
    *,
    gradient_windows: int,
    labels: Literal["text", "sampled"] = "text",
    generator: torch.Generator,
    watch: Callable[[int, int], None] | None = None,
) -> Calibrated:
    """Return `statistics` of the modules `names` over `windows` (k, seq_len).

    Gradients are those of the summed next-token loss, on `gradient_windows` of the windows, evenly
    spread; the other windows run forward only.
    """
    seq_len = windows.shape[1]
    with_gradient = _spread(len(windows), gradient_windows if set(statistics) & set(OF_GRADIENTS) else 0)
    forward_only = set(statistics) - set(OF_GRADIENTS)
    body = _body(model, names)
    entry = models.hidden_states_entry(model)
    done = 0
    with _gradients_from(entry, model), collect(model, names, statistics) as stats:
        for index, window in enumerate(windows.to(model.device)):
            if index in with_gradient:
                with torch.enable_grad():
                    logits = model(input_ids=window[None], use_cache=False).logits[0]
                    logits.backward(loss_gradient(logits, window, labels, generator))
            elif forward_only:
                with torch.no_grad():
                    body(input_ids=window[None], use_cache=False)
            done += seq_len
            if watch:
                watch(index + 1, len(windows))
    return Calibrated(stats, done, len(with_gradient) * seq_len)


def _spread(count: int, wanted: int) -> set[int]:
    wanted = min(wanted, count)
    return {index * count // wanted for index in range(wanted)}


def _body(model: Any, names: Sequence[str]) -> Any:
    """Return the model without its head where the head is not asked about: its product is not needed."""
    prefix = f"{model.base_model_prefix}."
    return model.base_model if all(name.startswith(prefix) for name in names) else model
