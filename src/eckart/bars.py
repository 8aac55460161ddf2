"""Progress on stderr: bars with an estimate of the time left, or lines where there is no terminal."""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10


@dataclass(slots=True)
class Stage:
    """A bar: since when it runs, what was done before that, and what is done."""

    task: TaskID
    started: float
    before: int
    done: int


class Bars:
    """Progress on stderr: bars with an estimate of the time left, or lines where there is no terminal.

    An interrupt (SIGINT) that falls into a callback of a library is lost there: Python cannot raise from a
    destructor. While bars are shown it is remembered, and raised again at the next step.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.stages: dict[str, Stage] = {}
        self.said = 0.0
        self.interrupted = False
        self.heard: Callable[[int, FrameType | None], object] | None = None

    def __enter__(self) -> "Bars":
        before = signal.getsignal(signal.SIGINT)
        # Jobs in the background ignore the signal, and only the main thread may choose who hears it.
        if callable(before) and threading.current_thread() is threading.main_thread():
            self.heard = before
            signal.signal(signal.SIGINT, self._interrupt)
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        if self.heard is not None:
            signal.signal(signal.SIGINT, self.heard)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        if self.heard is not None:
            self.heard(number, frame)

    def say(self, what: RenderableType) -> None:
        """Print `what` above the bars."""
        self.console.print(what)

    def watch(self, stage: str, done: int, total: int) -> None:
        """Show that `stage` has done `done` of `total`; raise KeyboardInterrupt that was lost before."""
        if self.interrupted:
            raise KeyboardInterrupt
        known = self.stages.get(stage)
        if known is None or done == 0 or done < known.done:
            self._begin(stage, done, total)
        own = self.stages[stage]
        own.done = done
        self.progress.update(own.task, completed=done, total=total)
        now = time.monotonic()
        if self.progress.disable and now - self.said > _SECONDS_BETWEEN_LINES:
            self.said = now
            made = done - own.before
            estimate = f", {(now - own.started) * (total - done) / made:.0f} s left" if made else ""
            self.console.print(f"{stage}: {done} of {total}{estimate}", highlight=False)

    def _begin(self, stage: str, done: int, total: int) -> None:
        """Take the time of `stage` from now on: it is new, or runs again. What is done already took none."""
        if stage in self.stages:
            task = self.stages[stage].task
            self.progress.reset(task, total=total, completed=done)
        else:
            for other in self.stages.values():
                self.progress.update(other.task, completed=self.progress.tasks[other.task].total)
            task = self.progress.add_task(stage, total=total, completed=done)
            self.said = 0.0
        self.stages[stage] = Stage(task, time.monotonic(), done, done)
