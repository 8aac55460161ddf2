"""A model built anew from its class, for a config that says something else: fewer blocks, narrower layers."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from . import declaration, measure, models
from .errors import ModelError
from .models import Target
from .quiet import without_bars

_SAME = 1e-2
# What a class may raise for numbers that it cannot be made of.
_REFUSALS = (
    ValueError, RuntimeError, TypeError, ArithmeticError, AssertionError, AttributeError, LookupError,
    StrictDataclassError,
)  # fmt: skip
_LEAST_LOSS = 1e-6


def names_without(model: nn.Module, dropped: Sequence[str]) -> dict[str, str]:
    """Return block name -> its name when the blocks `dropped` are gone; the others move up."""
    kept = [name for name in models.block_names(model) if name not in set(dropped)]
    return {name: f"{name.rpartition('.')[0]}.{place}" for place, name in enumerate(kept)}


def renamed(name: str, blocks: Mapping[str, str], dropped: Sequence[str]) -> str | None:
    """Return what `name` is called after blocks were dropped, None where it is gone."""
    block = models.owner(name, blocks)
    if block is not None:
        return blocks[block] + name[len(block) :]
    return None if models.owner(name, dropped) else name


def moved(targets: Sequence[Target], model: nn.Module, dropped: Sequence[str]) -> list[Target]:
    """Return the `targets` that are left, under their new names."""
    if not dropped:  # also where there is no list of blocks
        return list(targets)
    blocks = names_without(model, dropped)
    pairs = [(target, renamed(target.name, blocks, dropped)) for target in targets]
    return [replace(target, name=name) for target, name in pairs if name is not None]


def shallower(model: Any, dropped: Sequence[str]) -> Any:
    """Return a copy of the config without the blocks `dropped`; lists with one entry a block are cut."""
    names = models.block_names(model)
    kept = [place for place, name in enumerate(names) if name not in set(dropped)]
    config = copy.deepcopy(model.config)
    inner = config.get_text_config()
    if not dropped:
        return config
    for key, value in vars(inner).items():
        ids = key.endswith(("_id", "_ids")) or key == "architectures"
        if isinstance(value, list) and len(value) == len(names) and not ids:
            setattr(inner, key, [value[place] for place in kept])
    inner.num_hidden_layers = len(kept)
    return config


def fits(kind: type[Any], config: Any, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether a model of class `kind` made from `config` has tensors of these `shapes`."""
    try:
        copied = copy.deepcopy(config)
        if hasattr(copied, "validate"):
            copied.validate()
        with torch.device("meta"):
            skeleton = kind(copied)
    except _REFUSALS:
        return False
    return {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()} == dict(shapes)


def state(model: nn.Module, dropped: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of `model` by their names when the blocks `dropped` are gone."""
    blocks = names_without(model, dropped) if dropped else {}
    pairs = ((renamed(name, blocks, dropped), tensor) for name, tensor in model.state_dict().items())
    return {name: tensor for name, tensor in pairs if name is not None}


def build(model: Any, config: Any, dropped: Sequence[str] = ()) -> Any:
    """Return a model of the class of `model` for `config`, with the tensors of `model`.

    Low-rank and narrow modules are built again; with a config that needs none of them, they become
    plain nn.Linear.

    Raises:
        ModelError: it computes something else than `model` without those blocks.
    """
    with without_bars():
        made = type(model).from_pretrained(
            None, config=config, state_dict=state(model, dropped), dtype=model.dtype
        )
    made = made.to(model.device).eval()
    made.generation_config = model.generation_config
    _check_same(model, made, dropped)
    return made


@torch.no_grad()
def _check_same(model: Any, made: Any, dropped: Sequence[str]) -> None:
    ids = models.probe(model)
    with skipped(model, dropped):
        expected = models.probe_logits(model, ids)
    error = float((models.probe_logits(made, ids) - expected).norm() / expected.norm())
    if not error < _SAME:
        raise ModelError(
            f"{type(model).__name__} made from the smaller config computes something else (relative error "
            f"of the logits {error:.2g}): its config cannot say what was kept; leave out --stock or --depth"
        )


@contextmanager
def skipped(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Let each of `blocks` pass its input on while the context is open."""

    def passing(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [model.get_submodule(name).register_forward_hook(passing, with_kwargs=True) for name in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_blocks(model: Any, dropped: Sequence[str]) -> Any:
    """Return `model`, which may hold low-rank modules, without the blocks `dropped`: a new model."""
    config = shallower(model, dropped)
    declared, blocks = declaration.declare(model), names_without(model, dropped)
    if declared.modules or declared.unfolded:
        modules, unfolded = (
            {
                new: _respelled(spec, blocks, dropped)
                for name, spec in specs.items()
                if (new := renamed(name, blocks, dropped)) is not None
            }
            for specs in (declared.modules, declared.unfolded)
        )
        config.quantization_config = declaration.EckartConfig(
            modules, unfolded=unfolded, format=declared.format
        ).to_dict()
    return build(model, config, dropped)


def _respelled(spec: Mapping[str, Any], blocks: Mapping[str, str], dropped: Sequence[str]) -> dict[str, Any]:
    """Return what is declared of a module with the name of the one that it shares a factor with, now."""
    if "basis" not in spec:
        return dict(spec)
    return {**spec, "basis": renamed(spec["basis"], blocks, dropped)}


def block_losses(
    model: Any, targets: Sequence[Target], rows: Tensor, progress: Callable[[int, int], None]
) -> dict[str, float]:
    """Return what the loss per token on the windows `rows` gains when each block is left out alone.

    The costliest block is not among them, since one has to stay, nor those that `targets` does not hold
    whole. None costs nothing, or it would be left out at any budget.
    """
    names = models.block_names(model)
    whole = measure.perplexity(model, rows).loss
    losses = {}
    for done, name in enumerate(names, 1):
        with skipped(model, [name]):
            losses[name] = max(measure.perplexity(model, rows).loss - whole, _LEAST_LOSS)
        progress(done, len(names))
    costliest = max(names, key=lambda name: losses[name])
    return {name: losses[name] for name in whole_blocks(model, targets) if name != costliest}


def whole_blocks(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Return the blocks of which every linear is among `targets`: those that may be left out."""
    chosen = {target.name for target in targets}
    linears = models.linear_names(model)
    return [
        block
        for block in models.block_names(model)
        if all(name in chosen for name in linears if name.startswith(f"{block}."))
    ]
