"""Plans in time: what a recipe says of them, and what a result reports of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError

Objective = Literal["size", "latency", "balanced"]
OBJECTIVES: tuple[Objective, ...] = ("size", "latency", "balanced")
DECODE = "decode"
_NOISY = 0.1
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_AMOUNT = re.compile(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(s|ms|us)?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Share:
    """A budget: this share of the time that the dense maps take."""

    of_dense: float

    def __str__(self) -> str:
        return f"latency {self.of_dense:g}"


@dataclass(frozen=True, slots=True)
class Seconds:
    """A budget: so many seconds per token."""

    per_token: float

    def __str__(self) -> str:
        return f"latency {milliseconds(self.per_token)} per token"


def milliseconds(seconds: float) -> str:
    """Return `seconds` as text in milliseconds, with four digits."""
    return f"{seconds * 1e3:.4g} ms"


def parse(given: float | str) -> Share | Seconds:
    """Return the budget that `given` says: a share of the dense time, or seconds with their unit.

    Raises:
        ConfigError: it is neither a number in (0, 1] nor a positive time in s, ms or us.
    """
    found = None if isinstance(given, bool) else _AMOUNT.fullmatch(str(given))
    try:
        amount = float(found[1]) if found else 0.0
    except ValueError:
        amount = 0.0
    unit = found[2] if found else None
    if unit is None and 0 < amount <= 1:
        return Share(amount)
    if unit is not None and amount > 0:
        return Seconds(amount * _UNITS[unit.lower()])
    raise ConfigError(
        f"latency {given!r}: give a share of the dense model's time in (0, 1], as 0.6, or a time per token "
        "with its unit, as 12ms, 800us or 0.02s"
    )


def tokens(workload: int | str | None) -> int:
    """Return how many tokens a pass of `workload` has: one for decode, the default, or so many at once.

    Raises:
        ConfigError: it is neither decode nor a whole number of at least 1.
    """
    text = DECODE if workload is None else str(workload).strip()
    if text == DECODE:
        return 1
    if isinstance(workload, (bool, float)) or not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"workload {workload!r}: give {DECODE} (one token) or how many tokens at once, as 512"
        )
    return int(text)


def resolved(given: Objective | None, budget: float | str | None) -> Objective:
    """Return what is spent: `given`, else latency where the budget is one, else size."""
    return given or ("size" if budget is None else "latency")


def check_recipe(recipe: Any) -> None:
    """Raise ConfigError if what `recipe` (eckart.recipe.Recipe) says of time is not legal or does not fit."""
    if recipe.latency is not None:
        parse(recipe.latency)
        if recipe.objective == "size":
            raise ConfigError(
                f"latency {recipe.latency} is spent in time, and objective 'size' in bytes: leave out the "
                "objective, or give keep or size"
            )
    tokens(recipe.workload)
    if not recipe.timed:
        given = [name for name in ("workload", "times") if getattr(recipe, name) is not None]
        if given:
            raise ConfigError(
                f"{given[0]} is for plans in time: give latency, or objective latency or balanced"
            )
        return
    reason = _unfit(recipe)
    if reason is not None:
        raise ConfigError(reason)


def _unfit(recipe: Any) -> str | None:
    """Return why no plan in time can be made of `recipe`."""
    method, what = recipe.resolved_method(), f"objective {recipe.resolved_objective!r}"
    if recipe.rank is not None or recipe.energy is not None:
        return f"{what} chooses within a budget, and rank and energy are rules: give keep, size or latency"
    if recipe.max_ppl_increase is not None:
        return (
            f"{what} and max_ppl_increase, which is found over sizes, do not go together: give keep or size"
        )
    if recipe.stores:
        return (
            f"{what} goes by times of maps in the output dtype, and those of few bits have others: give "
            "storage float with it, and quantise afterwards"
        )
    if recipe.stock:
        unfit = recipe.latency is None
        return "stock has one width for all: give latency with it, no objective" if unfit else None
    if method.form in ("width", "shared"):
        return f"{what} needs the time of every matrix by itself: form {method.form!r} has none, use pivoted"
    if method.allocation != "curvature":
        return (
            f"{what} weighs losses against time, in one unit: allocation {method.allocation!r} has none; use "
            "method eckart or io-svd"
        )
    if recipe.heal is not None and "ranks" in recipe.heal.steps:
        return "heal step 'ranks' moves rank at equal size, not at equal time: leave it out, or the objective"
    return None


@dataclass(frozen=True, slots=True)
class Step:
    """What the ranks of maps of one shape in one form are multiples of, and why."""

    shape: tuple[int, int]
    form: str
    multiple: int
    why: str


@dataclass(frozen=True, slots=True)
class Timing:
    """What the treated maps take on the device that was measured; seconds of one pass.

    Args:
        objective: what was spent.
        tokens: at once, in a pass.
        dense, planned: sums over the table of times, before and after.
        whole: matrices that stay dense, ...
        never_faster: ... of them, those that no low-rank form of any rank in the table is faster than.
        slower: matrices whose form takes longer than the dense map by the table.
        noisy: share of the rows of the table whose quartiles are far apart.
        steps: of ranks.
        where: device, processor, dtype, threads and torch of the table.
        measured_dense, measured: one pass through all maps of the model in turn, before and after, median
            of runs; None where it was not run (a dry run).
    """

    objective: Objective
    tokens: int
    dense: float
    planned: float
    whole: int
    never_faster: int
    slower: int
    noisy: float
    steps: tuple[Step, ...]
    where: dict[str, Any]
    measured_dense: float | None = None
    measured: float | None = None

    @property
    def what(self) -> str:
        """The workload in words."""
        return "decoding" if self.tokens == 1 else f"{self.tokens} tokens at once"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return what a report says of them: (what, before, after, share), per token."""
        found = [
            _row(f"time of the linears per token, {self.what}, by the table", self.dense, self.planned, self)
        ]
        if self.measured is not None and self.measured_dense is not None:
            found.append(_row("the same, measured map by map", self.measured_dense, self.measured, self))
        return found

    def remarks(self) -> list[str]:
        """Return what a reader must not overlook."""
        own = self.where
        threads = "" if own["threads"] is None else f", {own['threads']} threads"
        place = f"{own['processor']}, {own['device']}, {own['dtype']}{threads}, torch {own['torch']}"
        found = [
            f"times are of {place}; they count the treated maps alone, not attention, norms, embeddings or "
            "the output head"
        ]
        if self.noisy > _NOISY:
            found.append(
                f"{self.noisy:.0%} of these times have quartiles more than a quarter of the median apart: "
                "the machine was busy; have them measured again when it is not"
            )
        if self.slower:
            found.append(f"matrices that overrides make slower than dense: {self.slower}")
        if self.never_faster:
            found.append(
                f"matrices that no low-rank form is faster than here, and stay dense: {self.never_faster}"
            )
        return found + _said(self.steps)


def _row(what: str, before: float, after: float, timing: Timing) -> tuple[str, str, str, str]:
    start, end = (milliseconds(seconds / timing.tokens) for seconds in (before, after))
    return what, start, end, f"{after / before:.3f}" if before else ""


def _said(steps: Sequence[Step]) -> list[str]:
    """Return a sentence for each reason, with what it is the reason for."""
    reasons: dict[tuple[int, str], list[str]] = {}
    for step in steps:
        named = f"{step.form} {step.shape[0]} x {step.shape[1]}"
        reasons.setdefault((step.multiple, step.why), []).append(named)
    return [
        f"ranks are multiples of {multiple} ({', '.join(named)}): {why}"
        for (multiple, why), named in reasons.items()
    ]
