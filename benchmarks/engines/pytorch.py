"""PyTorch: transformers on CPU, its dynamic KV cache, no generate()."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Options, Row
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from eckart import measure

BYTES_OF = "weight files of the folder, as stored"


class Transformers:
    """A transformers model as a harness.Session."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        self.cache = DynamicCache(config=self.model.config)

    def feed(self, ids: Tensor, every: bool) -> Tensor:
        keep = 0 if every else 1
        made = self.model(
            input_ids=ids[None], past_key_values=self.cache, use_cache=True, logits_to_keep=keep
        )
        logits: Tensor = made.logits[0]
        return logits


def rows(folders: list[Path], text: Path, options: Options) -> Iterator[Row]:
    cut = harness.windows(folders[0], text, options)
    dtype = getattr(torch, options.storage)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for folder in folders]
    sessions = [Transformers(model) for model in models]
    speeds = harness.sessions_in_turn(sessions, cut.flatten()[: options.prompt], options)
    for folder, model, own in zip(folders, models, speeds, strict=True):
        yield {
            **harness.row(
                folder,
                own,
                size=harness.weight_bytes(folder),
                size_of=BYTES_OF,
                perplexity=measure.perplexity(model, cut).perplexity,
            ),
            "version": harness.version("torch", "transformers"),
        }
