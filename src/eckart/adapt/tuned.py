"""What a tuning run did, as a value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..pages.notebook import Shown
from .judge import Judged
from .tuning import Tuning

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Prospect:
    """What is known before a run.

    Args:
        trainable, total: parameters, of the model as it is trained.
        base: parameters of the base alone; quantised ones count as they were.
        steps: of the optimizer; `examples` are learned from, `held_out` decided on.
        rows: examples, or rows that hold several.
        cut, dropped: examples that were too long, and those that nothing was left of.
        start: the base on the held-out examples.
        memory: bytes by method, each {"weights", "gradients", "optimizer", "activations", ...}.
        notes: what the user should know.
    """

    source: str
    tuning: Tuning
    trainable: int
    total: int
    base: int
    steps: int
    examples: int
    rows: int
    held_out: int
    cut: int
    dropped: int
    start: Judged
    memory: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tuned(Shown):
    """What a tuning run did.

    Args:
        prospect: what was known before.
        end: the state that is kept, on the held-out examples.
        best: the step whose state it is.
        done: steps that were done.
        ended: why it ended.
        curve: (step, held-out loss); `accuracy` likewise, where label words are scored.
        learned: (step, loss on what was learned from).
        ranks: of each adapted matrix, in the end.
        trajectory: adalora: (step, {module: rank}), an entry for every time that ranks changed.
        error: qlora: the share of the quantisation error that the start of the adapter left.
        seconds: all steps, evaluations not counted; `per_step` is the median of a step.
        peak: bytes in memory at most while it trained; `resting` before.
        stored_bytes: of the weight files that were written, None where none were.
        decline: with a penalty, how the spectra moved (eckart.scratch.decline.Decline.to_dict).
    """

    prospect: Prospect
    end: Judged
    best: int
    done: int
    ended: str
    curve: tuple[tuple[int, float], ...]
    accuracy: tuple[tuple[int, float], ...]
    learned: tuple[tuple[int, float], ...]
    ranks: Mapping[str, int]
    trajectory: tuple[tuple[int, Mapping[str, int]], ...]
    error: float | None
    seconds: float
    per_step: float
    peak: int
    resting: int
    stored_bytes: int | None = None
    decline: Mapping[str, Any] | None = None

    @property
    def needed(self) -> int | None:
        """Bytes that the steps needed at most, the weights included, None without an estimate of these.

        This is what the estimate is of: interpreter, libraries and what else was there are not in it.
        """
        parts = self.prospect.memory.get(self.prospect.tuning.method)
        return None if parts is None else parts["weights"] + self.peak - self.resting

    @property
    def gain(self) -> bool:
        """Whether the held-out loss is below that of the base."""
        return self.end.loss < self.prospect.start.loss

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"schema": 1, **asdict(self)}

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from ..render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from .report_tune import tuned_table

        return tuned_table(self)
