"""What any model is called with: batches, and which of their positions are padding."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError

Key = str | int
Call = Mapping[str, Any] | Tensor | Sequence[Any]
"""Keyword arguments, one argument, or positional arguments of one call."""


@dataclass(frozen=True, slots=True)
class Example:
    """A batch of which the model gets the arguments `inputs` only; the rest is for the loss."""

    whole: Call
    inputs: tuple[Key, ...]


Batch = Call | Example
IGNORED = -100
"""The label of what has none, by the convention of transformers and PyTorch."""


@dataclass(frozen=True, slots=True)
class Side:
    """A sequence that goes into a model: the arguments that hold it, and that of its mask.

    Where `labels` is given and there is no mask, the positions after the last label are padding. `signals`
    are contents, too, but sound has other positions than what a model makes of it.
    """

    contents: tuple[Key, ...]
    mask: Key
    labels: Key | None = None
    signals: tuple[Key, ...] = ()

    def content(self, given: Mapping[Key, Any]) -> Key | None:
        """Return the key of the content among the arguments `given`."""
        keys = (*self.contents, *self.signals, *(() if self.labels is None else (self.labels,)))
        return next((key for key in keys if isinstance(given.get(key), Tensor)), None)

    @property
    def name(self) -> str:
        """What the mask is called."""
        return str(self.mask)


FIRST = Side(("input_ids", "inputs_embeds"), "attention_mask", signals=("input_values", "input_features"))
SECOND = Side(("decoder_input_ids", "decoder_inputs_embeds"), "decoder_attention_mask", "labels")


def sides_of(model: nn.Module, masks: Mapping[Key, Key] | None = None) -> tuple[Side, ...]:
    """Return the sequences that `model` reads: the given ones (content -> mask), else those of transformers.

    They stand in the order in which one is made of the other: the encoder's before the decoder's.
    """
    if masks is not None:
        return tuple(Side((content,), mask) for content, mask in masks.items())
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return (FIRST, SECOND) if two else (FIRST,)


def arguments(batch: Batch) -> dict[Key, Any]:
    """Return what is in `batch`, by name or by position."""
    if isinstance(batch, Example):
        return arguments(batch.whole)
    if isinstance(batch, Mapping):
        return {str(key): value for key, value in batch.items()}
    return dict(enumerate([batch] if isinstance(batch, Tensor) else batch))


def call(model: nn.Module, batch: Batch, seed: int = 0) -> Any:
    """Return the outputs of `model` on `batch`; a cache for generation is not made.

    What the model draws (noise, an order, dropout that stays on) is drawn from `seed`, so that two models are
    compared on the same. The generators of PyTorch are as they were afterwards.

    Raises:
        ConfigError: the model cannot be called.
    """
    if getattr(type(model), "forward", None) is nn.Module.forward:
        raise ConfigError(
            f"{type(model).__name__} has no forward: it generates only, and has no outputs to differentiate; "
            "load the models that it is made of, and give these to eckart.compress in Python"
        )
    place = next((value.device for value in model.parameters()), torch.device("cpu"))
    devices = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return _called(model, batch)


def _called(model: nn.Module, batch: Batch) -> Any:
    if isinstance(batch, Example):
        named = isinstance(batch.whole, Mapping)
        given = {key: value for key, value in arguments(batch).items() if key in batch.inputs}
        batch = {str(key): value for key, value in given.items()} if named else list(given.values())
    if not isinstance(batch, Mapping):
        return model(*arguments(batch).values())
    extra = {} if "use_cache" in batch or not takes(model, "use_cache") else {"use_cache": False}
    return model(**batch, **extra)


def takes(model: nn.Module, name: str) -> bool:
    """Tell whether `model` is called with an argument of that name."""
    return name in inspect.signature(model.forward).parameters


def changed(batch: Batch, values: Mapping[Key, Any]) -> Batch:
    """Return `batch` with other arguments at the keys of `values`, in the form that it has."""
    if isinstance(batch, Example):
        return Example(_merged(batch.whole, values), batch.inputs)
    return _merged(batch, values)


def _merged(batch: Call, values: Mapping[Key, Any]) -> Call:
    merged = arguments(batch) | dict(values)
    if isinstance(batch, Mapping):
        return {str(key): value for key, value in merged.items()}
    return tuple(merged.values()) if not isinstance(batch, Tensor) else merged[0]


def moved(batch: Batch, place: torch.device) -> Batch:
    """Return `batch` with its tensors on the device `place`."""
    return changed(batch, {k: v.to(place) for k, v in arguments(batch).items() if isinstance(v, Tensor)})


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return `batch` with its floating-point tensors in `dtype`."""
    found = arguments(batch).items()
    return changed(
        batch, {k: v.to(dtype) for k, v in found if isinstance(v, Tensor) and v.is_floating_point()}
    )


def narrowed(found: Sequence[Call], inputs: Sequence[Key] | None) -> list[Batch]:
    """Return the batches `found`, of which a model gets the arguments `inputs`; default: all.

    Raises:
        ConfigError: a batch lacks one of them, or there are no batches, or no tensors in one.
    """
    check(found)
    if inputs is None:
        return list(found)
    for place, batch in enumerate(found):
        lacking = [key for key in inputs if key not in arguments(batch)]
        if lacking:
            raise ConfigError(
                f"batch {place} has no {lacking[0]!r}, which inputs names: it has "
                f"{', '.join(map(repr, arguments(batch)))}"
            )
    return [Example(batch, tuple(inputs)) for batch in found]


