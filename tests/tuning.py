"""Small data and settings for the tests of tuning."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart import hub
from eckart.adapt import footprint, tune
from eckart.adapt.attach import Attached
from eckart.adapt.tuned import Tuned
from eckart.adapt.tuning import Tuning

WORDS = ("low", "rank", "matrix", "norm")


def rows(count: int = 40) -> list[dict[str, str]]:
    """Return prompts with completions from which something can be learned."""
    found = []
    for index in range(count):
        word = WORDS[index % len(WORDS)]
        found.append({"prompt": f"{index % 10} {word}", "completion": f" {word[::-1]}"})
    return found


def data(folder: Path, count: int = 40) -> Path:
    """Write them as a .jsonl file."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(count))), encoding="utf-8")
    return path


def settings(path: Path, **changes: Any) -> Tuning:
    """Return settings for a run of a few steps."""
    common: dict[str, Any] = {
        "data": (str(path),), "steps": 6, "batch": 8, "micro": 4, "rank": 4, "evaluations": 3, "hold": 0.2,
        "seq_len": 32, "first_batches": 2, "precision": "float32", "dropout": 0.0, "rate": 1e-2,
    }  # fmt: skip
    return Tuning(**common | changes)


def loaded(model: Any, tokenizer: Any) -> hub.Loaded:
    """Return a copy of `model` as it would come from a folder."""
    return hub.Loaded(copy.deepcopy(model).eval(), tokenizer, "tiny", model.dtype, None)


def run(model: Any, tokenizer: Any, tuning: Tuning, work: Path, **watched: Any) -> tuple[Attached, Tuned]:
    """Tune a copy of `model`, without the estimate of memory, which takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "estimate", lambda *_, **__: {})
        return tune.tune(loaded(model, tokenizer), tuning, work=work, **watched)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of `model` on `ids`, in evaluation mode."""
    found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of everything that learns."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
