"""What a budget curve says: plain values, one row per size, predicted and measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from . import prediction
from .errors import ConfigError
from .measure import Perplexity
from .pages.notebook import Shown
from .prediction import Correction

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Point:
    """One size. Increases are of the loss, in nats per token; perplexities are on the held-out text.

    Args:
        keep: the budget, of what the curve counts (`of`), in (0, 1].
        keep_linears, keep_model: parameters after / before, of the treated matrices and of the model.
        parameters: of the whole model.
        bytes: of its weight file in the output dtype; exact where it was measured, else from above by the
            slack of the file's header.
        predicted_increase, predicted_perplexity: by curvature; None for methods without gradients, and
            the perplexity where there is no text to measure the dense model's on.
        corrected_increase, corrected_perplexity: the same, corrected by the measured points.
        measured_increase, measured_perplexity: of a model made at this keep; None where none was.
        left_out_increase: what the correction by all other measured points expects here; None where this
            point was not measured, or is the only one.
        seconds: to make and measure the model; None where none was.
    """

    keep: float
    keep_linears: float
    keep_model: float
    parameters: int
    bytes: int
    predicted_increase: float | None = None
    predicted_perplexity: float | None = None
    corrected_increase: float | None = None
    corrected_perplexity: float | None = None
    measured_increase: float | None = None
    measured_perplexity: float | None = None
    left_out_increase: float | None = None
    seconds: float | None = None

    @property
    def error(self) -> float | None:
        """The measured increase minus the predicted one."""
        if self.measured_increase is None or self.predicted_increase is None:
            return None
        return self.measured_increase - self.predicted_increase


@dataclass(frozen=True, slots=True)
class Use:
    """What the cache did: its folder and size in bytes, and what was asked of it and found there or not."""

    folder: str
    bytes: int
    found: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class BudgetCurve(Shown):
    """Loss against size for one model and method, from one calibration.

    Args:
        source, architecture: of the model.
        method, form, allocation, storage: how it is made smaller.
        of: what `keep` counts, `model` or `linears`.
        dtype: of the output, in which bytes are counted.
        parameters, bytes: of the dense model.
        dense: its perplexity on the held-out text; None without text.
        held_out: whether that text is the end of the one calibrated on.
        rows: by falling keep.
        correction: through the measured points; its knots are (predicted, expected) increases.
        calibration_tokens, gradient_tokens: that the statistics are means over.
        cache: None where there is none.
        seconds: per stage.
        warnings: to be read.
    """

    source: str
    architecture: str
    method: str
    form: str
    allocation: str
    storage: str
    of: str
    dtype: str
    parameters: int
    bytes: int
    dense: Perplexity | None
    held_out: bool
    rows: tuple[Point, ...]
    correction: Correction
    calibration_tokens: int
    gradient_tokens: int
    cache: Use | None
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]

    @property
    def measured(self) -> tuple[Point, ...]:
        """The rows where a model was made and measured."""
        return tuple(row for row in self.rows if row.measured_increase is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values: the fields above, `rows` a list of the fields of `Point`."""
        values = asdict(self)
        for row, point in zip(values["rows"], self.rows, strict=True):
            row["error"] = point.error
        return values | {"rows": list(values["rows"])}

    def to_frame(self) -> Any:
        """Return the rows as a pandas.DataFrame, a column for each field of `Point`.

        Raises:
            ConfigError: pandas is not installed.
        """
        return frame(self.rows)

    def __str__(self) -> str:
        """Show it as a plain text table."""
        from .render import plain
        from .report_curve import curve_tables

        return plain(curve_tables(self))


def frame(rows: Sequence[Any]) -> Any:
    """Return dataclasses of one kind as a pandas.DataFrame.

    Raises:
        ConfigError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ConfigError("to_frame needs pandas: pip install pandas, or use rows or to_dict()") from error
    names = [field.name for field in fields(rows[0])] if rows else []
    return pandas.DataFrame([[getattr(row, name) for name in names] for row in rows], columns=names)


def completed(points: Sequence[Point], dense: Perplexity | None) -> tuple[tuple[Point, ...], Correction]:
    """Return `points`, predicted and here and there measured, with corrections and perplexities put in."""
    pairs = {
        point.keep: (point.predicted_increase, point.measured_increase)
        for point in points
        if point.predicted_increase is not None and point.measured_increase is not None
    }
    correction = prediction.fit(pairs.values())
    left_out = dict(zip(pairs, prediction.left_out(list(pairs.values())), strict=True))
    return tuple(
        _completed(point, dense, correction, left_out.get(point.keep)) for point in points
    ), correction


def _completed(
    point: Point, dense: Perplexity | None, correction: Correction, left_out: float | None
) -> Point:
    if point.predicted_increase is None:
        return point
    corrected = correction.of(point.predicted_increase) if correction.knots else None
    return replace(
        point,
        predicted_perplexity=_perplexity(dense, point.predicted_increase),
        corrected_increase=corrected,
        corrected_perplexity=_perplexity(dense, corrected),
        left_out_increase=left_out,
    )


def _perplexity(dense: Perplexity | None, increase: float | None) -> float | None:
    return None if dense is None or increase is None else dense.perplexity * math.exp(increase)
