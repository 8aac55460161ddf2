"""The combinations of one method and storage, measured one after the other, in this process or another."""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import hub, kinds, losses, models, pipeline, points, recipe
from .curving import shelf_of
from .errors import EckartError
from .measure import Perplexity
from .pipeline import Prepared
from .recipe import Recipe
from .speed import run as speed
from .speed.options import Options, Rounds
from .stages import Watch, silent
from .streaming.work import Work
from .sweeps import Combination, Row

ROWS = "rows"
_SHARED = ("measure dense", "calibrate", "try blocks", "factor")
_ROUNDS = Rounds(runs=5, warmup=1)


@dataclass(frozen=True, slots=True)
class Settings:
    """What all combinations of a sweep have in common, as JSON values; see eckart.recipe.Recipe.

    `cache` is a folder, `speed` asks for decoding to be timed, `folder` is that of the sweep.
    """

    folder: str
    recipe: dict[str, Any]
    cache: str | None
    speed: bool

    def recipe_for(self, combination: Combination, device: str | None) -> Recipe:
        """Return the recipe of one combination.

        Raises:
            ConfigError: its parts do not go together.
        """
        own = {} if device is None else {"device": device}
        return recipe.from_mapping({**self.recipe, **combination.settings(), **own}, "sweep")


def load_row(work: Work, combination: Combination, speed: bool) -> Row | None:
    """Return the row of a combination, None where it is not finished: absent, failed, or not timed."""
    name = f"{ROWS}/{combination.name}"
    if not work.has(f"{name}.json"):
        return None
    row = Row(**work.read_json(name))
    return None if speed and row.ok and row.decode_tokens_per_second is None else row


def run_group(
    settings: Settings,
    group: Sequence[Combination],
    device: str | None,
    watch: Watch = silent,
    loaded: hub.Loaded | None = None,
) -> None:
    """Measure the combinations of `group`, of one method and storage, and write their rows as they come.

    What fails by an error of eckart's own has a row that says so; the others are measured all the same.
    """
    work = Work(Path(settings.folder))
    try:
        first = points.at_keep(settings.recipe_for(group[0], device), 1.0)
        known = loaded or pipeline.load_for(first)
        shelf = shelf_of(settings.cache)
        prepared = pipeline.prepare(first, known, watch, shelf=shelf)
    except EckartError as error:
        for combination in group:
            _write(work, _failed(combination, error))
        return
    try:
        shared = sum(prepared.run.seconds.get(stage, 0.0) for stage in _SHARED)
        for combination in group:
            try:
                row = _row(settings, combination, prepared, shared, device, watch)
            except EckartError as error:
                row = _failed(combination, error)
            _write(work, row)
    finally:
        kinds.fold(known.model)


def _write(work: Work, row: Row) -> None:
    work.write_json(f"{ROWS}/{Combination(row.method, row.keep, row.storage).name}", asdict(row))


def _failed(combination: Combination, error: EckartError) -> Row:
    return Row(**asdict(combination), status="failed", error=f"{type(error).__name__}: {error}")


def _row(
    settings: Settings,
    combination: Combination,
    prepared: Prepared,
    shared: float,
    device: str | None,
    watch: Watch,
) -> Row:
    dense = points.check_measurable(prepared)
    own = points.at_keep(settings.recipe_for(combination, device), combination.keep)
    start = time.perf_counter()
    model, result = points.made(own, prepared, watch)
    seconds = time.perf_counter() - start
    assert isinstance(result.compressed, Perplexity)
    return Row(
        **asdict(combination),
        status="ok",
        perplexity=result.compressed.perplexity,
        increase=points.increase(result),
        predicted_increase=result.predicted_increase,
        bytes=result.after.bytes,
        parameters=result.after.model,
        keep_linears=result.keep_linears,
        keep_model=result.keep_model,
        seconds=seconds,
        shared_seconds=shared,
        decode_tokens_per_second=_decode_rate(model, prepared) if settings.speed else None,
        dense_perplexity=dense.perplexity,
        dense_bytes=result.before.bytes,
        dense_parameters=result.before.model,
        device=str(losses.device_of(prepared.loaded.model)),
    )


def _decode_rate(model: Any, prepared: Prepared) -> float:
    """Return the median tokens per second, in the dtype that the dense model is computed in here."""
    models.cast(model, losses.dtype_of(prepared.loaded.model))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 160
    prompt = max(1, min(128, positions - 32))
    found = speed.measure({"model": model}, Options(prompt_tokens=(prompt,), rounds=_ROUNDS))
    return found[0].model.decode.median


def main() -> None:
    """Measure a group that is described on stdin, as JSON; progress goes to stderr."""
    asked = json.load(sys.stdin)
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    group = [Combination(**one) for one in asked["group"]]
    with contextlib.redirect_stdout(sys.stderr):  # code that the model brings may print
        run_group(Settings(**asked["settings"]), group, asked["device"])
