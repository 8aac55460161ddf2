"""Owner of lm_eval: tasks by name run on a model in memory, what it got on every sample comes out.

lm_eval (Gao et al., the Language Model Evaluation Harness) says what a task is: its prompts, its choices, how
an answer counts. A choice is taken whose log-likelihood after the prompt is the largest (acc), or the
largest divided by the bytes of the choice (acc_norm).
"""

import contextlib
import copy
import difflib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ModelError, NotFinite
from .scores import Outcomes

Progress = Callable[[int, int], None]
BATCH = 16
_CUT = "exceeds model's maximum length"
_SUGGESTIONS = 3


def _package() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError("tasks are run by lm_eval: pip install 'eckart[tasks]'") from error
    return lm_eval


def manager(names: Sequence[str], task_path: str | Path | None = None) -> Any:
    """Return lm_eval's task manager; one that knows `task_path` alone where that has all of `names`.

    Args:
        names: of tasks, groups or tags; globs may be used.
        task_path: a folder of task definitions (YAML).

    Raises:
        ConfigError: no lm_eval, no such folder, no names, or an unknown one.
    """
    _package()
    from lm_eval.tasks import TaskManager

    if not names:
        raise ConfigError("no tasks: name one, or several with commas between them")
    found = None
    if task_path is not None:
        if not Path(task_path).is_dir():
            raise ConfigError(
                f"no folder {task_path}: task_path is a folder of lm_eval's task definitions (YAML)"
            )
        found = TaskManager(include_path=str(task_path), include_defaults=False)
    if found is None or any(not found.match_tasks([name]) for name in names):
        found = TaskManager(include_path=None if task_path is None else str(task_path))
    for name in names:
        if not found.match_tasks([name]):
            near = difflib.get_close_matches(name, found.all_tasks, _SUGGESTIONS)
            advice = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists what there is"
            raise ConfigError(f"no task {name!r}: {advice}; tasks of your own are found by task_path")
    return found


def run(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    known: Any,
    *,
    shots: int = 0,
    limit: int | None = None,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> tuple[Outcomes, ...]:
    """Run the tasks `names` on a causal language model in memory; tasks inside groups come one by one.

    Args:
        model: of transformers, compressed or not; its tokenizer.
        known: the task manager (`manager`).
        shots: examples before each question.
        limit: the first so many samples of each task; default: all.
        batch: rows at once, sorted by length.
        progress: called with (done, total) rows.

    Raises:
        ConfigError: an option is not legal, data cannot be had, or a task has no mean over samples.
        NotFinite: a logit is NaN or infinite.
    """
    for what, value, least in (("shots", shots, 0), ("limit", limit, 1), ("batch", batch, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{what} {value}: must be at least {least}")
    if tokenizer is None:
        raise ModelError("tasks need a tokenizer: pass tokenizer=")
    lm = _counted(model, tokenizer, batch, progress)
    names = [name for given in names for name in known.match_tasks([given])]
    made: dict[str, Outcomes] = {}
    for name in dict.fromkeys(names):
        with _cuts() as cut, _without_bars():
            found = _evaluate(lm, name, known, shots, limit)
        made |= {
            one: _outcomes(one, str(found["versions"].get(one)), found["configs"][one], shots, rows, len(cut))
            for one, rows in found["samples"].items()
        }
    return tuple(made.values())


def _evaluate(lm: Any, name: str, known: Any, shots: int, limit: int | None) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = _package().simple_evaluate(
            lm, tasks=[name], task_manager=known, num_fewshot=shots, limit=limit,
            bootstrap_iters=0, log_samples=True, random_seed=None, numpy_random_seed=None,
            torch_random_seed=None,
        )  # fmt: skip
    except NotFinite:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        said = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"the task {name} cannot be run ({type(error).__name__}: {said}): its data must be cached, on "
            "the hub, or in files that it names"
        ) from error
    return found


def _counted(model: Any, tokenizer: Any, batch: int, progress: Progress | None) -> Any:
    """Return lm_eval's wrapper of `model`, which reports rows, and refuses logits that are not finite."""
    from lm_eval.models.huggingface import HFLM

    real = sys.stderr

    class Counted(HFLM):  # type: ignore[misc]
        done = total = 0

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
            self.done, self.total = 0, len(requests)
            with contextlib.redirect_stderr(real):
                found = super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)
                self.say(self.total)
            return found

        def _model_call(self, inps: Any, *rest: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *rest, **options)
            if not bool(torch.isfinite(logits).all()):
                raise NotFinite(
                    f"{type(model).__name__} in {model.dtype} gives logits that are NaN or infinite: there "
                    "is no accuracy; evaluate in a wider dtype"
                )
            # Rows that share their input are one; so the count may jump at the end.
            self.say(min(self.done + len(inps), self.total))
            return logits

        def say(self, done: int) -> None:
            self.done = done
            if progress and self.total:
                progress(done, self.total)

    with _cuts():  # it warns that a model in memory keeps its device and dtype, which is what is wanted
        # It gives the tokenizer a padding token.
        return Counted(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch, softmax_dtype="float32"
        )


@contextlib.contextmanager
def _cuts() -> Iterator[list[str]]:
    """Keep lm_eval's log to errors, and collect its remarks on samples that were cut."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if _CUT in record.getMessage():
                found.append(record.getMessage())

    logger = logging.getLogger("lm_eval")
    before, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    logger.propagate, logger.handlers = False, [Collect(logging.WARNING)]
    logger.setLevel(logging.WARNING)
    try:
        yield found
    finally:
        logger.propagate, logger.handlers = propagate, handlers
        logger.setLevel(before)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the bars of lm_eval and datasets, which cannot be switched off, from the terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _outcomes(
    name: str,
    version: str,
    config: Mapping[str, Any],
    shots: int,
    samples: Sequence[Mapping[str, Any]],
    cut: int,
) -> Outcomes:
    """Return what was got on each sample, by the metrics that are means of numbers over samples.

    Raises:
        ConfigError: there is no such metric.
    """
    others = _no_means(config)
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    values: dict[str, tuple[float, ...]] = {}
    rows: list[Mapping[str, Any]] = []
    for chosen in filters:
        rows = sorted((one for one in samples if one["filter"] == chosen), key=lambda one: int(one["doc_id"]))
        for metric in rows[0]["metrics"]:
            figures = [row[metric] for row in rows]
            if metric in others or not all(isinstance(one, (int, float)) for one in figures):
                continue
            values[metric if chosen == "none" else f"{metric},{chosen}"] = tuple(map(float, figures))
    if not values:
        has = ", ".join(dict.fromkeys(metric for sample in samples for metric in sample["metrics"]))
        raise ConfigError(
            f"the task {name} has no metric that is a mean over samples (it has {has or 'none'}): there is "
            "nothing to pair; run it by lm_eval itself"
        )
    documents = tuple(str(row["doc_hash"]) for row in rows)
    return Outcomes(name, version, shots, documents, values, _chance(config, rows), cut)


def _no_means(config: Mapping[str, Any]) -> set[str]:
    """Return the metrics of a task that are no means of the figures of its samples."""
    from lm_eval.api.registry import get_metric_aggregation

    found = set()
    for entry in config.get("metric_list") or ():
        how = entry.get("aggregation") or getattr(get_metric_aggregation(entry["metric"]), "__name__", "")
        if how != "mean":
            found.add(str(entry["metric"]))
    return found


def _chance(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    if config.get("output_type") != "multiple_choice":
        return None
    return sum(1 / len(row["filtered_resps"]) for row in rows) / len(rows)
