"""What a report says of sizes: parameters, FLOPs, bytes."""

from .hub import MB
from .result import Result

Row = tuple[str, str, str, str]


def mb(size: int) -> str:
    """Return a number of bytes in megabytes of 10^6."""
    return f"{size / MB:,.1f} MB"


def share(after: float, before: float) -> str:
    """Return what is left, empty where nothing was."""
    return f"{after / before:.3f}" if before else ""


def size_rows(result: Result) -> list[Row]:
    """Return the rows (what, before, after, share) of the table of sizes."""
    before, after = result.before, result.after
    rows = [
        (what, f"{start:,}", f"{end:,}", share(end, start))
        for what, start, end in (
            ("parameters of the linears", before.linears, after.linears),
            ("parameters of the model", before.model, after.model),
            ("FLOPs per token, the linears", before.linear_flops, after.linear_flops),
            ("FLOPs per token, all nn.Linear", before.model_flops, after.model_flops),
        )
    ]
    rows.append(
        (
            f"bytes of the linears in {result.dtype}",
            mb(before.linear_bytes),
            mb(after.linear_bytes),
            share(after.linear_bytes, before.linear_bytes),
        )
    )
    written = result.file_bytes or after.bytes
    how = "on disk" if result.file_bytes else "computed"
    rows.append(
        (
            f"weight file in {result.dtype}, {how}",
            mb(before.bytes),
            mb(written),
            share(written, before.bytes),
        )
    )
    if result.source_bytes:
        rows.append(
            (
                "against the input file",
                mb(result.source_bytes),
                mb(written),
                share(written, result.source_bytes),
            )
        )
    return rows
