"""The shapes of the linear maps of a model, without its weights."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from .. import hub, kinds, models, plugin, tasks
from ..adapt import loading
from ..errors import ConfigError, ModelError

Shape = tuple[int, int]


def of_model(source: Any, *, trust_remote_code: bool = False) -> dict[Shape, int]:
    """Return the shapes (m, n) of the linear maps in the blocks of a model, and how many have each.

    Of a compressed model they are the shapes that its architecture has when it is dense. No weights are read.

    Args:
        source: a hub id, a folder, a .gguf file, or a model of transformers.
        trust_remote_code: run the code that the model brings along.

    Raises:
        ModelError: the config cannot be read, or the blocks hold matrices that are not understood.
    """
    blank = _blank(source, trust_remote_code)
    return dict(Counter(target.shape for target in models.targets(kinds.unfold(blank))))


def _blank(source: Any, remote: bool) -> Any:
    if not isinstance(source, (str, Path)):
        with torch.device("meta"):
            return type(source)(_architecture(source.config))
    if loading.is_adapter(source):
        raise ModelError(
            f"{source} is an adapter: give the model that it is on to see the shapes of its maps"
        )
    config = hub.load_config(str(source), trust_remote_code=remote)
    found = hub.task_of(config, str(source), tasks.CAUSAL)
    with torch.device("meta"):
        return found.loader.from_config(_architecture(config), trust_remote_code=remote)


def _architecture(config: Any) -> Any:
    """Return a copy of `config` that says nothing of how weights are stored."""
    plain = plugin.without_guard(copy.deepcopy(config))
    plain.__dict__.pop("quantization_config", None)
    plain.__dict__.pop("attn_implementation", None)
    return plain


def parse(text: str) -> Shape:
    """Return the shape (m, n) that `text`, as 4096x14336, says: outputs by inputs.

    Raises:
        ConfigError: it is not two integers of at least 2.
    """
    parts = text.lower().replace(" ", "").split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or min(map(int, parts)) < 2:
        raise ConfigError(f"shape {text!r}: give outputs x inputs, as 4096x14336, both at least 2")
    return int(parts[0]), int(parts[1])
