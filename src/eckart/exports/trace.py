"""A causal language model of transformers as one ONNX graph with its keys and values as inputs and outputs.

Inputs: input_ids (1, n), keep (k,): the positions whose logits are wanted, past_key_i (1, heads, p, size)
and past_value_i. Outputs: logits (1, k, vocabulary), present_key_i and present_value_i. Heads and sizes may
differ from layer to layer.

transformers has an exporter of its own, whose interface differs between 5.16 and 5.24; its graphs fused for
onnxruntime do not run there where the output head is tied (5.24 and onnxruntime 1.32), hence torch.onnx.
"""

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import ModelError
from ..speed.decoding import cache_word
from . import graph

_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True, slots=True)
class Kept:
    """What one layer keeps of every token: (heads, size) of its keys and of its values."""

    key: tuple[int, int]
    value: tuple[int, int]

    def empty(self, length: int = 0) -> tuple[Tensor, Tensor]:
        """Return keys and values (1, heads, length, size) of zeros."""
        shapes = ((1, heads, length, size) for heads, size in (self.key, self.value))
        key, value = (torch.zeros(shape) for shape in shapes)
        return key, value


@torch.no_grad()
def kept(model: Any) -> tuple[Kept, ...]:
    """Return what each layer of `model` keeps of every token, found by running it.

    Layers that look at a window alone keep all the same: their mask is in the graph.

    Raises:
        ModelError: a layer keeps something else (a recurrent state, an index), or the model keeps nothing.
    """
    cache = DynamicCache(config=model.config)
    word = cache_word(model)
    try:
        model(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=True, **{word: cache})
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(model).__name__} does not run with a cache of keys and values: {error}"
        ) from error
    found = []
    for place, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        if type(layer) not in _PLAIN or keys is None or keys.ndim != 4:
            raise ModelError(
                f"layer {place} of {type(model).__name__} keeps a {type(layer).__name__}: only models all of "
                "whose layers keep keys and values of every token are exported to engines"
            )
        found.append(Kept(*((part.shape[1], part.shape[3]) for part in (layer.keys, layer.values))))
    if not found:
        raise ModelError(f"{type(model).__name__} keeps no keys and values: not exported to engines")
    return tuple(found)


class Flat(nn.Module):
    """A causal model whose cache is a list of tensors: keys and values in turn."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.word = model, cache_word(model)
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, keep: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the logits at `keep`, then keys and values as they are afterwards."""
        cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
        options: dict[str, Any] = {self.word: cache, "use_cache": True}
        if self.keeps:
            options["logits_to_keep"] = keep
        logits = self.model(input_ids=input_ids, **options).logits
        if not self.keeps:
            logits = logits.index_select(1, keep)
        return (logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))


def names(layers: int) -> list[str]:
    """Return what the tensors of the cache are called, after `past_` and `present_`."""
    return [f"{part}_{place}" for place in range(layers) for part in ("key", "value")]


def write(model: Any, layers: Sequence[Kept], path: Path) -> None:
    """Write `model` (float32, on the CPU) to the ONNX file `path`, weights beside it.

    Raises:
        ModelError: torch cannot trace it, or ONNX has not what it does.
    """
    own = names(len(layers))
    past = [part for layer in layers for part in layer.empty(5)]
    free = torch.export.Dim.DYNAMIC
    with _traceable(model), _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                Flat(model),
                (torch.ones(1, 3, dtype=torch.int64), torch.arange(2), past),
                dynamo=True,
                dynamic_shapes=({1: free}, {0: free}, [{2: free} for _ in past]),
                input_names=["input_ids", "keep", *(f"past_{name}" for name in own)],
                output_names=["logits", *(f"present_{name}" for name in own)],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ModelError(f"{type(model).__name__} cannot be exported: {_reason(error)}") from error
    assert program is not None
    graph.write(graph.clean(program.model_proto), path)


def _reason(error: BaseException) -> str:
    """Return the first line of what was wrong at the bottom of `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def _traceable(model: Any) -> Iterator[None]:
    """Let `model` run what exports well while the context is open.

    Both engines decode faster from plain attention than from a decomposed fused one; experts one by one
    depend on the tokens, which a graph cannot.
    """
    attention = model.config._attn_implementation
    experts = getattr(model.config, "_experts_implementation", None)
    model.set_attn_implementation("eager")
    if experts is not None:
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        if experts is not None:
            model.set_experts_implementation(experts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep away what torch says of packages that it does not need; what goes wrong is raised besides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
