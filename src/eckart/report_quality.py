"""What a report says of quality: perplexity, or the loss of models that are no language models."""

from pathlib import Path

from .lessons import learned
from .losses import MeasuredLoss
from .measure import Perplexity
from .modelcard import Figure, perplexity_figure
from .result import Result

Row = tuple[str, str, str, str]
_FEW_TOKENS = 2_000
_FAR_OFF = 1.5


def quality_rows(result: Result) -> list[Row]:
    """Return the rows (what, dense, compressed, change) of the table of quality; empty without data."""
    dense, small = result.dense, result.compressed
    if dense is None or small is None:
        return []
    unit = small.unit if isinstance(small, MeasuredLoss) else "token"
    change = f"{small.loss - dense.loss:+.4f}"
    rows = [(f"loss, nats per {unit}", f"{dense.loss:.4f}", f"{small.loss:.4f}", change)]
    if isinstance(dense, Perplexity) and isinstance(small, Perplexity):
        what = f"perplexity on {small.predicted:,} tokens"
        rows.insert(0, (what, *_compared(dense.perplexity, small.perplexity)))
    if result.predicted_increase is not None:
        rows.append(("  predicted from curvature", "", "", f"{result.predicted_increase:+.4f}"))
    if isinstance(small, MeasuredLoss) and small.error is not None:
        rows.append(("outputs, relative error", "", "", f"{small.error:.4f}"))
    shot = result.one_shot
    if isinstance(dense, Perplexity) and isinstance(shot, Perplexity):
        rows.append(_before_healing(shot.perplexity, dense.perplexity))
    if result.foreign is not None:
        other, now = result.foreign.dense.perplexity, result.foreign.compressed.perplexity
        rows.append(("perplexity on foreign text", *_compared(other, now)))
        if result.healing:
            rows.append(_before_healing(result.foreign.one_shot.perplexity, other))
    return rows


def _compared(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:.2f}", f"{after:.2f}", f"x {after / before:.3f}"


def _before_healing(perplexity: float, dense: float) -> Row:
    return "  before healing", "", f"{perplexity:.2f}", f"x {perplexity / dense:.3f}"


def quality_remarks(result: Result) -> list[str]:
    """Return what a reader must know of how quality was measured."""
    if result.dense is None or result.compressed is None:
        return ["quality was not measured: give text or eval_text"]
    found = [_measured_on(result)]
    if isinstance(result.compressed, MeasuredLoss):
        found += _loss_remarks(result.compressed)
    elif result.compressed.predicted < _FEW_TOKENS:
        found.append(f"{result.compressed.predicted:,} tokens are too few for a reliable perplexity")
    shot = result.one_shot or result.compressed
    increase, predicted = shot.loss - result.dense.loss, result.predicted_increase
    if predicted is not None and increase > _FAR_OFF * predicted:
        found.append(
            "the loss rose far more than predicted: the prediction is of second order, for small losses"
        )
    return found


def _measured_on(result: Result) -> str:
    names = ", ".join(Path(source).name for source in result.recipe.eval_text)
    if not result.held_out:
        return f"measured on {names or 'batches of their own'}"
    if isinstance(result.dense, MeasuredLoss):
        return "measured on the last of the calibration data, which calibration left out"
    return "measured on the last 5 % of the calibration text, which calibration left out"


def _loss_remarks(found: MeasuredLoss) -> list[str]:
    remarks = [f"the loss is {found.meaning}: a mean over {found.terms:,} {found.unit}s"]
    if found.standard_error is not None and found.terms < _FEW_TOKENS:
        remarks.append(f"the standard error of a loss, between batches, is {found.standard_error:.2g}")
    if found.compared < found.batches:
        remarks.append(f"outputs were compared on the first {found.compared} of {found.batches} batches")
    return remarks


def texts_of(result: Result) -> tuple[tuple[str, str], ...]:
    """Return (source, what for) of the texts that a compression used."""
    recipe = result.recipe
    healing = () if recipe.heal is None or not recipe.heal.text else learned(recipe.heal.text)
    return (
        *((source, "calibration") for source in (*recipe.text, *recipe.data)),
        *healing,
        *((source, "measuring") for source in (*recipe.eval_text, *recipe.eval_data, *recipe.foreign_text)),
    )


def figures_of(result: Result) -> tuple[Figure, ...]:
    """Return the figures of the compressed model for the metadata of its card."""
    held_out = ", ".join(Path(source).name for source in result.recipe.text) + ", its end, left out above"
    sources = () if result.held_out else result.recipe.eval_text
    found = perplexity_figure(sources, result.compressed, held_out)
    if result.foreign is not None:
        found += perplexity_figure(result.recipe.foreign_text, result.foreign.compressed, "foreign text")
    return found


def calibration_line(result: Result) -> str:
    """Return what the statistics were made of."""
    with_gradients = f", {result.gradient_tokens:,} of them with gradients" if result.gradient_tokens else ""
    return (
        f"calibration: {result.calibration_tokens:,} {result.calibration_unit}{with_gradients}; moments "
        f"summed in float32, damped by {result.recipe.damp:g} of their mean diagonal"
    )
