"""Add an adapter to the weights of a model where that is exact; say what does not belong together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import models
from ..embeddings import FactoredEmbedding, FactoredHead
from ..errors import ModelError
from ..factors import FactoredLinear, PivotedLinear
from .store import Adapter, Factors

_SHOWN = 5
_UNCHANGEABLE = (FactoredEmbedding, FactoredHead)


def check(model: nn.Module, adapter: Adapter) -> None:
    """Raise ModelError, with everything that does not fit, unless `adapter` belongs to `model`."""
    modules = dict(model.named_modules())
    tensors = model.state_dict()
    shared = {f"{name}.down" for pair in models.bases(model).items() for name in pair}
    wrong = [
        reason for name, one in adapter.factors.items() if (reason := _misfit(modules, shared, name, one))
    ]
    for name, tensor in adapter.extras.items():
        if name not in tensors:
            wrong.append(f"{name} is no tensor of the model")
        elif tensors[name].shape != tensor.shape:
            wrong.append(f"{name} is {_by(tensors[name].shape)} and {_by(tensor.shape)} in the adapter")
    if wrong:
        raise ModelError(_refusal(model, adapter, wrong))


def _refusal(model: nn.Module, adapter: Adapter, wrong: Sequence[str]) -> str:
    total = len(adapter.factors) + len(adapter.extras)
    listed = "; ".join(wrong[:_SHOWN]) + (f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
    base = f" It was made for {adapter.base}." if adapter.base else ""
    return (
        f"the adapter does not belong to this {type(model).__name__}: {len(wrong)} of its {total} entries do "
        f"not fit: {listed}.{base} Give the model that it was trained on (with tokens added, "
        "model.resize_token_embeddings first)"
    )


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _misfit(modules: Mapping[str, nn.Module], shared: set[str], name: str, one: Factors) -> str | None:
    """Return why `one` cannot be merged into the module `name`, None where it can."""
    module = modules.get(name)
    if module is None:
        return f"there is no {name}"
    if name in shared:
        return f"{name} is shared by several modules and would change all of them"
    inside = [owner for owner, other in modules.items() if isinstance(other, _UNCHANGEABLE)]
    if any(name == owner or name.startswith(f"{owner}.") for owner in inside):
        return (
            f"{name} is part of factored embeddings, which no adapter is merged into: densify the model first"
        )
    shape = _shape(module, one)
    if shape is None:
        wanted = "an embedding" if one.embedding else "a linear map"
        return f"{name} is a {type(module).__name__} and the adapter is of {wanted}"
    if shape != one.shape:
        return f"{name} is {_by(shape)} and {_by(one.shape)} in the adapter"
    if one.bias is not None and _bias(module) is None:
        return f"{name} has no bias and the adapter has one"
    return None


def _shape(module: nn.Module, one: Factors) -> tuple[int, int] | None:
    """Return (m, n) of the map of `module`, None where `one` is no adapter of it."""
    if one.embedding:
        table = isinstance(module, nn.Embedding)
        return (module.embedding_dim, module.num_embeddings) if table else None  # type: ignore[return-value]
    if isinstance(module, nn.Linear | FactoredLinear | PivotedLinear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


def _bias(module: nn.Module) -> Tensor | None:
    if isinstance(module, FactoredLinear | PivotedLinear):
        return module.dense_bias()
    return cast("Tensor | None", getattr(module, "bias", None))


def low_rank(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return the adapted modules that are low-rank maps: there the sum may not fit their rank."""
    modules = dict(model.named_modules())
    return [name for name in adapter.factors if isinstance(modules[name], FactoredLinear | PivotedLinear)]


@torch.no_grad()
def apply(model: Any, adapter: Adapter, watch: Callable[[int, int], None] | None = None) -> None:
    """Merge `adapter` into `model`, in place, where that is exact: everywhere but on low-rank modules.

    Sums are formed in float64 and rounded once. A head that is tied to the embeddings is untied where the
    adapter makes them differ.

    Raises:
        ModelError: they do not belong together.
    """
    check(model, adapter)
    left = set(low_rank(model, adapter))
    state = model.state_dict(keep_vars=True)
    touched = [*adapter.extras, *(f"{name}.weight" for name in adapter.factors)]
    with _untied(model, touched):
        state = model.state_dict(keep_vars=True)
        for name, tensor in adapter.extras.items():
            state[name].copy_(tensor)
        exact = [name for name in adapter.factors if name not in left]
        for done, name in enumerate(exact, 1):
            _add(model.get_submodule(name), adapter.factors[name])
            if watch:
                watch(done, len(exact))


def _add(module: Any, one: Factors) -> None:
    transposed = isinstance(module, nn.Embedding | Conv1D)
    weight = module.weight.detach().to(device="cpu", dtype=torch.float64)
    whole = (weight.T if transposed else weight) + one.delta().cpu()
    if one.magnitude is not None:
        # DoRA (Liu et al. 2024, equation 5): the rows of the sum get the norms that were learned.
        whole *= (one.magnitude.cpu().double() / whole.norm(dim=1))[:, None]
    module.weight.copy_(whole.T if transposed else whole)
    if one.bias is not None:
        module.bias.add_(one.bias.to(module.bias) * one.scale)


@contextmanager
def _untied(model: Any, touched: Sequence[str]) -> Iterator[None]:
    """Give the head a weight of its own while the body changes one or both, and tie them again if equal."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = isinstance(table, nn.Embedding) and head is not None and head.weight is table.weight
    names = {
        name for name, tensor in model.state_dict(keep_vars=True).items() if tied and tensor is table.weight
    }
    if not names & set(touched):
        yield
        return
    head.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=table.weight.requires_grad)
    yield
    if torch.equal(head.weight, table.weight):
        head.weight = table.weight
        return
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {
        own: other for own, other in model.all_tied_weights_keys.items() if not {own, other} <= names
    }
