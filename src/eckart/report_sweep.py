"""Show a sweep: tables. Pure rendering."""

from rich.console import Group, RenderableType
from rich.text import Text

from .render import table
from .report_search import relative, signed
from .sweeps import Row, Sweep

_MB = 1e6
SWEEP = (
    "method", "front", "keep", "storage", "MB", "linears", "perplexity", "against dense", "predicted", "s",
)  # fmt: skip


def sweep_row(row: Row) -> tuple[str, ...]:
    """Return the cells of a row that has figures."""
    assert row.bytes is not None
    assert row.perplexity is not None
    assert row.increase is not None
    figure = f"{row.perplexity:,.2f}" if row.perplexity < 1e5 else f"{row.perplexity:.1e}"
    return (
        row.method, "*" if row.on_front else "", f"{row.keep:g}", row.storage, f"{row.bytes / _MB:,.1f}",
        f"{row.keep_linears:.3f}", figure, relative(row.increase), signed(row.predicted_increase, 3),
        f"{row.seconds:.0f}",
    )  # fmt: skip


def sweep_tables(sweep: Sweep) -> RenderableType:
    """Return the rows, the smallest file first, with the front marked, and what failed."""
    good = sorted(
        (row for row in sweep.rows if row.ok), key=lambda row: (row.bytes or 0, row.perplexity or 0)
    )
    failed = [row for row in sweep.rows if not row.ok]
    cells = [sweep_row(row) for row in good]
    fast = any(row.decode_tokens_per_second is not None for row in good)
    if fast:
        speeds = [row.decode_tokens_per_second for row in good]
        cells = [(*cell, "" if value is None else f"{value:.1f}") for cell, value in zip(cells, speeds)]
    parts: list[RenderableType] = []
    if good:
        first = good[0]
        assert first.dense_bytes is not None
        mark = " (on the front)" if sweep.dense_on_front else ""
        title = (
            f"{sweep.source}: keep of the {sweep.protocol['of']}; dense {first.dense_bytes / _MB:,.1f} MB, "
            f"perplexity {first.dense_perplexity:,.2f}{mark}"
        )
        parts.append(table(title, (*SWEEP, *(["decode tok/s"] if fast else [])), cells))
        parts.append(Text("*: nothing here is as small and as good, and better in one of the two"))
    parts += [Text(f"failed: {row.method}, keep {row.keep:g}, {row.storage}: {row.error}") for row in failed]
    parts.append(Text(f"{len(good)} measured, {len(failed)} failed; rows in {sweep.out}"))
    return Group(*parts)
