"""The modules of a model that are stored in few bits: find them, put them in, take them out."""

from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .factors import NarrowLinear
from .quant.grid import Grid
from .quant.storage import Storage
from .quant.stored import StoredEmbedding, StoredHead, StoredLinear

StoredModule = StoredLinear | StoredEmbedding | StoredHead


def stored(model: nn.Module) -> dict[str, StoredModule]:
    """Return the stored modules by name, in the order of the model; heads of a stored table among them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StoredModule)}


def store(model: nn.Module, name: str, storage: Storage, codes: Tensor, grid: Grid) -> None:
    """Put the stored module of `codes` on `grid` where the plain nn.Linear or nn.Embedding `name` is.

    An output head that is tied to it then reads the stored table.
    """
    plain = model.get_submodule(name)
    if isinstance(plain, nn.Embedding):
        table = StoredEmbedding.of(plain, storage, codes, grid)
        tied = [
            other for other in models.linear_names(model) if models.find(model, other).weight is plain.weight
        ]
        models.replace(model, name, table)
        for head in tied:
            store_head(model, head, table)
        return
    assert isinstance(plain, nn.Linear)
    models.replace(model, name, StoredLinear.of(plain, storage, codes, grid))


def store_head(model: Any, name: str, table: StoredEmbedding) -> None:
    """Put a head that reads `table` where the head `name` is, and tell transformers that nothing is tied."""
    bias = models.find(model, name).bias
    models.replace(model, name, StoredHead(table, bias))
    ends = {f"{name}.weight"}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        keys = getattr(model, attribute, None) or {}
        setattr(model, attribute, {key: other for key, other in dict(keys).items() if key not in ends})


def unstored(module: StoredLinear | StoredEmbedding, dtype: torch.dtype) -> nn.Linear | nn.Embedding:
    """Return the plain module of the same function, its weight rounded to `dtype`."""
    weight = module.dequantised()
    if isinstance(module, StoredEmbedding):
        sizes = module.num_embeddings, module.embedding_dim
        table = nn.Embedding(*sizes, module.padding_idx, device="meta")
        table.weight = nn.Parameter(weight.to(dtype))
        return table
    made: nn.Linear
    with torch.device("meta"):
        if module.narrow is None:
            made = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        else:
            whole, copies = module.narrow
            made = NarrowLinear(
                module.in_features, module.out_features, module.bias is not None, whole=whole, copies=copies
            )
    made.weight = nn.Parameter(weight.to(dtype))
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().clone())
    return made


def unstore(model: Any) -> Any:
    """Replace every stored module of `model`, in place, by the plain one of the same function."""
    found = stored(model)
    heads = {name: module for name, module in found.items() if isinstance(module, StoredHead)}
    for name, module in found.items():
        if not isinstance(module, StoredHead):
            models.replace(model, name, unstored(module, model.dtype))
    names: dict[nn.Module, str] = {module: name for name, module in found.items()}
    for name, head in heads.items():
        plain = nn.Linear(head.in_features, head.out_features, False, "meta")
        plain.weight = model.get_submodule(names[head.table]).weight
        plain.register_parameter("bias", head.bias)
        models.replace(model, name, plain)
    if heads:
        models.untie(model)
    return model