def check(found: Sequence[Call]) -> None:
    """Raise ConfigError unless every batch can be passed to a model and holds a tensor."""
    if not found:
        raise ConfigError("there are no batches: give at least one to calibrate on")
    for place, batch in enumerate(found):
        if isinstance(batch, str | bytes) or not isinstance(batch, Mapping | Tensor | Sequence):
            raise ConfigError(
                f"batch {place} is a {type(batch).__name__}: give a mapping of keyword arguments, a tensor, "
                "or a tuple of positional arguments"
            )
        if not any(isinstance(value, Tensor) for value in arguments(batch).values()):
            raise ConfigError(f"batch {place} holds no tensor: pass what the model is called with")


def as_far_as_both(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors with as many axes, each cut to the length that both have along it."""
    for axis, (own, wanted) in enumerate(zip(one.shape, other.shape, strict=True)):
        shared = min(own, wanted)
        one, other = one.narrow(axis, 0, shared), other.narrow(axis, 0, shared)
    return one, other


def samples(batch: Batch) -> int:
    """Return how many samples `batch` has: the length of its first tensor."""
    tensors = (value for value in arguments(batch).values() if isinstance(value, Tensor) and value.ndim)
    return next((len(tensor) for tensor in tensors), 1)


def masks(batch: Batch, sides: Sequence[Side]) -> dict[str, Tensor]:
    """Return for each of `sides` that `batch` has which positions are real (samples, positions), bool.

    Raises:
        ConfigError: a mask that is not (samples, positions).
    """
    given = arguments(batch)
    found = {side.name: _mask(given, side) for side in sides}
    return {name: mask for name, mask in found.items() if mask is not None}


def _mask(given: Mapping[Key, Any], side: Side) -> Tensor | None:
    mask, key = given.get(side.mask), side.content(given)
    if key is None:
        return None
    content: Tensor = given[key]
    if isinstance(mask, Tensor):
        if mask.ndim != 2:
            raise ConfigError(
                f"{side.mask} has shape {list(mask.shape)}: only (samples, positions) says what is padding"
            )
        return mask != 0
    labels = None if side.labels is None else given.get(side.labels)
    if isinstance(labels, Tensor):
        return (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0 if labels.ndim == 2 else None
    if key not in side.contents or content.ndim != (3 if content.is_floating_point() else 2):
        return None
    return torch.ones(content.shape[:2], dtype=torch.bool, device=content.device)


def tokens(batch: Batch, sides: Sequence[Side]) -> int:
    """Return how many real positions `batch` has; where it has no sequences, its samples."""
    found = masks(batch, sides)
    return sum(int(mask.sum()) for mask in found.values()) if found else samples(batch)


def without_padded_labels(batch: Batch, sides: Sequence[Side]) -> Batch:
    """Return `batch` with no labels where the sequence that they belong to is padding."""
    given, found = arguments(batch), masks(batch, sides)
    labels = given.get("labels")
    real = found.get(sides[-1].name) if sides else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or real is None:
        return batch
    if labels.shape != real.shape or bool(real.all()):
        return batch
    return changed(batch, {"labels": labels.masked_fill(~real.to(labels.device), IGNORED)})


def is_padded(batch: Batch, sides: Sequence[Side]) -> bool:
    """Tell whether some positions of `batch` are padding."""
    return any(not bool(mask.all()) for mask in masks(batch, sides).values())


@torch.no_grad()
def owners(model: nn.Module, batch: Batch, names: Sequence[str], sides: Sequence[Side]) -> dict[str, str]:
    """Return for each of the modules `names` the mask that its rows belong to, where there is one.

    Found by behaviour: a sequence is changed, and the modules whose inputs change depend on it. What
    depends on several belongs to the last of them, since that is made of the others (a decoder's states
    of an encoder's); keys and values of cross attention depend on the encoder's alone.
    """
    before = _traces(model, batch, names)
    owned: dict[str, str] = {}
    for side in sides:
        other = _other(batch, side)
        if other is None:
            continue
        after = _traces(model, other, names)
        owned |= {name: side.name for name in names if before.get(name) != after.get(name)}
    return owned


def _other(batch: Batch, side: Side) -> Batch | None:
    """Return `batch` with other contents of `side`, None where it has none."""
    given = arguments(batch)
    key = side.content(given)
    return None if key is None else changed(batch, {key: _altered(given[key])})


def _altered(content: Tensor) -> Tensor:
    """Return other values that are as legal: those of the neighbours, else zeros or ones."""
    rolled = content.roll(1, -1 if content.ndim <= 2 else 1)
    if not torch.equal(rolled, content):
        return rolled
    return torch.zeros_like(content) if bool(content.any()) else torch.ones_like(content)


def _traces(model: nn.Module, batch: Batch, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Return sums over what each module gets, call by call, which differ where its inputs do."""
    found: dict[str, list[tuple[float, float]]] = {}
    modules = dict(model.named_modules())

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args:
                return
            flat = args[0].detach().double().flatten()
            weights = torch.arange(len(flat), device=flat.device, dtype=flat.dtype).cos()
            found.setdefault(name, []).append((float(flat.sum()), float(flat @ weights)))

        return note

    with _hooked([(modules[name], hook(name)) for name in names]):
        call(model, batch)
    return found


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
