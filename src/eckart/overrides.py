"""Rules of a recipe for single modules."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .construct import construct
from .errors import ConfigError
from .ranks import Energy, Fixed, Keep


def check_number(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a number or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ConfigError(f"{name} {value!r}: must be a number")


@dataclass(frozen=True, slots=True)
class Override:
    """A rule for the modules that `match` (a glob): exactly one of rank, keep, energy, dense."""

    match: str
    rank: int | None = None
    keep: float | None = None
    energy: float | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "keep", "energy"):
            check_number(f"override {self.match!r}: {name}", getattr(self, name))
        if not isinstance(self.dense, bool):
            raise ConfigError(f"override {self.match!r}: dense {self.dense!r}: must be true or false")
        given = [self.rank is not None, self.keep is not None, self.energy is not None, self.dense]
        if sum(given) != 1:
            raise ConfigError(f"override {self.match!r}: give exactly one of rank, keep, energy, dense")
        self.rule()

    def rule(self) -> Fixed | Keep | Energy | None:
        """Return the rank rule, None for dense."""
        return rank_rule(self.rank, self.keep, self.energy)


def rank_rule(rank: int | None, keep: float | None, energy: float | None) -> Fixed | Keep | Energy | None:
    """Return the rule of the one that is given, None without any."""
    if rank is not None:
        return Fixed(rank)
    if keep is not None:
        return Keep(keep)
    return None if energy is None else Energy(energy)


def listed(values: Mapping[str, Any], lists: Iterable[str], where: str) -> dict[str, Any]:
    """Return `values` with tuples under the names `lists`, made of lists, single values or nothing.

    Those under `overrides` become rules.

    Raises:
        ConfigError: a rule has an unknown key or an illegal value.
    """
    made = dict(values)
    for name in lists:
        found = made.get(name)
        made[name] = (found,) if isinstance(found, (str, Mapping)) else tuple(found or ())
    made["overrides"] = tuple(
        item if isinstance(item, Override) else construct(Override, item, f"{where}: overrides")
        for item in made["overrides"]
    )
    return made
