"""What sharing between blocks, and tying of embeddings, did and what it cost."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .groups import Sharing
from .pages.notebook import Shown
from .result import Measured, Result

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Joined(Result):
    """What became of a model whose blocks share matrices; the recipe holds the metrics and the texts.

    Args:
        sharing: who shares what.
        joined: the names of matrices that are now one, by the name of the first.
    """

    sharing: Sharing = field(default_factory=lambda: Sharing("all"))
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Show the result as plain text tables."""
        from .render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show the result as tables."""
        from .report_sharing import joined_table

        return joined_table(self)


@dataclass(frozen=True, slots=True)
class Tied(Shown):
    """What tying or untying embeddings and output head did.

    Args:
        source: the model.
        done: `tied`, `untied`, or `nothing` where it was so already.
        vocabulary, width: v and d of the matrices.
        parameters: of the model, before and after.
        saved: the bytes that v x d parameters take, in `dtype`; negative where they are added.
        error: the weighted squared error of the fit, in nats per token where `method` has gradients, for
            embeddings and head; None where nothing was fitted.
        texts: (source, what for) of the texts that were used.
        dense, compressed: the loss before and after, on text that nothing was fitted to.
    """

    source: str
    done: str
    vocabulary: int
    width: int
    parameters: tuple[int, int]
    saved: int
    dtype: str
    method: str | None = None
    error: tuple[float, float] | None = None
    dense: Measured | None = None
    compressed: Measured | None = None
    texts: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from .render import plain

        return plain(self)

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from .report_sharing import tied_table

        return tied_table(self)
