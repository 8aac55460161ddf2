"""Text for adapters: how it is read, and what it says of the inputs of a model's matrices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import calibrate
from ..linalg import Metric
from ..recipe import Recipe
from ..stages import Watch


def reading(
    text: Sequence[str] = (),
    eval_text: Sequence[str] = (),
    *,
    tokens: int = 32_768,
    eval_tokens: int = 12_288,
    seq_len: int = 512,
    bos: bool = False,
    damp: float = 1e-4,
    seed: int = 0,
) -> Recipe | None:
    """Return how text is read, in the words of eckart.recipe.Recipe; None without any.

    Args:
        text: sources whose second moments of inputs weight what is cut.
        eval_text: sources to measure on; default: the last 5 % of `text`, left out above.
        tokens, eval_tokens, seq_len, bos, damp, seed: as in a recipe.

    Raises:
        ConfigError: a value is not legal.
    """
    if not text and not eval_text:
        return None
    return Recipe(
        keep=1.0, text=tuple(text), eval_text=tuple(eval_text), tokens=tokens, eval_tokens=eval_tokens,
        seq_len=seq_len, bos=bos, damp=damp, seed=seed,
    )  # fmt: skip


def moments(model: Any, rows: Tensor, names: Sequence[str], damp: float, watch: Watch) -> dict[str, Metric]:
    """Return the second moments of the inputs of the modules `names` on the windows `rows`, damped.

    Modules that read the same tensor share one metric, and its roots.
    """
    seen = calibrate.calibrate(
        model, rows, names, ("gram",), gradient_windows=0,
        generator=torch.Generator().manual_seed(0), watch=lambda done, total: watch("calibrate", done, total),
    ).stats  # fmt: skip
    shared: dict[str, Metric] = {}
    for name in names:
        leader = seen.leader(name)
        if leader not in shared:
            moment = seen.moment("gram", name).mean().cpu()
            shared[leader] = Metric(moment.shape[0], moment, damp)
    return {name: shared[seen.leader(name)] for name in names}
