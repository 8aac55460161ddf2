"""How a compressed model is brought back towards the dense one: the settings, as one frozen value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .construct import check_number, construct
from .errors import ConfigError

Refinement = Literal["ranks", "closed", "block", "logits"]
Train = Literal["factors", "blocks", "all", "adapter"]
Precision = Literal["auto", "float32", "bfloat16"]
REFINEMENTS: tuple[Refinement, ...] = ("ranks", "closed", "block", "logits")
_CHOICES: dict[str, tuple[str, ...]] = {
    "train": ("factors", "blocks", "all", "adapter"),
    "precision": ("auto", "float32", "bfloat16"),
}
_WHOLE = ("tokens", "hold_tokens", "fit_tokens", "batch", "micro", "evaluations", "patience", "block_epochs")
_POSITIVE = ("block_rate", "temperature")
_RATE, _RATES = 1.9e-4, (5e-6, 1.4e-4)
_SHARES = ("warmup", "text_loss")


@dataclass(frozen=True, slots=True)
class Healing:
    """Which refinements, in which order, and how. Ranks and widths stay as they are.

    Args:
        text: sources to learn from, `NAME` or `NAME=WEIGHT` (eckart.lessons); default: the text that the
            compression is calibrated on.
        steps: any of `ranks` (rank moved between low-rank matrices, by the curvature that the compressed
            model has), `closed` (least squares, block by block), `block` (each block's output matched by
            gradient descent) and `logits` (the next-token distribution of the dense model matched end
            to end).
        tokens: to train on end to end; a token that is seen twice counts twice.
        hold_tokens: to decide on, from the last tenth of each text, which nothing is fitted to.
        seq_len: window length.
        seed: of the order of the windows.
        mixtures: closed: what is tried for the share of the dense model's own inputs in the target, 0
            (each block's map from the inputs that it now sees) to 1 (its outputs in the dense model).
        fit_tokens: closed and block: tokens to fit to.
        block_epochs, block_rate: block: passes over `fit_tokens`, and AdamW's rate.
        train: logits: what is trained, the `factors` (every module that was made smaller), the whole
            `blocks`, `all` parameters, or an `adapter` on the factors (LoRA, merged at the end).
        rate: AdamW's rate after warm-up; it falls to 0 by a half cosine. Default: 1.9e-4 per nat of the
            divergence at the start, between 5e-6 and 1.4e-4: AdamW's steps are as long as the rate, however
            little there is to mend, and their noise must stay below it.
        warmup: the share of the steps before it.
        batch: windows a step, over all devices ...
        micro: ... and those that one device takes at a time; the gradients are accumulated.
        clip: the largest norm of a gradient.
        temperature: of both distributions.
        text_loss: the share of the text's own next-token loss in what is minimised, in [0, 1].
        largest: how many entries of the dense model's distribution are kept, the others as one; default:
            all, and 256 where they are cached on disk.
        evaluations: on the held-out text, evenly over the run.
        patience: stop after so many of them in a row without a new best, in the second half of the run,
            where the rate is low.
        adapter_rank: of the adapter.
        checkpointing: recompute activations on the way back: less memory, a third more time.
        precision: to train in; `auto` is bfloat16 where the device multiplies it in hardware.

    Raises:
        ConfigError: a value is not legal.
    """

    text: tuple[str, ...] = ()
    steps: tuple[Refinement, ...] = ("logits",)
    tokens: int = 250_000
    hold_tokens: int = 8_192
    seq_len: int = 512
    seed: int = 0
    mixtures: tuple[float, ...] = (0.0, 0.5, 1.0)
    fit_tokens: int = 32_768
    block_epochs: int = 4
    block_rate: float = 1e-4
    train: Train = "blocks"
    rate: float | None = None
    warmup: float = 0.05
    batch: int = 1
    micro: int = 1
    clip: float = 1.0
    temperature: float = 1.0
    text_loss: float = 0.0
    largest: int | None = None
    evaluations: int = 12
    patience: int = 4
    adapter_rank: int = 16
    checkpointing: bool = False
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        unknown = [step for step in self.steps if step not in REFINEMENTS]
        if unknown or not self.steps:
            raise ConfigError(
                f"refinement {unknown[0] if unknown else None!r}: legal are {', '.join(REFINEMENTS)}"
            )
        for name, legal in _CHOICES.items():
            if getattr(self, name) not in legal:
                raise ConfigError(f"{name} {getattr(self, name)!r}: legal are {', '.join(legal)}")
        for name in (*_WHOLE, "adapter_rank"):
            check_number(name, getattr(self, name), int, 1)
        check_number("seq_len", self.seq_len, int, 2)
        check_number("seed", self.seed, int, 0)
        if self.largest is not None:
            check_number("largest", self.largest, int, 1)
        if self.rate is not None:
            check_number("rate", self.rate, float, 0.0, above=True)
        for name in (*_POSITIVE, "clip"):
            check_number(name, getattr(self, name), float, 0.0, above=True)
        for name in _SHARES:
            check_number(name, getattr(self, name), float, 0.0, most=1.0)
        for share in self.mixtures:
            check_number("mixtures", share, float, 0.0, most=1.0)
        if not isinstance(self.checkpointing, bool):
            raise ConfigError(f"checkpointing {self.checkpointing!r}: must be true or false")
        if not self.mixtures:
            raise ConfigError("mixtures: give at least one number in [0, 1]")
        if self.batch % self.micro:
            raise ConfigError(f"batch {self.batch}: must be a multiple of micro = {self.micro}")

    def starting_rate(self, divergence: float) -> float:
        """Return AdamW's rate for a run that starts at `divergence` nats per token."""
        return self.rate or min(max(_RATE * divergence, _RATES[0]), _RATES[1])

    def total_steps(self) -> int:
        """Return the optimizer steps that `tokens` are good for, at least one."""
        return max(1, self.tokens // (self.seq_len * self.batch))


@dataclass(frozen=True, slots=True)
class Refined:
    """What one refinement did: divergence from the dense model on held-out text, nats per token.

    `gain` tells whether `after` is below `before` by more than the standard error of the difference; if it is
    not, the refinement was taken back. `tokens` were learned from, repeats counted.
    """

    step: Refinement
    before: float
    after: float
    gain: bool
    tokens: int
    seconds: float
    detail: str
    curve: tuple[tuple[int, float], ...] = ()


def from_mapping(values: Mapping[str, Any], where: str = "heal") -> Healing:
    """Return the settings that `values` describe; lists, and single values for lists, will do.

    Raises:
        ConfigError: an unknown key (with a suggestion) or an illegal value.
    """
    made = dict(values)
    for name in ("text", "steps", "mixtures"):
        if name in made:
            found = made[name]
            made[name] = tuple(found) if isinstance(found, (list, tuple)) else (found,)
    settings: Healing = construct(Healing, made, where)
    return settings
