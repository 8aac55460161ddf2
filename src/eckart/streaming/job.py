"""What a streamed run works on: the model, its text, its choices of targets, and where it keeps things."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import dimensions, models
from ..calibrate import spread
from ..dimensions import Dimension
from ..models import Target
from ..recipe import Recipe
from ..windows import TextWindows
from .passes import Slopes, Track
from .stream import Stream
from .team import Team
from .work import Work

ENDS = "ends"
"""The step of what lies outside of the blocks."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids (k, seq_len) to calibrate, to try choices and to measure on; see eckart.windows.Windows."""

    calibration: Tensor | None
    trial: Tensor | None
    held_out: Tensor | None
    foreign: Tensor | None
    own_text: bool

    @classmethod
    def of(cls, found: TextWindows) -> "Texts":
        """Return the windows that were `found` in text."""
        return cls(found.calibration, found.trial, found.held_out, found.foreign, found.own_text)

    def all(self) -> dict[str, Tensor]:
        """Return what there is, by name."""
        names = ("calibration", "trial", "held_out", "foreign")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, slots=True)
class Job:
    """One run.

    Args:
        recipe: what to do.
        source: the model, by name.
        stream: the model, block by block.
        stored: the dtype of its weights at the source.
        found: the matrices to treat.
        narrowable: hidden dimensions that may be made narrower.
        texts: windows of text.
        work: where finished things are kept.
        team: who takes part.
    """

    recipe: Recipe
    source: str
    stream: Stream
    stored: torch.dtype
    found: Sequence[Target]
    narrowable: Sequence[Dimension]
    texts: Texts
    work: Work
    team: Team

    @property
    def count(self) -> int:
        """The number of blocks."""
        return len(self.stream.names)

    def steps(self) -> list[str]:
        """Return the names of the steps of the decomposition, in the order of the model."""
        outside = [ENDS] if self.targets(None) else []
        return [*(str(index) for index in range(self.count) if self.targets(index)), *outside]

    def targets(self, index: int | None) -> list[Target]:
        """Return the targets in block number `index`, or outside of the blocks."""
        owners = {target.name: models.owner(target.name, self.stream.names) for target in self.found}
        wanted = None if index is None else self.stream.names[index]
        return [target for target in self.found if owners[target.name] == wanted]

    def dimensions(self, targets: Sequence[Target]) -> list[Dimension]:
        """Return the dimensions that are read by one of `targets`."""
        names = {target.name for target in targets}
        return [dimension for dimension in self.narrowable if dimension.reader in names]

    def track(self, name: str, rows: Tensor | None, keep: bool = False) -> Track:
        """Return the track of this process's share of `rows`; none where there are no rows."""
        own = torch.zeros(0, 2, dtype=torch.int64) if rows is None else self.team.own(rows)
        stream = self.stream
        return Track(self.work, name, own, stream.width, stream.model.dtype, self.team, keep)

    def calibration(self) -> Track:
        """Return the track of the text to calibrate on; what enters each block is kept."""
        wanted = self.texts.calibration if self.recipe.statistics() else None
        return self.track("calibration", wanted, keep=True)

    def slopes(self) -> Slopes | None:
        """Return the gradients for the calibration, None where the method has none."""
        if not {"gradient", "fisher"} & set(self.recipe.statistics()):
            return None
        track, chosen = self.calibration(), set(self.gradient_windows())
        mine = range(self.team.rank, self.rows, self.team.size)
        return Slopes(track, [place for place, number in enumerate(mine) if number in chosen])

    @property
    def rows(self) -> int:
        """The windows to calibrate on, of all processes."""
        wanted = self.texts.calibration if self.recipe.statistics() else None
        return 0 if wanted is None else len(wanted)

    def gradient_windows(self) -> list[int]:
        """Return the numbers of the windows with gradients."""
        rows = self.texts.calibration
        if rows is None:
            return []
        return sorted(spread(self.rows, max(1, self.recipe.gradient_tokens // rows.shape[1])))

    def tokens(self) -> tuple[int, int]:
        """Return the tokens to calibrate on, and those with gradients."""
        rows = self.texts.calibration
        length = 0 if rows is None else rows.shape[1]
        has_gradients = {"gradient", "fisher"} & set(self.recipe.statistics())
        return self.rows * length, len(self.gradient_windows()) * length if has_gradients else 0


def verified(stream: Stream, suspected: Sequence[Dimension]) -> list[Dimension]:
    """Return the dimensions that are what their shapes suggest, each tried in its own block."""
    with stream.entrance():
        hidden = stream.enter(stream.probe())

    def tried(model: nn.Module, dimension: Dimension) -> bool:
        name = models.owner(dimension.reader, stream.names)
        if name is None:
            return False
        index = stream.names.index(name)
        with stream.block(index):
            return dimensions.holds(model, dimension, lambda: stream.run(index, hidden))

    return dimensions.verified(stream.model, suspected, tried)
