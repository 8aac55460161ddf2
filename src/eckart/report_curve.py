"""Show a budget curve: tables. Pure rendering."""

import math

from rich.console import Group, RenderableType
from rich.text import Text

from .curves import BudgetCurve, Point
from .render import table
from .report_search import relative, signed

_MB = 1e6
CURVE = (
    "keep",
    "linears",
    "MB",
    "predicted",
    "perplexity",
    "corrected",
    "perplexity",
    "measured",
    "perplexity",
)
CHECKS = (
    "measured at keep",
    "predicted",
    "measured",
    "measured / predicted",
    "expected from the others",
    "off by",
)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}" if value < 1e5 else f"{value:.1e}"


def curve_row(point: Point) -> tuple[str, ...]:
    """Return the row of one size."""
    return (
        f"{point.keep:g}", f"{point.keep_linears:.3f}", f"{point.bytes / _MB:,.1f}",
        signed(point.predicted_increase), _figure(point.predicted_perplexity),
        signed(point.corrected_increase), _figure(point.corrected_perplexity),
        signed(point.measured_increase), _figure(point.measured_perplexity),
    )  # fmt: skip


def check_row(point: Point) -> tuple[str, ...]:
    """Return what a measured point says of the prediction, and of the correction by the other points."""
    measured, predicted, other = point.measured_increase, point.predicted_increase, point.left_out_increase
    assert measured is not None
    usable = predicted is not None and predicted > 0
    off = "" if other is None else relative(measured - other)
    ratio = f"{measured / predicted:.2f}" if usable and predicted is not None else ""
    return f"{point.keep:g}", signed(predicted), signed(measured), ratio, signed(other), off


def remarks(curve: BudgetCurve) -> list[str]:
    """Return what a reader must not overlook."""
    found = list(curve.warnings)
    if curve.rows and curve.rows[0].predicted_increase is None:
        found.append(
            f"method {curve.method} has no gradients, so that losses have no unit: only measured points say "
            "something; method eckart or io-svd predicts"
        )
    elif not curve.measured:
        found.append(
            "nothing was measured: predictions alone are too low at strong compression (--measure 0.6)"
        )
    if curve.dense is not None and curve.held_out:
        found.append("measured on the last 5 % of the text, which was left out of calibration")
    return found


def curve_tables(curve: BudgetCurve) -> RenderableType:
    """Return the rows, what measured points say of the prediction, and notes."""
    dense = "" if curve.dense is None else f", perplexity {curve.dense.perplexity:.2f}"
    title = (
        f"{curve.source}: method {curve.method}, form {curve.form}, keep of the {curve.of}; dense "
        f"{curve.bytes / _MB:,.1f} MB{dense}"
    )
    parts: list[RenderableType] = [table(title, CURVE, [curve_row(point) for point in curve.rows])]
    if curve.measured:
        parts.append(table("the prediction, checked", CHECKS, [check_row(point) for point in curve.measured]))
    parts += [Text(f"note: {remark}") for remark in remarks(curve)]
    if curve.cache is not None:
        taken = [name for name, there in curve.cache.found.items() if there]
        said = f"taken from there: {', '.join(taken)}" if taken else "nothing was there before"
        parts.append(Text(f"cache: {curve.cache.folder}, {math.ceil(curve.cache.bytes / _MB):,} MB; {said}"))
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in curve.seconds.items() if value >= 0.05)
    parts.append(Text(f"losses in nats per token; time: {spent}"))
    return Group(*parts)
