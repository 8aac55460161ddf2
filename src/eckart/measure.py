"""Perplexity, and how far one model is from another, by one protocol.

Tokenise the whole text at once without special tokens, take the first `tokens`, cut them into
windows of `seq_len`, predict all tokens of a window but the first, average the negative log
likelihood over all predicted tokens. Logits are taken to float32. A logit that is not finite is an
error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .errors import ConfigError, ModelError, NotFinite

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The result of `perplexity`, in nats per predicted token.

    `standard_error` is that of `loss`, from the spread between windows (tokens of one window are
    not independent); None with a single window.
    """

    perplexity: float
    loss: float
    standard_error: float | None
    predicted: int
    windows: int
    seq_len: int
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against a reference on the same tokens.

    `kl` is the mean of KL(reference || model) per predicted token in nats, `agreement` the share
    of positions where both rank the same token first, `difference` the mean loss of the model
    minus that of the reference and `standard_error` its paired standard error between windows.
    """

    model: Perplexity
    reference: Perplexity
    kl: float
    agreement: float
    difference: float
    standard_error: float | None


def logits(model: Any, window: Tensor) -> Tensor:
    """Return the float32 logits (seq_len - 1, vocabulary) that predict window[1:].

    Raises:
        NotFinite: a logit is NaN or infinite.
    """
    found: Tensor = model(input_ids=window[None], use_cache=False).logits[0]
    return predictions(found, model)


def predictions(logits: Tensor, model: Any) -> Tensor:
    """Return of the `logits` (seq_len, vocabulary) of a window, given by `model`, those that predict a token.

    Raises:
        NotFinite: one of them is NaN or infinite.
    """
    found = logits[:-1].float()
    if not bool(torch.isfinite(found).all()):
        raise NotFinite(
            f"{type(model).__name__} in {model.dtype} gives logits that are NaN or infinite: "
            "the perplexity does not exist; evaluate in a wider dtype"
        )
    return found


def _spread(values: Tensor) -> float | None:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None


def summary(model: Any, losses: Tensor, seq_len: int) -> Perplexity:
    """Return what `losses` (k,) of windows of `seq_len` tokens come to."""
    loss = float(losses.mean())
    return Perplexity(
        perplexity=float(torch.tensor(loss, dtype=torch.float64).exp()),
        loss=loss,
        standard_error=_spread(losses),
        predicted=len(losses) * (seq_len - 1),
        windows=len(losses),
        seq_len=seq_len,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Raise ModelError if the logits of `model` at a position depend on what comes after it.

    Such a model (an encoder) sees the token that it is asked to predict: it has no perplexity.
    """
    size = model.config.get_text_config().vocab_size
    first = torch.arange(8, device=model.device) * 7 % size
    second = torch.cat([first[:4], (first[4:] + 1) % size])
    own, other = (logits(model, window)[:4] for window in (first, second))
    if float((own - other).abs().max()) > 1e-2 * float(own.abs().max()):
        raise ModelError(
            f"{type(model).__name__} looks at later tokens: only causal language models have a perplexity"
        )


def check_length(model: Any, seq_len: int) -> None:
    """Raise ConfigError if `model` has fewer positions than `seq_len`."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise ConfigError(f"seq_len {seq_len}: the model has {positions} positions, give at most that many")


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, progress: Progress | None = None) -> Perplexity:
    """Return the perplexity of `model` on `windows` (k, seq_len) of token ids.

    Raises:
        NotFinite: a logit is NaN or infinite.
    """
    return summary(model, window_losses(model, windows, progress), windows.shape[1])


@torch.no_grad()
def window_losses(model: Any, windows: Tensor, progress: Progress | None = None) -> Tensor:
    """Return the mean loss of each of `windows` (k, seq_len): (k,), float64, on the CPU.

    Raises:
        NotFinite: a logit is NaN or infinite.
    """
    losses = []
    for done, window in enumerate(windows.to(model.device), 1):
        losses.append(functional.cross_entropy(logits(model, window), window[1:]).double().cpu())
        if progress:
            progress(done, len(windows))
    return torch.stack(losses)


def lower(losses: Tensor, others: Tensor) -> bool:
    """Tell whether `losses` (k,) are below `others` by more than the standard error of the difference."""
    difference = others - losses
    return float(difference.mean()) > (_spread(difference) or 0.0)


@torch.no_grad()
def compare(model: Any, reference: Any, windows: Tensor, progress: Progress | None = None) -> Comparison:
    """Run both models over `windows` (k, seq_len) and compare what they predict.

    Raises:
        NotFinite: a logit is NaN or infinite.
        RuntimeError: the vocabularies have different sizes.
    """
    rows = []
    for done, window in enumerate(windows, 1):
        own = logits(model, window.to(model.device)).log_softmax(-1)
        other = logits(reference, window.to(reference.device)).log_softmax(-1).to(own.device)
        labels = window[1:].to(own.device)
        rows.append(
            torch.stack(
                [
                    functional.nll_loss(own, labels),
                    functional.nll_loss(other, labels),
                    functional.kl_div(own, other, log_target=True, reduction="none").sum(-1).mean(),
                    (own.argmax(-1) == other.argmax(-1)).float().mean(),
                ]
            )
            .double()
            .cpu()
        )
        if progress:
            progress(done, len(windows))
    own_loss, other_loss, kl, agreement = torch.stack(rows).unbind(1)
    return Comparison(
        model=summary(model, own_loss, windows.shape[1]),
        reference=summary(reference, other_loss, windows.shape[1]),
        kl=float(kl.mean()),
        agreement=float(agreement.mean()),
        difference=float((own_loss - other_loss).mean()),
        standard_error=_spread(own_loss - other_loss),
    )
