"""Embeddings and output head as one matrix, or as two."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import hub, models, running, windows
from .consensus import Member, agree_by_rows
from .embeddings import FactoredEmbedding
from .errors import ConfigError, ModelError
from .factorize import loss_unit, statistics_of
from .joined import Tied
from .linalg import Metric, weighted_error
from .quant.stored import StoredEmbedding, StoredHead
from .recipe import Recipe
from .result import Measured
from .stages import Watch, silent
from .stats import Statistic

_GRAM: Statistic = "gram"
_GRADIENT: Statistic = "gradient"


def is_tied(model: Any) -> bool:
    """Tell whether the embeddings and the output head of `model` are one matrix.

    Raises:
        ModelError: it has no embeddings or no head with a matrix of its own.
    """
    table, head = _ends(model)
    return head.weight is table.weight


def _ends(model: Any) -> tuple[Any, Any]:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    for what, found in (("embeddings", table), ("output head", head)):
        if isinstance(found, FactoredEmbedding | StoredEmbedding | StoredHead):
            raise ModelError(
                f"the {what} of this {type(model).__name__}: low-rank or in few bits; eckart.densify it first"
            )
        if not isinstance(getattr(found, "weight", None), Tensor):
            raise ModelError(f"{type(model).__name__} has no {what} with a matrix of its own: nothing to tie")
    return table, head


def untie(loaded: hub.Loaded) -> Tied:
    """Give the output head of a model a matrix of its own, in place, with the same values.

    Raises:
        ModelError: it has no two such matrices.
    """
    model = loaded.model
    table, head = _ends(model)
    before, done = models.parameter_count(model), "nothing"
    if head.weight is table.weight:
        head.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=table.weight.requires_grad)
        _declare(model, tied=False)
        done = "untied"
    return _result(loaded, done, before, loaded.stored)


def _declare(model: Any, tied: bool) -> None:
    """Tell `model` and its config that embeddings and head are one matrix, or that they are not."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
    models.untie(model)  # to what the class and the config say
    models.tie(model)  # and to what modules share


def _result(loaded: hub.Loaded, done: str, before: int, dtype: torch.dtype, **found: Any) -> Tied:
    rows, width = _ends(loaded.model)[0].weight.shape
    after = models.parameter_count(loaded.model)
    return Tied(
        source=loaded.source,
        done=done,
        vocabulary=rows,
        width=width,
        parameters=(before, after),
        saved=(before - after) * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
        **found,
    )


def tie(recipe: Recipe, loaded: hub.Loaded, watch: Watch | None = None) -> Tied:
    """Make embeddings and output head of a model one matrix, in place: the best for both in their metrics.

    An error e in the row of token t costs f_t e^T C e where it is looked up, and c_t e^T H e where it is a
    logit: f the frequencies, C the gradients of rows, H the inputs of the head, c the squared gradients of
    logits. With equal matrices nothing is fitted, and no text is needed.

    Raises:
        ConfigError: text is missing.
        ModelError: there are no two such matrices, or the class of the model has none that can be tied.
        NotFinite: a weight, a statistic or a logit is NaN or infinite.
    """
    show: Watch = watch or silent
    model = loaded.model
    table, head = _ends(model)
    before = models.parameter_count(model)
    dtype = hub.dtype(recipe.dtype) if recipe.dtype else loaded.stored
    if head.weight is table.weight:
        return _result(loaded, "nothing", before, dtype)
    same = head.weight.shape == table.weight.shape and torch.equal(head.weight, table.weight)
    _check(model, table, head, same)
    if not same:
        recipe.check_text()
    texts = windows.read(recipe, loaded.tokenizer, [])

    def measured(stage: str) -> Measured | None:
        if texts.held_out is None:
            return None
        return running.quality(model, texts.held_out, lambda at, of: show(stage, at, of))

    dense, errors = measured("measure before"), None
    if not same:
        weight, errors = _fit(recipe, model, texts.calibration, lambda at, of: show("calibrate", at, of))
        with torch.no_grad():
            table.weight.copy_(weight.to(dtype))
    head.weight = table.weight
    _declare(model, tied=True)
    if head.weight is not table.weight:
        raise ModelError(
            f"{type(model).__name__} gives its head a matrix of its own again: it cannot be tied"
        )
    now = measured("measure after")
    models.cast(model, dtype)
    method = None if same else recipe.method
    return _result(
        loaded, "tied", before, dtype, method=method, error=errors, dense=dense, compressed=now,
        texts=() if same else tuple((source, "calibration") for source in recipe.text),
    )  # fmt: skip


def _check(model: Any, table: Any, head: Any, same: bool) -> None:
    if not same and (type(table) is not nn.Embedding or type(head) is not nn.Linear):
        raise ModelError(
            f"a {type(table).__name__} and a {type(head).__name__} cannot be fitted: legal are an "
            "nn.Embedding and an nn.Linear"
        )
    if head.weight.shape != table.weight.shape:
        shapes = [" x ".join(map(str, module.weight.shape)) for module in (table, head)]
        raise ModelError(f"embeddings of {shapes[0]} and a head of {shapes[1]} cannot be one matrix")
    if not type(model)._tied_weights_keys:
        raise ModelError(f"{type(model).__name__} cannot say in its config that embeddings and head are tied")


def _fit(
    recipe: Recipe, model: Any, rows: Any, progress: Callable[[int, int], None]
) -> tuple[Tensor, tuple[float, float]]:
    """Return the matrix (v, d) for both, and what it is estimated to cost at each."""
    table, head = _ends(model)
    modules: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    names = [modules[table], modules[head]]
    method = recipe.resolved_method()
    if set(method.statistics()) not in ({"gram", "gradient"}, set()):
        raise ConfigError(
            f"method {recipe.method!r} has no common unit for embeddings and head: use eckart, io-svd, or "
            "svd (the mean of both)"
        )
    calibrated = statistics_of(recipe, model, names, rows, progress)
    count, width = table.weight.shape

    def metric(kind: Statistic, name: str, size: int) -> Metric:
        if not method.needs_text:
            return Metric(size)
        moment = calibrated.stats.moment(kind, name).mean()
        # Tokens are weighted one by one: of a small vocabulary, too, the logits are taken for independent.
        return Metric(size, moment.diagonal() if size == count and moment.ndim == 2 else moment, recipe.damp)

    ends = [
        Member(
            module.weight.detach(),
            metric(inner, name, width),
            metric(outer, name, count),
            loss_unit(method, calibrated, name),
        )
        for module, name, inner, outer in (
            (table, names[0], _GRADIENT, _GRAM),
            (head, names[1], _GRAM, _GRADIENT),
        )
    ]
    weight = agree_by_rows(*ends)
    errors = [end.unit * weighted_error(end.weight - weight, end.inputs, end.outputs) for end in ends]
    return weight, (errors[0], errors[1])
