"""What an export to an engine came to: sizes, check, and the table that shows them."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .. import render
from .check import Check

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class EngineExport:
    """A model that was written for another engine.

    Args:
        source: the folder, file or hub id that it was.
        target: onnx or openvino.
        storage: of the weights.
        block: weights of a row with a common scale; None in floats.
        parameters: of the source.
        bytes: of the weight files before (None where they are not at hand), of graph and weights after.
        positions: tokens that the model has positions for; None where there is no limit.
        check: how far the engine is from PyTorch.
        tolerance: of the check; None where few bits make their own difference.
        engine: version of what ran it.
    """

    source: str
    target: str
    storage: str
    block: int | None
    parameters: int
    bytes: tuple[int | None, int]
    positions: int | None
    check: Check
    tolerance: float | None
    engine: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Show it as plain text tables."""
        return render.plain(self.__rich__())

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        return render.table(f"{self.source}: {self.target}, {self.storage}", ("", "found"), self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows (what, found) of the table."""
        before, after = self.bytes
        check = self.check
        largest = f"{check.largest:.1e}" + ("" if self.tolerance is None else f" of {self.tolerance:.0e}")
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("bytes of the weight files before", "" if before is None else f"{before:,}"),
            ("bytes of the graph and its weights", f"{after:,}"),
            ("largest difference of a logit, relative to the largest", largest),
            ("mean difference of a logit, relative to the largest", f"{check.mean:.1e}"),
            ("KL from PyTorch, nats per token", f"{check.divergence:.2e}"),
            (f"same first choice on {check.tokens} tokens", f"{check.agreement:.1%}"),
            ("greedy tokens that are PyTorch's", f"{check.greedy[0]} of {check.greedy[1]}"),
        ]
        if self.block is not None:
            rows.insert(0, ("weights with a common scale", str(self.block)))
        return rows
