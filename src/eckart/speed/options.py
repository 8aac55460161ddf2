"""What speed is measured with: settings of a pass, rounds, threads."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

FEWEST_RUNS = 3
"""Below, there are no quartiles."""
KEEP = 0.6
LAYER_TOKENS = (1, 16, 512)


def unique(values: Sequence[int]) -> tuple[int, ...]:
    """Return `values` in order, each once."""
    return tuple(dict.fromkeys(values))


def numbers(given: int | Sequence[int]) -> tuple[int, ...]:
    """Return one number, or several, as a tuple."""
    return (given,) if isinstance(given, int) else tuple(given)


def _counts(options: object, name: str, least: int = 1) -> None:
    """Raise ConfigError unless all that `options` has under `name` are integers of at least `least`."""
    found = getattr(options, name)
    for value in found if isinstance(found, tuple) else (found,):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} {value!r}: give an integer of at least {least}")
    if found == ():
        raise ConfigError(f"{name}: none given, give at least one number")


@dataclass(frozen=True, slots=True)
class Setting:
    """One size of a pass: so many rows, so many tokens of each at once, and so many new ones behind them."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"batch {self.batch}, prompt {self.prompt_tokens}, {self.new_tokens} new"


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often, and on how many threads.

    Args:
        runs: rounds that count; each measures everything once.
        warmup: rounds before them that do not.
        threads: of a CPU; None: as many as torch has.
    """

    runs: int = 10
    warmup: int = 2
    threads: int | None = None

    def __post_init__(self) -> None:
        _counts(self, "runs", least=FEWEST_RUNS)
        _counts(self, "warmup")
        if self.threads is not None:
            _counts(self, "threads")


@dataclass(frozen=True, slots=True)
class Options:
    """What whole models are measured with.

    Args:
        prompt_tokens, new_tokens, batch: every combination is a setting.
        rounds: how often.
        loads: how often each model is loaded in a process of its own, for load time and memory; 0: never.
        seed: of the token ids.
        compiled: run the models under torch.compile as well.
        fused: fuse low-rank models first (eckart.fuse).

    Raises:
        ConfigError: a number is too small, or there are none.
    """

    prompt_tokens: tuple[int, ...] = (128,)
    new_tokens: tuple[int, ...] = (32,)
    batch: tuple[int, ...] = (1,)
    rounds: Rounds = Rounds()
    loads: int = 3
    seed: int = 0
    compiled: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        _counts(self, "prompt_tokens")
        _counts(self, "new_tokens", least=2)  # the first comes from the prompt, the others are decoded
        _counts(self, "batch")
        _counts(self, "loads", least=0)
        _counts(self, "seed", least=0)

    def settings(self) -> tuple[Setting, ...]:
        """Return every combination, each once."""
        return tuple(
            Setting(batch, prompt, new)
            for batch, prompt, new in itertools.product(*map(unique, self._lists()))
        )

    def largest(self) -> Setting:
        """Return the setting that needs most memory."""
        return Setting(*map(max, self._lists()))

    def _lists(self) -> tuple[tuple[int, ...], ...]:
        return self.batch, self.prompt_tokens, self.new_tokens


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """What single linear maps are measured with.

    Args:
        keep: of the parameters of each map, in (0, 1).
        tokens: how many at once.
        rounds: how often.
        fused: time low-rank forms as eckart.fuse makes them, too.

    Raises:
        ConfigError: keep is out of range, a number is too small, or there are none.
    """

    keep: float = KEEP
    tokens: tuple[int, ...] = LAYER_TOKENS
    rounds: Rounds = Rounds()
    fused: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ConfigError(f"keep {self.keep}: must lie in (0, 1), at 1 every map stays as it is")
        _counts(self, "tokens")
