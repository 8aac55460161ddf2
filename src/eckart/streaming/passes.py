"""Passes over the blocks: forward with their inputs kept, backward with their statistics gathered."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .. import measure
from ..calibrate import gradients_from, loss_gradient
from ..recipe import Labels
from ..stats import Statistic, Stats, collect
from .activations import Activations
from .stream import Stream
from .team import Team
from .work import Work

Watch = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Track:
    """Windows of text on their way through the blocks: what enters each block is in a file.

    Args:
        work: where the files are.
        name: what they are called.
        rows: the token ids (k, seq_len) of this process's windows.
        width: of the hidden states.
        dtype: that they are kept in.
        team: the processes, each of which has its own files.
        keep: whether what entered earlier blocks is kept, for the way back.
    """

    work: Work
    name: str
    rows: Tensor
    width: int
    dtype: torch.dtype
    team: Team
    keep: bool = False

    def at(self, index: int) -> Activations:
        """Return what enters block number `index`."""
        file = self.work.folder / f"hidden/{self.name}-{index}{self.team.suffix()}"
        return Activations(file, (1, self.rows.shape[1], self.width), self.dtype)

    def place(self, count: int) -> int:
        """Return how many of `count` blocks it has passed, -1 if it has not entered."""
        return next((index for index in range(count, -1, -1) if self.at(index).exists()), -1)

    def enter(self, stream: Stream) -> None:
        """Bring the windows to the first block; its entrance is in memory."""
        with self.at(0).written() as append, torch.no_grad():
            for window in self.rows:
                append(stream.enter(window))

    def advance(self, index: int, stream: Stream) -> None:
        """Bring the windows through block number `index`, which is in memory."""
        with self.at(index + 1).written() as append, torch.no_grad():
            for number in range(len(self.rows)):
                append(stream.run(index, self.at(index).read(number).to(stream.place)))
        if not self.keep:
            self.at(index).delete()

    def delete(self, count: int) -> None:
        """Delete all files of a model with `count` blocks."""
        for index in range(count + 1):
            self.at(index).delete()


def forward(stream: Stream, tracks: Sequence[Track], watch: Watch) -> None:
    """Bring all `tracks` to the end of the blocks, from wherever they are."""
    count = len(stream.names)
    places = [track.place(count) for track in tracks]
    if -1 in places:
        with stream.entrance():
            for track, place in zip(tracks, places, strict=True):
                if place == -1:
                    track.enter(stream)
    for index in range(max(0, min(places, default=count)), count):
        with stream.block(index):
            for track, place in zip(tracks, places, strict=True):
                if place <= index:
                    track.advance(index, stream)
        watch(index + 1, count)


@torch.no_grad()
def losses(stream: Stream, track: Track) -> list[float]:
    """Return the mean loss of each window of `track`, which has passed the blocks; the exit is in memory.

    Raises:
        NotFinite: a logit is NaN or infinite.
    """
    found = []
    for number, window in enumerate(track.rows):
        hidden = track.at(len(stream.names)).read(number).to(stream.place)
        logits = measure.predictions(stream.leave(hidden), stream.model)
        loss = functional.cross_entropy(logits, window[1:].to(logits.device))
        found.append(float(loss.double()))
    return found


@dataclass(frozen=True, slots=True)
class Slopes:
    """Gradients of the loss with respect to what enters each block, for some windows of a track.

    Args:
        track: the track.
        chosen: the numbers of these windows, ascending.
    """

    track: Track
    chosen: Sequence[int]

    def at(self, index: int) -> Activations:
        """Return the gradients at what enters block number `index`."""
        own = self.track.at(index)
        return Activations(own.file.with_name(f"slope-{own.file.name}"), own.shape, own.dtype)

    def start(self, stream: Stream, labels: Labels, generator: torch.Generator) -> None:
        """Write the gradients at what comes out of the last block; the exit is in memory."""
        count = len(stream.names)
        with self.at(count).written() as append:
            for number in self.chosen:
                hidden = self.track.at(count).read(number).to(stream.place).requires_grad_()
                with torch.enable_grad():
                    logits = stream.leave(hidden)
                    logits.backward(loss_gradient(logits, self.track.rows[number], labels, generator))  # type: ignore[no-untyped-call]
                assert hidden.grad is not None
                append(hidden.grad)


def gather(
    stream: Stream,
    index: int,
    track: Track,
    slopes: Slopes | None,
    names: Sequence[str],
    statistics: Sequence[Statistic],
) -> Stats:
    """Return statistics of the modules `names` of block number `index`, which is in memory.

    With `slopes`, whose gradients at what comes out of the block are known, those at what enters it are
    written, unless they are known as well.
    """
    place = {} if slopes is None else {number: order for order, number in enumerate(slopes.chosen)}
    known = slopes is None or slopes.at(index).exists()
    with collect(stream.model, names, statistics) as stats, ExitStack() as stack:
        append = None if known or slopes is None else stack.enter_context(slopes.at(index).written())
        for number in range(len(track.rows)):
            hidden = track.at(index).read(number).to(stream.place)
            if slopes is None or number not in place:
                with torch.no_grad():
                    stream.run(index, hidden)
                continue
            with torch.enable_grad():
                out = stream.run(index, hidden.requires_grad_())
                out.backward(slopes.at(index + 1).read(place[number]).to(stream.place))  # type: ignore[no-untyped-call]
            if append is not None:
                assert hidden.grad is not None
                append(hidden.grad)
    return stats


def gather_at_entrance(
    stream: Stream, track: Track, slopes: Slopes | None, name: str, statistics: Sequence[Statistic]
) -> Stats:
    """Return statistics of the embeddings called `name`; the entrance is in memory."""
    place = {} if slopes is None else {number: order for order, number in enumerate(slopes.chosen)}
    entry = stream.model.get_submodule(name)
    with gradients_from(entry, stream.model), collect(stream.model, [name], statistics) as stats:
        for number, window in enumerate(track.rows):
            with torch.set_grad_enabled(number in place):
                hidden = stream.enter(window)
            if slopes is not None and number in place:
                hidden.backward(slopes.at(0).read(place[number]).to(stream.place))  # type: ignore[no-untyped-call]
    return stats
