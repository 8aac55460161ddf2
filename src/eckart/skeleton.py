"""The modules that config.json declares, empty, and whether the weight files fit them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from . import kinds, models, stores
from .declaration import EckartConfig, layout
from .embeddings import FactoredEmbedding, FactoredHead
from .errors import StoreError
from .factors import FORMS, MODULES, FactoredLinear, NarrowLinear, PartialLinear
from .fused import SplitLinear
from .joint import JointLinear
from .quant import storage
from .quant.corrected import CorrectedLinear
from .quant.stored import StoredEmbedding, StoredLinear, empty
from .shared import SharedLinear


def build_skeleton(model: nn.Module, config: EckartConfig) -> None:
    """Put empty low-rank and stored modules into `model` where `config` declares them.

    Raises:
        StoreError: a declared name is not an nn.Linear of the model, or a rank does not fit it.
    """
    _unfold(model, config)
    modules: dict[str, Any] = dict(model.named_modules())
    for name, spec in config.modules.items():
        kind: type[nn.Module] = nn.Embedding if spec["kind"] == FactoredEmbedding.kind else nn.Linear
        if type(modules.get(name)) is not kind:
            raise StoreError(
                f"config.json declares {name}, which is no nn.{kind.__name__} of {type(model).__name__}"
            )
        dense = modules[name]
        with torch.device("meta"):
            module = _MAKERS.get(spec["kind"], _low_rank)(name, dense, spec)
        models.replace(model, name, module.to(dense.weight.dtype))
    for name, spec in config.modules.items():
        if "basis" in spec:
            _share_basis(model, name, spec["basis"])
        if "source" in spec:
            _share_base(model, name, spec["source"])
    models.tie(model)
    for name, stored in config.storage.items():
        if isinstance(stored, str):
            _store(model, name, stored)
    for name, stored in config.storage.items():
        if not isinstance(stored, str):
            _store_head(model, name, stored["table"])


def spare(model: nn.Module, config: EckartConfig) -> None:
    """Keep what holds the declared modules from being initialised by their class.

    Some classes reach for the weights of matrices inside of them, which have other names now. Only modules
    without tensors of their own are spared: these have nothing to initialise.
    """
    modules = dict(model.named_modules())
    for name in {*config.modules, *config.storage, *config.unfolded}:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            holder = modules.get(".".join(parts[:depth]))
            bare = holder is not None and not any(
                tensor is not None for tensor in (*holder._parameters.values(), *holder._buffers.values())
            )
            if bare and not isinstance(holder, PreTrainedModel):
                vars(holder)["_is_hf_initialized"] = True


def _unfold(model: nn.Module, config: EckartConfig) -> None:
    """Unfold what is declared as unfolded, and what is declared as anything else and is of a known kind."""
    named = {*config.unfolded, *config.modules, *config.storage}
    for name in sorted(named, key=lambda name: name.count(".")):  # what holds others comes before them
        module, spec = _found(model, name), config.unfolded.get(name)
        made = None if module is None else kinds.unfold(module)
        if made is not None and made is not module:
            models.replace(model, name, made)
        if spec is None:
            continue
        if spec["kind"] == "split" and type(made) is nn.Linear and layout(spec).fits(made.out_features):
            models.replace(model, name, SplitLinear.of(made, layout(spec)))
        elif spec["kind"] == "split" or made is module:
            raise StoreError(
                f"config.json declares {name} as unfolded to {spec['kind']}, which does not fit "
                f"{'nothing' if module is None else type(module).__name__}: the folder is damaged or mixed"
            )


def _found(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _store(model: nn.Module, name: str, stored: str) -> None:
    """Put an empty stored module where the plain one called `name` is."""
    plain = dict(model.named_modules()).get(name)
    if type(plain) not in (nn.Linear, NarrowLinear, nn.Embedding):
        raise StoreError(
            f"config.json declares {name} as stored, which is no nn.Linear or nn.Embedding of "
            f"{type(model).__name__}"
        )
    assert isinstance(plain, nn.Linear | nn.Embedding)
    with torch.device("meta"):
        models.replace(model, name, empty(plain, storage.get(stored)))


def _store_head(model: Any, name: str, table: str) -> None:
    """Put what reads the stored embeddings `table` where the head, or a part of it, called `name` is."""
    modules = dict(model.named_modules())
    head, owner = modules.get(name), modules.get(table)
    embedding = modules.get(table.removesuffix(".up"))
    if type(head) is nn.Linear and isinstance(owner, StoredLinear) and _is_factored(embedding, owner):
        stores.store_return(model, name, embedding)
        return
    if type(head) is not nn.Linear or not isinstance(owner, StoredEmbedding):
        raise StoreError(
            f"config.json declares {name} as the head of the stored table {table}, and they are a "
            f"{type(head).__name__} and a {type(owner).__name__}: the folder is damaged or mixed"
        )
    stores.store_head(model, name, owner)


def _is_factored(embedding: nn.Module | None, up: nn.Module) -> TypeGuard[FactoredEmbedding]:
    return isinstance(embedding, FactoredEmbedding) and embedding.up is up


def _share_basis(model: nn.Module, name: str, first: str) -> None:
    own, other = model.get_submodule(name), dict(model.named_modules()).get(first)
    if not (
        isinstance(own, FactoredLinear | JointLinear)
        and isinstance(other, type(own))
        and own.down.weight.shape == other.down.weight.shape
    ):
        raise StoreError(f"config.json declares that {name} has the basis of {first}, which does not fit")
    own.down = other.down


def _share_base(model: nn.Module, name: str, first: str) -> None:
    own, other = model.get_submodule(name), dict(model.named_modules()).get(first)
    if not (
        isinstance(own, SharedLinear)
        and isinstance(other, SharedLinear)
        and own.base.weight.shape == other.base.weight.shape
    ):
        raise StoreError(f"config.json declares that {name} shares what {first} has, which does not fit")
    own.base = other.base


def _shared(name: str, dense: nn.Linear, spec: Mapping[str, Any]) -> nn.Module:
    """Return the linear with a base of others that `spec` declares for `dense`, uninitialised."""
    _check_rank(name, dense, spec["rank"])
    base = nn.Linear(dense.in_features, dense.out_features, bias=False)
    return SharedLinear(base, spec["rank"], spec["scaled"], dense.bias is not None)


def _joint(name: str, dense: nn.Linear, spec: Mapping[str, Any]) -> nn.Module:
    """Return the linear with a common right factor that `spec` declares for `dense`, uninitialised."""
    rank, own, biased = spec["rank"], spec.get("own"), dense.bias is not None
    if rank > dense.in_features or (own or 0) > min(rank, dense.out_features):
        raise StoreError(
            f"config.json declares a joint rank {rank}, {own or 0} of them its own, for {name}, which is "
            f"{dense.out_features} x {dense.in_features}: the folder is damaged or mixed"
        )
    down = nn.Linear(dense.in_features, rank, bias=own is not None and biased)
    return JointLinear(down, dense.out_features, own, biased)


def _low_rank(name: str, dense: Any, spec: Mapping[str, Any]) -> nn.Module:
    """Return the low-rank module that `spec` declares for `dense`, uninitialised."""
    rank: int = spec["rank"]
    _check_rank(name, dense, rank)
    if isinstance(dense, nn.Embedding):
        return FactoredEmbedding(dense.num_embeddings, dense.embedding_dim, rank, dense.padding_idx)
    makers: dict[str, type[Any]] = {"head": FactoredHead, **{form: MODULES[form] for form in FORMS}}
    module: nn.Module = makers[spec["kind"]](
        dense.in_features, dense.out_features, rank, dense.bias is not None
    )
    return module


def _corrected(name: str, dense: nn.Linear, spec: Mapping[str, Any]) -> nn.Module:
    """Return the linear with a correction that `spec` declares for `dense`, uninitialised."""
    _check_rank(name, dense, spec["rank"])
    base = nn.Linear(dense.in_features, dense.out_features, dense.bias is not None)
    return CorrectedLinear(base, spec["rank"])


def _check_rank(name: str, dense: Any, rank: int) -> None:
    if rank > min(dense.weight.shape):
        shape = " x ".join(map(str, dense.weight.shape))
        raise StoreError(f"config.json declares rank {rank} for {name}, which is {shape}")


def _narrow(name: str, dense: nn.Linear, spec: Mapping[str, Any]) -> nn.Module:
    """Return the narrow linear that `spec` declares for `dense`, uninitialised."""
    (outputs, inputs), whole = spec["shape"], (dense.out_features, dense.in_features)
    if outputs > whole[0] or inputs > whole[1] or any(size % spec["copies"] for size in (outputs, whole[0])):
        raise StoreError(
            f"config.json declares {name} as {outputs} x {inputs} in {spec['copies']} copies, and it is "
            f"{whole[0]} x {whole[1]}: the folder is damaged or mixed"
        )
    return NarrowLinear(inputs, outputs, dense.bias is not None, whole=whole, copies=spec["copies"])


def _partial(name: str, dense: nn.Linear, spec: Mapping[str, Any]) -> nn.Module:
    """Return the linear with some rows or columns that `spec` declares for `dense`, uninitialised."""
    whole = dense.out_features if spec["side"] == "rows" else dense.in_features
    if spec["kept"] > whole:
        raise StoreError(
            f"config.json declares {spec['kept']} {spec['side']} of {name}, which has {whole}: "
            "the folder is damaged or mixed"
        )
    sizes = dense.in_features, dense.out_features
    return PartialLinear(*sizes, spec["kept"], spec["side"], dense.bias is not None)


_MAKERS: dict[str, Callable[[str, Any, Mapping[str, Any]], nn.Module]] = {
    NarrowLinear.kind: _narrow,
    PartialLinear.kind: _partial,
    CorrectedLinear.kind: _corrected,
    SharedLinear.kind: _shared,
    JointLinear.kind: _joint,
}


def check_files(model: nn.Module, files: list[Path]) -> None:
    """Compare the shapes in the safetensors headers with the skeleton, before anything is allocated.

    Raises:
        StoreError: a low-rank module's tensor is missing or has another shape, a file lies outside
            the folder, or a file is unreadable.
    """
    if len({file.parent for file in files}) > 1 or any(".." in file.parts for file in files):
        raise StoreError(f"the weight files lie in several folders: {', '.join(map(str, files))}")
    held: dict[str, list[int]] = {}
    for file in files:
        held |= read_shapes(file)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    expected = {
        f"{name}.{key}": tensor
        for name, module in {**models.low_rank_modules(model), **stores.stored(model)}.items()
        for key, tensor in module.state_dict().items()
        if f"{name}.{key}" not in tied
    }
    # Some architectures are stored under other names than they have in memory, unless they were built there.
    as_stored = expected.keys() <= held.keys()
    for name, tensor in (expected if as_stored else revert_weight_conversion(model, expected)).items():
        if held.get(name) != list(tensor.shape):
            raise StoreError(
                f"{name} should have shape {list(tensor.shape)} by config.json and has "
                f"{held.get(name) or 'no tensor'} in the weight files: the folder is damaged or mixed"
            )


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Return name -> shape from the header of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: list(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file} is not a readable safetensors file: {error}") from error
