"""Show accuracies on tasks. Pure rendering."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from ..render import table
from .scores import Paired, Score, TaskResult, of_tasks

COLUMNS = ("task", "samples", "metric", "guessing", "model", "standard error")
AGAINST = ("reference", "difference, points", "paired error", "gained", "lost", "p")
_NORMAL = 1.96

Rows = list[tuple[str, ...]]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _points(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{100 * value:{sign}.2f}"


def _against(other: Score | None, found: Paired | None) -> tuple[str, ...]:
    if other is None or found is None:
        return ("",) * len(AGAINST)
    gained, lost = ("" if count is None else f"{count:,}" for count in (found.gained, found.lost))
    p = "" if found.p is None else f"{found.p:.3g}"
    figures = (_percent(other.value), _points(found.difference, "+"), _points(found.standard_error))
    return (*figures, gained, lost, p)


def columns(results: Sequence[TaskResult]) -> tuple[str, ...]:
    """Return the columns of `rows`."""
    return (*COLUMNS, *AGAINST) if any(result.reference for result in results) else COLUMNS


def rows(results: Sequence[TaskResult]) -> Rows:
    """Return a row for each metric of each task, and one of the mean of the tasks for what several have."""
    found: Rows = []
    wide = len(columns(results)) > len(COLUMNS)
    for result in results:
        others, differences = result.reference_scores, result.differences
        for metric, own in result.scores.items():
            chance = _percent(result.model.chance) if metric.startswith("acc") else ""
            row = (result.model.task, f"{len(result.model.documents):,}", metric, chance, *_own(own))
            found.append(row + (_against(others.get(metric), differences.get(metric)) if wide else ()))
    return found + _means(results, wide)


def _own(score: Score) -> tuple[str, str]:
    return _percent(score.value), _points(score.standard_error)


def _means(results: Sequence[TaskResult], wide: bool) -> Rows:
    found: Rows = []
    if len(results) < 2:
        return found
    for metric in results[0].scores:
        if not all(metric in result.scores for result in results):
            continue
        count = f"{sum(len(result.model.documents) for result in results):,}"
        chances = [result.model.chance for result in results]
        known = [chance for chance in chances if chance is not None]
        chance = _percent(sum(known) / len(known)) if known and len(known) == len(chances) else ""
        own = of_tasks([result.scores[metric] for result in results])
        row: tuple[str, ...] = ("mean of the tasks", count, metric, chance, *_own(own))
        if wide:
            row += _mean_against(results, metric)
        found.append(row)
    return found


def _mean_against(results: Sequence[TaskResult], metric: str) -> tuple[str, ...]:
    if not all(metric in result.differences for result in results):
        return ("",) * len(AGAINST)
    other = of_tasks([result.reference_scores[metric] for result in results])
    found = of_tasks([result.differences[metric] for result in results])
    return _against(other, Paired(found.value, found.standard_error, None, None, None))


def lines(results: Sequence[TaskResult]) -> list[str]:
    """Return how the figures were got, and what a reader must not overlook."""
    shots = {result.model.shots for result in results}
    how = (
        "zero-shot" if shots == {0} else f"{', '.join(map(str, sorted(shots)))} examples before each question"
    )
    found = [f"{how}, by lm_eval; standard errors in points, over samples"]
    if any(result.reference for result in results):
        found.append(
            "differences are paired: the standard error is that of the mean of the samples' differences; "
            "gained and lost are samples that one of the models alone got right, p is McNemar's exact test"
        )
    for result in results:
        found += _remarks(result)
    return found


def _remarks(result: TaskResult) -> list[str]:
    found, name = [], result.model.task
    if result.model.cut:
        found.append(f"{name}: prompts were longer than the model's window and were cut at their beginning")
    best = result.reference_scores or result.scores
    chance, own = result.model.chance, best.get("acc")
    if chance is not None and own is not None and own.value - _NORMAL * (own.standard_error or 1.0) <= chance:
        whose = "the reference" if result.reference else "the model"
        found.append(
            f"{name}: {whose} is not above guessing by more than the noise: it tells nothing of a loss"
        )
    return found


def tasks_table(results: Sequence[TaskResult]) -> RenderableType:
    """Return what is printed of tasks."""
    notes = (Text(f"note: {line}") for line in lines(results))
    return Group(table("accuracy on tasks", columns(results), rows(results)), *notes)
