"""What an evaluation with tasks found: perplexity and accuracies side by side."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..measure import Comparison, Perplexity
from .scores import TaskResult

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What was measured of `model`, and of `against` where that is a name.

    `language` is None where no text was given.
    """

    model: str
    against: str | None
    language: Perplexity | Comparison | None
    tasks: tuple[TaskResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "model": self.model,
            "against": self.against,
            "language": None if self.language is None else asdict(self.language),
            "tasks": [task.to_dict() for task in self.tasks],
        }

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from ..render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from rich.console import Group

        from ..report import evaluation_table
        from .report_tasks import tasks_table

        parts = [] if self.language is None else [evaluation_table(self.model, self.language, self.against)]
        return Group(*parts, *([tasks_table(self.tasks)] if self.tasks else []))
