"""Spectra with a rank slider: what is embedded in a page so that every figure it shows is exact."""

import base64
import math
from array import array
from collections.abc import Sequence
from typing import Any

from .html import Html, element, embedded, join
from .html import table as html_table
from .parts import Spectra

POINTS = 280_000
"""Ranks that the sliders of a page stop at, over all matrices and metrics: about 3 MB of text."""
_LEAST = 24
_SHARES = (0.9, 0.95, 0.99)


def stops(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` ranks of 1 to `count`, ascending, with both ends: all if they are not more.

    Else half of them are evenly spread, and half by equal quotients, so that small ranks are all there.
    """
    if count <= wanted:
        return list(range(1, count + 1))
    half = wanted // 2
    even = {1 + round(at * (count - 1) / (half - 1)) for at in range(half)}
    grown = {round(count ** (at / (half - 1))) for at in range(half)}
    return sorted(even | grown)


def errors(values: Sequence[float]) -> list[float]:
    """Return the relative error of every rank 1 .. k: the root of the energy left out (Eckart-Young)."""
    left, tails = 0.0, []
    for value in reversed(values):
        tails.append(left)
        left += value * value
    return [math.sqrt(tail / left) if left else 0.0 for tail in reversed(tails)]


def packed(values: Sequence[float]) -> str:
    """Return float32 values, little-endian, in base64."""
    found = array("f", values)
    if array("H", [1]).tobytes() != b"\x01\x00":
        found.byteswap()
    return base64.b64encode(found.tobytes()).decode("ascii")


def data(made: Spectra, points: int) -> dict[str, Any]:
    """Return what the page's script reads: at the stops of each length, values and relative errors."""
    each = max(_LEAST, points // max(1, len(made.curves) * len(made.metrics)))
    lengths = {len(found) for curve in made.curves for found in curve.values.values()}
    at = {length: stops(length, each) for length in lengths}
    matrices = []
    for curve in made.curves:
        metrics = {}
        for metric, found in curve.values.items():
            own, left = at[len(found)], errors(found)
            metrics[metric] = {
                "values": packed([found[rank - 1] for rank in own]),
                "errors": packed([left[rank - 1] for rank in own]),
                "largest": found[0] if found else 0.0, "count": len(found),
            }  # fmt: skip
        matrices.append(
            {"name": curve.name, "kind": curve.kind, "shape": list(curve.shape), "metrics": metrics}
        )
    return {"metrics": dict(made.metrics), "stops": {str(length): own for length, own in at.items()},
            "matrices": matrices}  # fmt: skip


def rank_at(values: Sequence[float], share: float) -> int:
    """Return the fewest values that hold `share` of the energy."""
    whole, held = math.fsum(value * value for value in values), 0.0
    for at, value in enumerate(values, 1):
        held += value * value
        if held >= share * whole:
            return at
    return len(values)


COLUMNS = ("matrix", "m x n", "metric", "break-even rank", *(f"rank at {share:.0%}" for share in _SHARES),
           "relative error at break-even")  # fmt: skip


def rows(made: Spectra) -> list[tuple[object, ...]]:
    """Return a row for each matrix and metric."""
    found = []
    for curve in made.curves:
        m, n = curve.shape
        even = m * n / (m + n)
        for metric, values in curve.values.items():
            left = errors(values)
            ranks = (rank_at(values, share) for share in _SHARES)
            found.append(
                (
                    curve.name,
                    f"{m} x {n}",
                    metric,
                    round(even, 1),
                    *ranks,
                    left[min(int(even), len(left)) - 1],
                )
            )
    return found


def section(made: Spectra, name: str, points: int) -> Html:
    """Return the choice of matrix and metric, the slider, what it shows, and all of it as a table.

    Args:
        made: the spectra.
        name: an id on the page.
        points: ranks that the slider may stop at, over all matrices and metrics.
    """
    groups: dict[str, list[Html]] = {}
    for at, curve in enumerate(made.curves):
        groups.setdefault(curve.kind, []).append(element("option", {"value": at}, curve.name))
    choices = [element("optgroup", {"label": kind}, *found) for kind, found in groups.items()]
    metrics = [element("option", {"value": key}, f"{key}: {said}") for key, said in made.metrics.items()]
    controls = element(
        "div", {"class": "controls"},
        element("label", {"for": f"{name}-matrix"}, "Matrix"),
        element("select", {"id": f"{name}-matrix"}, *choices),
        element("label", {"for": f"{name}-metric"}, "Metric"),
        element("select", {"id": f"{name}-metric"}, *metrics),
        element("label", {"for": f"{name}-rank"}, "Rank ", element("output", {"data-out": "rank"})),
        element("input", {"type": "range", "id": f"{name}-rank", "min": 0, "max": 0, "value": 0, "step": 1}),
    )  # fmt: skip
    script = "The slider needs JavaScript; the table below has the same figures."
    return join([
        element("div", {"class": "spectra", "id": name}, controls,
                element("div", {"class": "said", "data-out": "said"}),
                element("div", {"class": "scroll", "data-out": "chart"}), _costs(),
                element("noscript", None, element("p", None, script)),
                embedded(f"{name}-data", data(made, points))),
        element("details", None, element("summary", None, "The same as a table"),
                element("div", {"class": "scroll"}, html_table("", COLUMNS, rows(made)))),
    ])  # fmt: skip


def _costs() -> Html:
    """Return the table whose cells the script fills."""
    head = element(
        "tr", None, *(element("th", {"scope": "col"}, one) for one in ("form", "parameters", "of dense"))
    )
    body = [
        element("tr", {"data-form": form}, element("th", {"scope": "row"}, label),
                element("td", {"data-out": f"{form}-parameters"}),
                element("td", {"data-out": f"{form}-share"}))
        for form, label in (
            ("dense", "dense, m n"), ("factored", "factored, r (m + n)"),
            ("pivoted", "pivoted, r (m + n - r)"),
        )
    ]  # fmt: skip
    caption = element("caption", None, "Parameters at this rank")
    return element(
        "table", {"class": "costs"}, caption, element("thead", None, head), element("tbody", None, *body)
    )
