"""Show how a size was found. Pure rendering."""

import math

from .render import Rows, table
from .result import Search

COLUMNS = ("keep", "predicted loss", "corrected", "measured", "perplexity", "against dense", "")


def signed(value: float | None, digits: int = 4) -> str:
    """Return an increase of the loss with its sign, nothing where there is none."""
    return "" if value is None else f"{value:+.{digits}f}"


def relative(increase: float) -> str:
    """Return by how much the perplexity is above another one, given the difference of the losses."""
    share = math.expm1(increase)
    return f"{100 * share:+.2f} %" if share < 10 else f"x {share + 1:,.1f}"


def search_rows(found: Search) -> list[tuple[str, ...]]:
    """Return a row for each step of a search, in order."""
    return [
        (
            f"{step.keep:.3f}", signed(step.predicted), signed(step.corrected), signed(step.increase),
            f"{step.perplexity:,.2f}", relative(step.increase), "within" if step.within else "above",
        )
        for step in found.steps
    ]  # fmt: skip


def search_table(found: Search) -> Rows:
    """Return the steps of a search, in order."""
    title = (
        f"the smallest keep within {100 * found.limit:g} % of the dense model's perplexity, in steps of "
        f"{found.resolution:g}"
    )
    return table(title, COLUMNS, search_rows(found))
