"""The modules of a model that are stored in few bits: find them, put them in, take them out."""

from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .embeddings import FactoredEmbedding, FactoredHead
from .factors import NarrowLinear
from .quant.grid import Grid
from .quant.storage import Storage
from .quant.stored import StoredEmbedding, StoredHead, StoredLinear, StoredReturn

StoredModule = StoredLinear | StoredEmbedding | StoredHead | StoredReturn
Tied = StoredHead | StoredReturn


def stored(model: nn.Module) -> dict[str, StoredModule]:
    """Return the stored modules by name, in the order of the model; heads of a stored table among them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StoredModule)}


def store(model: nn.Module, name: str, storage: Storage, codes: Tensor, grid: Grid) -> None:
    """Put the stored module of `codes` on `grid` where the plain nn.Linear or nn.Embedding `name` is.

    An output head that is tied to it then reads what is stored.
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
    heads = [
        f"{other}.up"
        for other, module in model.named_modules()
        if isinstance(module, FactoredHead) and module.up.weight is plain.weight
    ]
    models.replace(model, name, StoredLinear.of(plain, storage, codes, grid))
    for head in heads:
        store_return(model, head, model.get_submodule(name.removesuffix(".up")))


def store_head(model: Any, name: str, table: StoredEmbedding) -> None:
    """Put a head that reads `table` where the head `name` is, and tell transformers that nothing is tied."""
    bias = models.find(model, name).bias
    models.replace(model, name, StoredHead(table, bias))
    _no_longer_tied(model, name)


def store_return(model: Any, name: str, embedding: nn.Module) -> None:
    """Put what reads the stored `up` of a factored `embedding` where `name`, that of its head, is."""
    assert isinstance(embedding, FactoredEmbedding)
    models.replace(model, name, StoredReturn(embedding))
    _no_longer_tied(model, name)


def _no_longer_tied(model: Any, name: str) -> None:
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        keys = getattr(model, attribute, None) or {}
        setattr(
            model, attribute, {key: other for key, other in dict(keys).items() if key != f"{name}.weight"}
        )


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
    names: dict[nn.Module, str] = {module: name for name, module in found.items()}
    tables = {name: names[module.table] for name, module in found.items() if isinstance(module, Tied)}
    for name, module in found.items():
        if not isinstance(module, Tied):
            models.replace(model, name, unstored(module, model.dtype))
    for name, table in tables.items():
        head: Any = found[name]
        weight = model.get_submodule(table).weight
        plain = nn.Linear(weight.shape[1], weight.shape[0], False, "meta")
        plain.weight = weight
        plain.register_parameter("bias", getattr(head, "bias", None))
        models.replace(model, name, plain)
    if any(isinstance(module, FactoredHead) for module in model.modules()):
        models.tie(model)
    elif tables:
        models.untie(model)
    return model
