"""What a compression did and what it cost: plain values, made by the pipeline, shown by the report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .healing import Healing, Refined
from .latency import Timing
from .losses import MeasuredLoss
from .measure import Perplexity
from .pages.notebook import Shown
from .recipe import Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType


Measured = Perplexity | MeasuredLoss
"""Of causal language models on text, and of other models on batches."""


@dataclass(frozen=True, slots=True)
class Module:
    """One treated matrix: its parameters, the energy kept in its metric, the estimated loss per token.

    `storage` is `float` where it is stored in the output dtype.
    """

    name: str
    shape: tuple[int, int]
    form: str
    rank: int
    before: int
    after: int
    energy: float
    loss: float
    storage: str = "float"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters and FLOPs per token (2 x multiply-adds) of the treated matrices and of the whole model.

    `linear_bytes` and `bytes` are those of the treated matrices and of the whole weight file in the
    output dtype, computed; biases of treated matrices count with the model. FLOPs leave out
    attention scores and elementwise work.
    """

    linears: int
    model: int
    linear_flops: int
    model_flops: int
    linear_bytes: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity on one text: of the dense model, before healing (`one_shot`), and at the end."""

    dense: Perplexity
    one_shot: Perplexity
    compressed: Perplexity

    @classmethod
    def of(cls, dense: Measured | None, before: Measured | None, now: Measured | None) -> "Quality | None":
        """Return it where there was text to measure on; without healing, before is now."""
        before = before or now
        if not (isinstance(dense, Perplexity) and isinstance(before, Perplexity)):
            return None
        return cls(dense, before, now) if isinstance(now, Perplexity) else None


@dataclass(frozen=True, slots=True)
class Tried:
    """A size that was tried: increases of the loss, in nats per token, and the perplexity.

    Args:
        keep: of what the recipe counts.
        predicted: from curvature; None for methods without gradients.
        corrected: that, corrected by the measurements before this one (eckart.prediction).
        perplexity, increase: measured.
        within: the limit.
    """

    keep: float
    predicted: float | None
    corrected: float | None
    perplexity: float
    increase: float
    within: bool


@dataclass(frozen=True, slots=True)
class Search:
    """How the size was found: the smallest keep whose perplexity is at most `limit` above the dense model's.

    Args:
        limit: a fraction; 0.03 is 3 %.
        resolution: keeps are multiples of it; the next smaller one was measured to be too small, unless
            the steps ran out.
        steps: in the order in which they were measured.
    """

    limit: float
    resolution: float
    steps: tuple[Tried, ...]


@dataclass(frozen=True, slots=True)
class Result(Shown):
    """Everything that the report says.

    `source_bytes` is the size of the input's weight files, `file_bytes` that of the output's, both
    measured (None where there are none). `predicted_increase` estimates the loss increase per
    token from the curvature of the calibration loss, None for methods without gradients.
    `task` is what the model was loaded for (eckart.tasks). Statistics are means over `calibration_tokens`,
    which are samples where that is the `calibration_unit`.
    `compressed` is measured at the end, `one_shot` before the refinements in `healing` (None where there
    are none), and `foreign` is the same for a text of another kind. `search` says how `max_ppl_increase`
    became the recipe's keep. `seconds` are per stage,
    `peak_memory` in bytes. `timing` is there where times decided.
    """

    recipe: Recipe
    source: str
    architecture: str
    dtype: str
    modules: list[Module]
    before: Sizes
    after: Sizes
    source_bytes: int | None
    dense: Measured | None
    compressed: Measured | None
    held_out: bool
    predicted_increase: float | None
    calibration_tokens: int
    gradient_tokens: int
    seconds: Mapping[str, float]
    peak_memory: Mapping[str, int]
    warnings: list[str]
    file_bytes: int | None = None
    one_shot: Measured | None = None
    foreign: Quality | None = None
    healing: tuple[Refined, ...] = ()
    calibration_unit: str = "tokens"
    task: str = "causal-lm"
    timing: Timing | None = None
    search: Search | None = None

    @property
    def keep_linears(self) -> float:
        """Parameters of the treated matrices, after divided by before; 1 where only the ends are treated."""
        return self.after.linears / self.before.linears if self.before.linears else 1.0

    @property
    def keep_model(self) -> float:
        """Parameters of the whole model, after divided by before."""
        return self.after.model / self.before.model

    def with_file_bytes(self, size: int) -> "Result":
        """Return the result with the measured size of the files that were written."""
        return replace(self, file_bytes=size)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        values = asdict(self)
        values["keep_linears"], values["keep_model"] = self.keep_linears, self.keep_model
        return values

    def __str__(self) -> str:
        """Show the result as plain text tables."""
        from .render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show the result as tables."""
        from .report import renderable

        return renderable(self)


@dataclass(frozen=True, slots=True)
class Healed(Shown):
    """What healing a compressed model did; `quality` and `foreign` are None where nothing was measured."""

    source: str
    teacher: str
    settings: Healing
    steps: tuple[Refined, ...]
    quality: Quality | None
    foreign: Quality | None
    dtype: str
    seconds: Mapping[str, float]
    peak_memory: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from .render import plain
        from .report_healing import healed_table

        return plain(healed_table(self))

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from .report_healing import healed_table

        return healed_table(self)
