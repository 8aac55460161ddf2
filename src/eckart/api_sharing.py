"""Sharing in a few calls: blocks that share matrices, embeddings and head that are one matrix, or two."""

from pathlib import Path
from typing import Any

from . import api, hub, joining, models, tying
from . import recipe as recipes
from .api import Sources
from .groups import Sharing, Start, What
from .joined import Joined, Tied
from .recipe import Recipe
from .stages import Watch


def _recipe(given: dict[str, Any], where: str) -> Recipe:
    names = ("text", "eval_text", "foreign_text", "exclude")
    lists: dict[str, Any] = {name: api.sources(given[name]) for name in names if name in given}
    return recipes.from_mapping(recipes.override({}, {"keep": 1.0, **given, **lists}), where)


def _loaded(model: Any, tokenizer: Any, resolved: Recipe) -> hub.Loaded:
    by_name = isinstance(model, (str, Path))
    return api.loaded_for(resolved) if by_name else api._given(model, tokenizer)


def _named(model: Any) -> dict[str, str]:
    return {"model": str(model)} if isinstance(model, (str, Path)) else {}


def share(
    model: Any,
    groups: str,
    *,
    what: What = "blocks",
    differences: int = 0,
    scales: bool = False,
    start: Start = "fit",
    method: str | None = None,
    text: Sources | None = None,
    eval_text: Sources | None = None,
    foreign_text: Sources | None = None,
    exclude: Sources | None = None,
    tokens: int | None = None,
    gradient_tokens: int | None = None,
    seq_len: int | None = None,
    eval_tokens: int | None = None,
    damp: float | None = None,
    seed: int | None = None,
    bos: bool | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool | None = None,
    tokenizer: Any = None,
    watch: Watch | None = None,
) -> tuple[Any, Joined]:
    """Let blocks share their matrices: stored once, loaded once, trained once.

    For a trained model, what they share is fitted in the metric of `method` (eckart: of inputs and of output
    gradients on `text`; svd-llm: of inputs; svd: none, and no text, which gives the mean); heal it
    afterwards. For a model that is to be trained from scratch, `start="first"` takes the first block's
    weights for all, and needs no text.

    Args:
        model: a hub id, a folder, a .gguf file, or a model, trained or not, which is changed in place.
        groups, what, differences, scales, start: as in eckart.groups.Sharing.
        exclude: globs on names of matrices that stay as they are.

    The others are as in `compress`.

    Returns:
        The model, which saves and loads like any other, and the result.

    Raises:
        ConfigError: an argument is not legal.
        RankError: differences have a higher rank than a matrix.
        ModelError: the model cannot be loaded or is compressed already, or matrices that should share have
            different shapes.
        NotFinite: a weight, a statistic or a logit is NaN or infinite.
    """
    given = {
        "method": method, "text": text, "eval_text": eval_text, "foreign_text": foreign_text,
        "exclude": exclude, "tokens": tokens, "gradient_tokens": gradient_tokens, "seq_len": seq_len,
        "eval_tokens": eval_tokens, "damp": damp, "seed": seed, "bos": bos, "dtype": dtype, "device": device,
        "trust_remote_code": trust_remote_code, **_named(model),
    }  # fmt: skip
    wanted = Sharing(groups, what, differences, scales, start, 0 if seed is None else seed)
    resolved = _recipe(given, "share")
    joining.check(resolved, wanted)
    return joining.join(resolved, wanted, _loaded(model, tokenizer, resolved), watch)


def tie(
    model: Any,
    *,
    method: str | None = None,
    text: Sources | None = None,
    eval_text: Sources | None = None,
    tokens: int | None = None,
    gradient_tokens: int | None = None,
    seq_len: int | None = None,
    eval_tokens: int | None = None,
    damp: float | None = None,
    seed: int | None = None,
    bos: bool | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool | None = None,
    tokenizer: Any = None,
    watch: Watch | None = None,
) -> tuple[Any, Tied]:
    """Make embeddings and output head one matrix: the best for both in the metric of `method` on `text`.

    Of equal matrices nothing is fitted, and no text is needed; method svd takes the mean. The model stays an
    ordinary one.

    Args:
        model: a hub id, a folder, a .gguf file, or a model, which is changed in place.

    The others are as in `compress`.

    Raises:
        ConfigError: an argument is not legal, or text is missing.
        ModelError: the model cannot be loaded, or has no two matrices that can be one.
        NotFinite: a weight, a statistic or a logit is NaN or infinite.
    """
    given = {
        "method": method, "text": text, "eval_text": eval_text, "tokens": tokens,
        "gradient_tokens": gradient_tokens, "seq_len": seq_len, "eval_tokens": eval_tokens, "damp": damp,
        "seed": seed, "bos": bos, "dtype": dtype, "device": device,
        "trust_remote_code": trust_remote_code, **_named(model),
    }  # fmt: skip
    resolved = _recipe(given, "tie")
    loaded = _loaded(model, tokenizer, resolved)
    return loaded.model, tying.tie(resolved, loaded, watch)


def untie(
    model: Any, *, device: str | None = None, trust_remote_code: bool | None = None, tokenizer: Any = None
) -> tuple[Any, Tied]:
    """Give the output head a matrix of its own with the same values: the logits stay equal bit for bit.

    Args:
        model: a hub id, a folder, a .gguf file, or a model, which is changed in place.
        device: to load it on.
        trust_remote_code: run code that a model brings along.
        tokenizer: of a model in memory.

    Raises:
        ModelError: the model cannot be loaded, or embeddings and head are not two modules with a matrix.
    """
    resolved = _recipe(
        {"device": device, "trust_remote_code": trust_remote_code, "method": "svd", **_named(model)}, "untie"
    )
    loaded = _loaded(model, tokenizer, resolved)
    found = tying.untie(loaded)
    if _named(model):  # it was loaded to compute with
        models.cast(loaded.model, loaded.stored)
    return loaded.model, found
