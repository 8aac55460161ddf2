"""A calibrated and decomposed model, made once: it serves every budget and every storage."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from eckart import pipeline, recipe, stages
from eckart.pipeline import Prepared


def base(model: str, text: list[str], eval_text: list[str], tokens: int, seq_len: int) -> dict[str, Any]:
    """The recipe of what is prepared, but for its budget; its own measurement is kept short."""
    return {
        "model": model, "text": text, "eval_text": eval_text, "tokens": tokens, "seq_len": seq_len,
        "eval_tokens": seq_len,
    }  # fmt: skip


def made(
    common: Mapping[str, Any], cache: Path, budget: Mapping[str, Any] = MappingProxyType({"size": "1GB"})
) -> tuple[Prepared, float]:
    """Return what is in `cache`, made now where nothing is, and the seconds that it took.

    Storages are to be chosen by `finish`, where `budget` is a size.
    """
    if not cache.is_file():
        own = recipe.from_mapping({**common, **budget})
        start = time.process_time()
        found = pipeline.prepare(own, pipeline.load_for(own), print_progress)
        seconds = time.process_time() - start
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial")
        torch.save((dataclasses.replace(found, run=stages.Run(print_progress)), seconds), partial)
        partial.replace(cache)
    loaded: tuple[Prepared, float] = torch.load(cache, weights_only=False)
    return loaded


def print_progress(stage: str, done: int, total: int) -> None:
    if done in (0, total) or done % max(1, total // 8) == 0:
        print(f"  {stage}: {done} of {total}", flush=True)
