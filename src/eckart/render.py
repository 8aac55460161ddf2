"""Tables and text that every report is made of."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from . import environment

_ANY_WIDTH = 10_000


class Rows:
    """A table, or, where its words do not fit side by side, one row below the other.

    Rich would break words, down to a letter a line; then no figure can be read.
    """

    def __init__(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.title, self.columns, self.rows = title, tuple(columns), [tuple(row) for row in rows]

    def grid(self) -> Table:
        """Return it side by side."""
        made = Table(title=Text(self.title), title_justify="left")
        for index, column in enumerate(self.columns):
            made.add_column(Text(column), justify="left" if index == 0 else "right", overflow="fold")
        for row in self.rows:
            made.add_row(*map(Text, row))
        return made

    def stacked(self) -> RenderableType:
        """Return it the first cell of each row, then a line for each other one that is not empty."""
        lines = [Text(self.title, style="italic")] if self.title else []
        for row in self.rows:
            lines.append(Text(row[0] or "-", style="bold"))
            for column, cell in zip(self.columns[1:], row[1:], strict=True):
                if cell.strip():
                    lines.append(Text(f"  {column}: {cell.strip()}" if column else f"  {cell.strip()}"))
        return Text("\n").join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the one that fits."""
        made = self.grid()
        needed = Measurement.get(console, options.update(max_width=_ANY_WIDTH), made).minimum
        yield made if needed <= options.max_width else self.stacked()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Rows:
    """Return a table whose first column is text and whose others are figures."""
    return Rows(title, columns, rows)


def plain(renderable: RenderableType, width: int = 120) -> str:
    """Return `renderable` as text without colour."""
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def to_json(values: Mapping[str, Any]) -> str:
    """Return `values` with the environment as JSON text."""
    return json.dumps({**values, "environment": environment.describe()}, indent=2, default=str)
