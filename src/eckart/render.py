"""Tables and text that every report is made of."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from . import environment

_FRAME = 3
"""A line and a space on each side of a column."""


class Rows:
    """A table, or, where its words do not fit side by side, one row below the other.

    Rich would break words, down to a letter a line; then no figure can be read.
    """

    def __init__(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.title, self.columns, self.rows = title, tuple(columns), [tuple(row) for row in rows]

    def grid(self, widths: Sequence[int] | None = None) -> Table:
        """Return it side by side, the columns as wide as `widths`; default: as their longest cell."""
        made = Table(title=Text(self.title), title_justify="left")
        for index, column in enumerate(self.columns):
            side: JustifyMethod = "left" if index == 0 else "right"
            width = None if widths is None else widths[index]
            made.add_column(Text(column), justify=side, overflow="fold", width=width)
        for row in self.rows:
            made.add_row(*map(Text, row))
        return made

    def widths(self, available: int) -> list[int] | None:
        """Return widths of columns at which no word is broken, None where there are none.

        Each has its longest word; what is left of `available` goes to those whose cells are longer, first
        to those that need least.
        """
        lines = list(zip(self.columns, *self.rows, strict=True))
        least = [
            max((cell_len(word) for cell in cells for word in cell.split()), default=1) for cells in lines
        ]
        whole = [max(map(cell_len, cells), default=1) for cells in lines]
        left = available - _FRAME * len(lines) - 1 - sum(least)
        if left < 0:
            return None
        shares = _shares([long - short for long, short in zip(whole, least)], left)
        return [short + share for short, share in zip(least, shares)]

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
        widths = self.widths(options.max_width)
        yield self.stacked() if widths is None else self.grid(widths)


def _shares(wanted: Sequence[int], left: int) -> list[int]:
    """Share out `left`: each gets what it wants, or as much as those that get less than they want."""
    shares = [0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    for served, place in enumerate(order):
        shares[place] = min(wanted[place], left // (len(order) - served))
        left -= shares[place]
    return shares


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
