"""Which blocks share which of their matrices, and what each keeps of its own."""

import re
from dataclasses import dataclass
from typing import Literal

from .construct import check_number
from .errors import ConfigError

What = Literal["blocks", "attention", "mlp"]
Start = Literal["fit", "first"]
WHAT: tuple[What, ...] = ("blocks", "attention", "mlp")
STARTS: tuple[Start, ...] = ("fit", "first")
_SYNTAX = "write for example 0-3,4-7 (two groups), 0+2+4 (one group), every:2 or all"


@dataclass(frozen=True, slots=True)
class Sharing:
    """How blocks share their matrices; biases and normalisation stay with each block.

    Args:
        groups: `0-3,4-7` (blocks 0 to 3 are one group, 4 to 7 another), `0+2+4` (a group of three), `every:2`
            (neighbours, two and two; a last one that is left alone keeps its own) or `all`.
        what: all matrices of the `blocks`, those of the feed-forward (`mlp`), or all others (`attention`).
        differences: the rank of what each matrix has on top of what it shares; 0 for nothing.
        scales: the outputs of what is shared have scales, for each matrix its own.
        start: `fit` to the weights that are there, or the `first` of each group for all, with differences
            that are zero: for models that are trained from scratch.
        seed: of the factors of differences that are zero.

    Raises:
        ConfigError: a value is not legal.
    """

    groups: str
    what: What = "blocks"
    differences: int = 0
    scales: bool = False
    start: Start = "fit"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, legal in (("what", WHAT), ("start", STARTS)):
            if getattr(self, name) not in legal:
                raise ConfigError(f"{name} {getattr(self, name)!r}: legal are {', '.join(legal)}")
        check_number("differences", self.differences, int, 0)
        if not isinstance(self.scales, bool):
            raise ConfigError(f"scales {self.scales!r}: must be true or false")
        _parsed(self.groups)

    def blocks(self, count: int) -> list[tuple[int, ...]]:
        """Return the groups in a model of `count` blocks, each ascending.

        Raises:
            ConfigError: a block that there is not, one in two groups, or a group of one.
        """
        found = _parsed(self.groups)
        if isinstance(found, int):
            size = found or count
            found = [tuple(range(start, min(start + size, count))) for start in range(0, count, size)]
            found = [group for group in found if len(group) > 1]
        named = [place for group in found for place in group]
        beyond = [place for place in named if place >= count]
        if beyond or not named:
            raise ConfigError(
                f"groups {self.groups!r} of a model with {count} blocks: legal are 0 to {count - 1}"
                + (f", got {beyond[0]}" if beyond else ", and at least two in a group")
            )
        return found


def _parsed(groups: object) -> list[tuple[int, ...]] | int:
    """Return the groups, or how many neighbours make one (0: all)."""
    text = str(groups).replace(" ", "")
    if text == "all":
        return 0
    every = re.fullmatch(r"every:(\d+)", text)
    if every and int(every[1]) >= 2:
        return int(every[1])
    if not re.fullmatch(r"\d+([-+]\d+)+(,\d+([-+]\d+)+)*", text):
        raise ConfigError(f"groups {groups!r}: {_SYNTAX}; a group has two blocks at least")
    found = [_places(part, groups) for part in text.split(",")]
    named = [place for group in found for place in group]
    twice = sorted({place for place in named if named.count(place) > 1})
    if twice:
        raise ConfigError(f"groups {groups!r} name block {twice[0]} twice: a block shares with one group")
    return found


def _places(part: str, groups: object) -> tuple[int, ...]:
    places: list[int] = []
    for piece in part.split("+"):
        ends = [int(end) for end in piece.split("-")]
        if len(ends) > 2 or ends[-1] < ends[0]:
            raise ConfigError(f"groups {groups!r}: {piece} is no range: {_SYNTAX}")
        places += range(ends[0], ends[-1] + 1)
    if len(places) < 2:
        raise ConfigError(f"groups {groups!r}: {part} is one block: {_SYNTAX}")
    return tuple(sorted(places))
