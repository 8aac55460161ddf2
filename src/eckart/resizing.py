"""More or fewer tokens for a model whose embeddings or output head are factored.

transformers resizes plain tables only. Where one is not plain, `bind` puts the method of this module in the
place of the model's own: factored tables get rows of codes, heads along with them.
"""

from math import ceil
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import models, stores
from .embeddings import FactoredEmbedding, FactoredHead
from .errors import ModelError
from .factors import FactoredLinear, LowRank, PivotedLinear, build

_METHOD = "resize_token_embeddings"


def bind(model: Any) -> None:
    """Let `model` resize by the method of this module where an end of it is not plain, else by its own."""
    vars(model).pop(_METHOD, None)
    if any(not isinstance(end, nn.Embedding | nn.Linear) for end in ends(model) if end is not None):
        vars(model)[_METHOD] = MethodType(resize_token_embeddings, model)


def ends(model: Any) -> tuple[Any, Any]:
    """Return the input embeddings and the output head, None for what there is not."""
    return models.end(model, "get_input_embeddings"), models.end(model, "get_output_embeddings")


@torch.no_grad()
def resize_token_embeddings(
    model: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """Give the embeddings of `model`, and the output head along with them, `new_num_tokens` rows.

    As in transformers, tokens from the end are cut off, and new ones stand at the mean of those that there
    are, which for a factored table is the mean of its codes. Rows that stay are the same bit for bit, but
    for a pivoted head that gets fewer (to rounding). Tied ends stay tied.

    Args:
        model: with factored embeddings, a factored head, or both.
        new_num_tokens: default: as many as there are.
        pad_to_multiple_of: round up to a multiple of this.
        mean_resizing: there is no other way here; False is refused.

    Returns:
        The input embeddings.

    Raises:
        ModelError: an end is stored in few bits, the model's class resizes more than tables, tokens would
            be fewer than the rank, or mean_resizing is False.
    """
    table, head = ends(model)
    _check(model, table, head, mean_resizing)
    count = models.vocabulary(model) if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        count = ceil(count / pad_to_multiple_of) * pad_to_multiple_of
    least = max(getattr(part, "rank", 1) for part in (table, head))
    if count < least:
        raise ModelError(f"{count} tokens are fewer than the rank {least} of the embeddings or the head")
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    if table is not None:
        _resized_table(table, count)
    if head is not None:
        made = _resized_head(head, count, tied=isinstance(head, FactoredHead))
        if made is not head:
            models.replace(model, names[head], made)
    model.config.get_text_config().vocab_size = count
    model.vocab_size = count
    models.tie(model)
    model.tie_weights()
    found: nn.Module = model.get_input_embeddings()
    return found


def _check(model: Any, table: Any, head: Any, mean_resizing: bool) -> None:
    advice = "eckart.densify it, resize, and compress again"
    if any(part in (table, head) or _inside(part, (table, head)) for part in stores.stored(model).values()):
        raise ModelError(f"the embeddings or the head are stored in few bits: to have other tokens, {advice}")
    if not mean_resizing:
        raise ModelError("factored embeddings are resized by their mean: leave out mean_resizing=False")
    own, ties = getattr(type(model), _METHOD), getattr(type(model), "_tied_weights_keys", None) or {}
    if own.__module__ != "transformers.modeling_utils" or any(key.endswith("bias") for key in ties):
        raise ModelError(
            f"{type(model).__name__} resizes more than its embeddings, which are factored here: to have "
            f"other tokens, {advice}"
        )


def _inside(part: nn.Module, owners: tuple[Any, Any]) -> bool:
    return any(part is inner for owner in owners if owner is not None for inner in owner.modules())


def _rows(weight: Tensor, count: int) -> nn.Parameter:
    """Return `weight` with `count` rows: cut off, or with their mean for the new ones."""
    old = weight.detach()
    mean = old.double().mean(0, keepdim=True).to(old.dtype)
    new = torch.cat([old, mean.expand(max(0, count - len(old)), *old.shape[1:])])[:count].clone()
    return nn.Parameter(new, weight.requires_grad)


def _resized_table(table: Any, count: int) -> None:
    codes = table.codes if isinstance(table, FactoredEmbedding) else table
    codes.weight = _rows(codes.weight, count)
    codes.num_embeddings = table.num_embeddings = count
    if codes.padding_idx is not None and codes.padding_idx >= count:
        codes.padding_idx = None


def _resized_linear(linear: nn.Linear, count: int) -> None:
    linear.weight = _rows(linear.weight, count)
    if linear.bias is not None:
        linear.bias = _rows(linear.bias, count)
    linear.out_features = count


def _resized_head(head: Any, count: int, *, tied: bool) -> nn.Module:
    """Return `head` with `count` outputs, changed in place where its form allows."""
    found: nn.Module = head
    if tied:  # its weights are the table's, and become that again
        head.out_features = head.codes.out_features = count
        if head.codes.bias is not None:
            head.codes.bias = _rows(head.codes.bias, count)
    elif isinstance(head, FactoredLinear):
        _resized_linear(head.up, count)
        head.out_features = count
    elif isinstance(head, PivotedLinear):
        found = _resized_pivoted(head, count)
    else:
        _resized_linear(head, count)
    return found


def _resized_pivoted(head: PivotedLinear, count: int) -> PivotedLinear:
    whole, bias = head.map(), head.dense_bias()
    left = torch.cat([torch.eye(head.rank, dtype=whole.rows.dtype), whole.skeleton.multipliers.cpu()])
    left = left[head.order.cpu().to(torch.int64)]  # (m, r): what each output takes of the pivots
    if count < head.out_features:
        rows = LowRank(left[:count].double(), whole.rows.cpu().double())
        made = build(rows, "pivoted", None if bias is None else bias[:count].cpu().double())
        assert isinstance(made, PivotedLinear)
        return made.to(head.pivot.weight.dtype).to(head.pivot.weight.device)
    return head if count == head.out_features else _grown(head, left, bias, count)


def _grown(head: PivotedLinear, left: Tensor, bias: Tensor | None, count: int) -> PivotedLinear:
    """Return `head`, changed in place, with outputs at the end that are the mean of the others."""
    like, extra = head.pivot.weight, count - head.out_features
    mean = left.double().mean(0, keepdim=True)
    rest = head.rest or nn.Linear(head.rank, 0, bias is not None).to(like.dtype).to(like.device)
    rest.weight = nn.Parameter(torch.cat([rest.weight.detach(), mean.to(like).expand(extra, -1)]))
    if bias is not None:
        # What a new output takes of the pivots brings their bias along.
        own = bias.double().mean().cpu() - (mean @ head.pivot.bias.detach().double().cpu())
        rest.bias = nn.Parameter(torch.cat([rest.bias.detach(), own.to(like).expand(extra)]))
    rest.out_features = len(rest.weight)
    head.rest = rest
    order = torch.arange(head.out_features, count, dtype=head.order.dtype, device=head.order.device)
    head.order = torch.cat([head.order, order])
    head.out_features = count
    return head
