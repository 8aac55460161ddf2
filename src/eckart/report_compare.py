"""Show two models side by side. Pure rendering."""

import statistics
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from .comparing import Compared, Pair, Side
from .hub import MB
from .render import table
from .survey import kinds

KINDS = ("matrices", "m x n in A", "in B", "parameters B / A", "relative change: least, median, most")


def tables(found: Compared) -> RenderableType:
    """Return sizes and quality, a row for each kind of matrix, what both wrote."""
    parts: list[RenderableType] = [
        table("side by side", ("", f"A: {found.a.source}", f"B: {found.b.source}", "B / A"), rows(found))
    ]
    if found.matrices:
        parts.append(table("matrices of the blocks", KINDS, kind_rows(found.matrices)))
    parts += [Text(f"note: {note}") for note in found.notes]
    for sample in found.samples:
        parts.append(Text(f"\n> {sample.prompt.strip()}\n  A: {sample.a.strip()}\n  B: {sample.b.strip()}"))
    return Group(*parts)


def rows(found: Compared) -> list[tuple[str, ...]]:
    """Return sizes, and quality where it was measured."""
    made = [
        _row(label, *(getattr(side, name) for side in (found.a, found.b)))
        for label, name in (("parameters", "parameters"), ("FLOPs per token, linear maps", "flops"))
    ]
    sizes = [_megabytes(side) for side in (found.a, found.b)]
    share = ""
    if found.a.file_bytes and found.b.file_bytes:
        share = f"{found.b.file_bytes / found.a.file_bytes:.3f}"
    made.append(("weight files", *sizes, share))
    quality = found.quality
    if quality is not None:
        own, other = quality.reference, quality.model
        label = f"perplexity, {own.predicted:,} tokens, windows of {own.seq_len}"
        ratio = f"{other.perplexity / own.perplexity:.3f}"
        made.append((label, f"{own.perplexity:.3f}", f"{other.perplexity:.3f}", ratio))
        error = "" if quality.standard_error is None else f" +- {quality.standard_error:.4f}"
        made += [
            ("loss of B minus that of A (paired)", "", f"{quality.difference:+.4f}{error}", ""),
            ("KL(A || B), nats per token", "", f"{quality.kl:.4f}", ""),
            ("same first choice", "", f"{quality.agreement:.1%}", ""),
        ]
    return made


def _row(label: str, own: int, other: int) -> tuple[str, ...]:
    return label, f"{own:,}", f"{other:,}", f"{other / own:.3f}" if own else ""


def _megabytes(side: Side) -> str:
    return "" if side.file_bytes is None else f"{side.file_bytes / MB:,.1f} MB"


def kind_rows(matrices: Sequence[Pair]) -> list[tuple[str, ...]]:
    """Return a row for each kind of matrix."""
    kind = kinds(pair.name for pair in matrices)
    groups: dict[str, list[Pair]] = {}
    for pair in matrices:
        groups.setdefault(kind[pair.name], []).append(pair)
    made: list[tuple[str, ...]] = []
    for name, own in groups.items():
        before = sum(pair.parameters_a or 0 for pair in own)
        after = sum(pair.parameters_b or 0 for pair in own)
        changes = sorted(pair.change for pair in own if pair.change is not None)
        said = f"{changes[0]:.3f}, {statistics.median(changes):.3f}, {changes[-1]:.3f}" if changes else ""
        shapes = (_shapes(pair.shape_a for pair in own), _shapes(pair.shape_b for pair in own))
        made.append((f"{name} ({len(own)})", *shapes, f"{after / before:.3f}" if before else "", said))
    return made


def _shapes(found: object) -> str:
    shapes = sorted({shape for shape in found if shape is not None})  # type: ignore[attr-defined]
    return ", ".join(f"{rows} x {columns}" for rows, columns in shapes)
