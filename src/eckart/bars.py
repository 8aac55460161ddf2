"""Progress on stderr: bars with an estimate of the time left, or lines where there is no terminal."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10


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
        self.tasks: dict[str, TaskID] = {}
        self.started = self.said = time.monotonic()
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
        if stage not in self.tasks:
            for task in self.tasks.values():
                self.progress.update(task, completed=self.progress.tasks[task].total)
            self.tasks[stage] = self.progress.add_task(stage, total=total)
            self.started, self.said = time.monotonic(), 0.0
        self.progress.update(self.tasks[stage], completed=done, total=total)
        if self.progress.disable and time.monotonic() - self.said > _SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            left = (self.said - self.started) * (total - done) / done if done else None
            estimate = "" if left is None else f", {left:.0f} s left"
            self.console.print(f"{stage}: {done} of {total}{estimate}", highlight=False)
