"""Progress on stderr: bars with an estimate of the time left, or lines where there is no terminal."""

import time

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10


class Bars:
    """Progress on stderr: bars with an estimate of the time left, or lines where there is no terminal."""

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

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def say(self, what: RenderableType) -> None:
        """Print `what` above the bars."""
        self.console.print(what)

    def watch(self, stage: str, done: int, total: int) -> None:
        """Show that `stage` has done `done` of `total`."""
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
