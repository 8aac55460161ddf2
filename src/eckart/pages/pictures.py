"""Charts, heat maps and spectra by matplotlib, for papers and notebooks; without a display."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .parts import Chart, Curve, Grid, Spectra
from .svg import coloured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = Chart | Grid | Spectra
FORMATS = ("png", "svg")
_MARKS = "os^D"
_FLOOR = 1e-8
_SHARES = 60
_DPI = 200


def figure(parts: Sequence[Drawn]) -> "Figure":
    """Return one figure of `parts`, at least one, one below the other.

    Raises:
        ConfigError: matplotlib is not installed, or there is nothing to draw.
    """
    if not parts:
        raise ConfigError("nothing to draw: this result has no figures, print it or take to_frame()")
    made = _empty([_inches(part) for part in parts])
    places = made.subfigures(len(parts), 1, squeeze=False, height_ratios=[_inches(part)[1] for part in parts])
    for place, part in zip(places[:, 0], parts, strict=True):
        _draw(place, part)
    return made


def _empty(sizes: Sequence[tuple[float, float]]) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install 'eckart[report]'") from error
    size = max(width for width, _ in sizes), sum(height for _, height in sizes)
    made = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(made)
    return made


def _inches(part: Drawn) -> tuple[float, float]:
    if isinstance(part, Grid):
        return min(14.0, 3.2 + 0.16 * len(part.columns)), 1.5 + 0.24 * len(part.rows)
    if isinstance(part, Spectra):
        return 4.0 + 3.2 * (len(part.metrics) - 1), 3.8
    return 6.4, 4.0


def write(parts: Sequence[Drawn], folder: Path) -> list[Path]:
    """Write each of `parts` as PNG and SVG into `folder`, and return the files; equal names are numbered.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    made = []
    for part in parts:
        counts[part.name] = counts.get(part.name, 0) + 1
        name = part.name if counts[part.name] == 1 else f"{part.name}-{counts[part.name]}"
        drawn = figure([part])
        for kind in FORMATS:
            path = folder / f"{name}.{kind}"
            # Text stays text, and the same values give the same bytes.
            with _settings({"svg.fonttype": "none", "svg.hashsalt": name}):
                drawn.savefig(path, dpi=_DPI, metadata={"Date": None} if kind == "svg" else None)
            made.append(path)
    return made


def _settings(values: dict[str, Any]) -> Any:
    import matplotlib

    made: Any = matplotlib.rc_context
    return made(values)


def _draw(place: Any, part: Drawn) -> None:
    if isinstance(part, Chart):
        _chart(place.subplots(), part)
    elif isinstance(part, Grid):
        _grid(place, part)
    else:
        _spectra(place, part)


def _chart(axes: Any, made: Chart) -> None:
    for number, series in coloured(made.series):
        xs, ys = [point.x for point in series.points], [point.y for point in series.points]
        colour = "0.4" if number is None else f"C{number}"
        style = "--" if number is None else "-" if series.line else ""
        mark = "" if number is None else _MARKS[number % len(_MARKS)]
        axes.plot(xs, ys, linestyle=style, marker=mark, color=colour, label=series.name)
    axes.set(title=made.title, xlabel=made.x.label, ylabel=made.y.label,
             xscale="log" if made.x.log else "linear", yscale="log" if made.y.log else "linear")  # fmt: skip
    axes.grid(True, color="0.9")
    axes.legend(frameon=False)


def _grid(place: Any, made: Grid) -> None:
    axes = place.subplots()
    values = [
        [
            made.cells[row, column].value if (row, column) in made.cells else math.nan
            for column in made.columns
        ]
        for row in made.rows
    ]
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=made.low, vmax=made.high)
    every = 1 if len(made.columns) <= 12 else 5
    shown = [at for at, column in enumerate(made.columns) if at % every == 0 or not column.isdigit()]
    axes.set_xticks(shown, [made.columns[at] for at in shown])
    axes.set_yticks(range(len(made.rows)), made.rows)
    axes.set(title=made.title, xlabel="layer")
    place.colorbar(image, ax=axes, label=made.unit)


def _spectra(place: Any, made: Spectra) -> None:
    """Draw a panel for each metric: of each kind of matrix, the median over its matrices."""
    panels = place.subplots(1, len(made.metrics), squeeze=False, sharey=True)[0]
    kinds: dict[str, list[Curve]] = {}
    for curve in made.curves:
        kinds.setdefault(curve.kind, []).append(curve)
    for axes, metric in zip(panels, made.metrics, strict=True):
        for kind, own in kinds.items():
            xs, ys = _median([curve.values[metric] for curve in own])
            axes.plot(xs, ys, label=kind)
        axes.set(title=metric, xlabel="share of the rank", xscale="log", yscale="log")
        axes.grid(True, color="0.9")
    panels[0].set_ylabel("singular value / largest, median")
    panels[-1].legend(frameon=False, fontsize=8)


def _median(spectra: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return shares of the rank and the medians there of the values over the largest, above rounding."""
    most = max(map(len, spectra))
    xs, ys = [], []
    for at in range(_SHARES):
        share = most ** (at / (_SHARES - 1)) / most
        found = [
            values[max(1, round(share * len(values))) - 1] / values[0] for values in spectra if values[0]
        ]
        middle = statistics.median(found) if found else 0.0
        if middle > _FLOOR:
            xs.append(share)
            ys.append(middle)
    return xs, ys
