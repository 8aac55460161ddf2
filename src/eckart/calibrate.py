"""Run a model over text windows or over batches, and gather the statistics of its matrices."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import batches, models
from .errors import ConfigError, NotFinite
from .losses import Batches, fitted
from .stats import Padding, Statistic, Stats, collect

OF_GRADIENTS: tuple[Statistic, ...] = ("gradient", "fisher")


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The statistics, and how many tokens each kind of them saw: real positions, or samples without any.

    `terms` is what the loss is a mean of, over what gradients were taken on; None: the gradient tokens.
    """

    stats: Stats
    tokens: int
    gradient_tokens: int
    terms: int | None = None

    @property
    def loss_terms(self) -> int:
        """What the loss is a mean of."""
        return self.gradient_tokens if self.terms is None else self.terms


@contextmanager
def gradients_from(entry: nn.Module, model: nn.Module) -> Iterator[None]:
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
    with_gradient = spread(len(windows), gradient_windows if set(statistics) & set(OF_GRADIENTS) else 0)
    forward_only = set(statistics) - set(OF_GRADIENTS)
    body = _body(model, names)
    entry = models.hidden_states_entry(model)
    done = 0
    with gradients_from(entry, model), collect(model, names, statistics) as stats:
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


def spread(count: int, wanted: int) -> set[int]:
    """Return the indices of `wanted` of `count` windows, evenly spread."""
    wanted = min(wanted, count)
    return {index * count // wanted for index in range(wanted)}


def _body(model: Any, names: Sequence[str]) -> Any:
    """Return the model without its head where the head is not asked about: its product is not needed."""
    prefix = f"{model.base_model_prefix}."
    return model.base_model if all(name.startswith(prefix) for name in names) else model


@contextmanager
def _gradients_at(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let gradients start at the first of the modules `names`, whatever the inputs of the model are."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)

    def start(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled() or output.requires_grad:
            return None
        # What comes out is a copy, since leaves must not be changed in place.
        return output.detach().requires_grad_().clone()

    handles = [model.get_submodule(name).register_forward_hook(start) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


def calibrate_batches(
    model: nn.Module,
    found: Batches,
    names: Sequence[str],
    statistics: Sequence[Statistic],
    *,
    labels: Literal["text", "sampled"] = "text",
    generator: torch.Generator,
    watch: Callable[[int, int], None] | None = None,
) -> Calibrated:
    """Return `statistics` of the modules `names` over batches of any model; padding counts in none.

    Gradients are those of the summed loss of the batches' objective. A loss is per one of its terms: that
    is the unit of what is estimated from these statistics (N in tr(C D H D^T) N_module / N / 2).

    Raises:
        ConfigError: no batch has a term of a loss.
        ModelError: a batch is padded, and what a module reads does not show where.
    """
    wanted = len(found) if found.gradients is None else found.gradients
    with_gradient = spread(len(found), wanted if set(statistics) & set(OF_GRADIENTS) else 0)
    forward_only = set(statistics) - set(OF_GRADIENTS)
    padding = Padding(_owners(model, found, names))
    seen, gradient_seen, terms = 0, 0, 0
    with _gradients_at(model, names), collect(model, names, statistics, padding=padding) as stats:
        for index, batch in enumerate(found.calls):
            own = fitted(model, batch)
            padding.masks, padding.samples = batches.masks(own, found.sides), batches.samples(own)
            count = batches.tokens(own, found.sides)
            if index in with_gradient:
                with torch.enable_grad():
                    outputs = batches.call(model, own)
                    summed = found.objective.to_differentiate(outputs, own, labels, generator)
                    if summed.total.requires_grad:
                        summed.total.backward()  # type: ignore[no-untyped-call]
                gradient_seen, terms = gradient_seen + count, terms + summed.terms
            elif forward_only:
                with torch.no_grad():
                    batches.call(model, own)
            seen += count
            if watch:
                watch(index + 1, len(found))
    if with_gradient and not terms:
        raise ConfigError("no batch has a label to take a gradient on: give batches with labels")
    return Calibrated(stats, seen, gradient_seen, terms if with_gradient else None)


def _owners(model: nn.Module, found: Batches, names: Sequence[str]) -> dict[str, str]:
    """Return whose padding is whose, which is asked where there is some."""
    padded = next((batch for batch in found.calls if batches.is_padded(batch, found.sides)), None)
    return {} if padded is None else batches.owners(model, fitted(model, padded), names, found.sides)
