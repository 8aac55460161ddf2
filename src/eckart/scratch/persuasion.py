"""Settings of a penalty that seeks low rank while a model trains, as one frozen value."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..construct import check_number, construct
from ..errors import ConfigError

Kind = Literal["nuclear", "tail", "stable-rank", "orthogonality"]
Schedule = Literal["constant", "linear", "cosine"]
Polar = Literal["svd", "newton-schulz"]
KINDS: tuple[Kind, ...] = ("nuclear", "tail", "stable-rank", "orthogonality")
_CHOICES: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "schedule": ("constant", "linear", "cosine"),
    "polar": ("svd", "newton-schulz"),
}


@dataclass(frozen=True, slots=True)
class Persuasion:
    """What is added to the loss, how strongly, and when.

    Args:
        kind: `nuclear` (the nuclear norm; of factors its bound), `tail` (half the squared singular values
            beyond a target rank), `stable-rank`, or `orthogonality` of factors.
        strength: what the sum of the penalty over all matrices is multiplied by.
        keep: tail: the target rank of a matrix is that of two factors with this share of its parameters.
        schedule: after `warmup`, the strength is `constant`, or rises from 0 to all of it at the end of the
            run in a line (`linear`) or in half a cosine (`cosine`).
        warmup: the share of the steps without any penalty.
        until: the number of steps that the schedule is spread over, after which there is no penalty; default:
            all of the run.
        every: steps for which a decomposition of a dense matrix is used; of factors all is exact.
        polar: nuclear, dense matrices: U V^T exactly, by `svd`, or nearly, by `newton-schulz`.
        include: globs on module names; default: every linear map in the blocks, dense or factored.
        exclude: of those.

    Raises:
        ConfigError: a value is not legal.
    """

    kind: Kind
    strength: float
    keep: float | None = None
    schedule: Schedule = "constant"
    warmup: float = 0.0
    until: int | None = None
    every: int = 10
    polar: Polar = "svd"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, legal in _CHOICES.items():
            if getattr(self, name) not in legal:
                raise ConfigError(f"{name} {getattr(self, name)!r}: legal are {', '.join(legal)}")
        check_number("strength", self.strength, float, 0.0, above=True)
        check_number("warmup", self.warmup, float, 0.0, most=1.0)
        check_number("every", self.every, int, 1)
        if self.until is not None:
            check_number("until", self.until, int, 1)
        if (self.kind == "tail") != (self.keep is not None):
            raise ConfigError(
                f"keep {self.keep} with penalty {self.kind!r}: it is the target of tail, which needs one"
            )
        if self.keep is not None:
            check_number("keep", self.keep, float, 0.0, most=1.0, above=True)

    def at(self, step: int, steps: int) -> float:
        """Return the strength in step number `step` (from 0) of a run of `steps`."""
        steps = self.until or steps
        start = self.warmup * steps
        if step < start or step >= steps:
            return 0.0
        past = min((step + 1 - start) / max(steps - start, 1), 1.0)
        shapes = {"constant": 1.0, "linear": past, "cosine": (1 - math.cos(math.pi * past)) / 2}
        return self.strength * shapes[self.schedule]


def from_mapping(values: Mapping[str, Any], where: str = "penalty") -> Persuasion:
    """Return the settings that `values` describe; lists, and single values for lists, will do.

    Raises:
        ConfigError: an unknown key (with a suggestion) or an illegal value.
    """
    made = dict(values)
    for name in ("include", "exclude"):
        found = made.get(name, ())
        made[name] = (found,) if isinstance(found, str) else tuple(found)
    settings: Persuasion = construct(Persuasion, made, where)
    return settings
