"""A causal language model of which one transformer block at a time is in memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from .. import hub, kinds, models
from ..chain import Call, hidden_of, output_of
from ..errors import ModelError
from .shards import Shards, local

_ADVICE = "leave out --memory"


class _Reached(Exception):
    """What was asked for was reached."""


def skeleton(source: str, compute: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """Return the model of `source` with its parameters on the meta device and its computed buffers in memory.

    Raises:
        ModelError: it is no causal language model, or is compressed already.
    """
    config = hub.load_config(source, trust_remote_code=trust_remote_code)
    hub.check_plain(config, source)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=compute, trust_remote_code=trust_remote_code)
    model.tie_weights()  # making parameters empty has made two of one
    if model.can_generate():
        with suppress(OSError):  # not every model has one of its own
            model.generation_config = GenerationConfig.from_pretrained(local(source))
    return model.eval().requires_grad_(False)


@dataclass(slots=True)
class Stream:
    """The model, its weight files, and how its blocks hang together.

    Args:
        model: a skeleton (see `skeleton`).
        shards: its weight files.
        place: the device to compute on.
    """

    model: Any
    shards: Shards
    place: torch.device
    dtype: torch.dtype = field(init=False)
    names: list[str] = field(init=False)
    table: str = field(init=False)
    head: str | None = field(init=False)
    in_tuple: bool = field(init=False, default=False)
    _width: int = field(init=False, default=0)
    _calls: dict[int, list[Call]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        # The model's own is that of its first parameter, which changes as parts are written.
        self.dtype = self.model.dtype
        self.names = models.block_names(self.model)
        names: dict[Any, str] = {module: name for name, module in self.model.named_modules()}
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.table = names[table]
        # A head of its own: what is tied to the embeddings comes and goes with them.
        self.head = None if head is None or head.weight is table.weight else names[head]

    @property
    def width(self) -> int:
        """The width of the hidden states between the blocks."""
        return self._width

    def probe(self) -> Tensor:
        """Return token ids (length,), always the same, of a length that is known."""
        return torch.arange(min(self._calls)) * 5 % models.vocabulary(self.model)

    def inside(self, index: int) -> list[str]:
        """Return the names of the stored tensors of block number `index`."""
        prefix = f"{self.names[index]}."
        return [name for name in self.model.state_dict() if name.startswith(prefix)]

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Hold block number `index`, its matrices as nn.Linear, in memory while the context is open."""
        found = self._block(index)
        kinds.fold(found)  # files hold the stock modules
        self.shards.load(self.model, self.inside(index))
        kinds.unfold(found).requires_grad_(False).to(self.place)
        try:
            yield found
        finally:
            release(found)

    @contextmanager
    def entrance(self) -> Iterator[None]:
        """Hold what runs before the first block in memory: embeddings, and a head that is tied to them."""
        with self._outside([] if self.head is None else [self.head]):
            yield

    @contextmanager
    def exit(self) -> Iterator[None]:
        """Hold what runs after the last block in memory, the embeddings only if the head is tied to them."""
        with self._outside([] if self.head is None else [self.table]):
            yield

    @contextmanager
    def _outside(self, without: Sequence[str]) -> Iterator[None]:
        prefixes = tuple(f"{name}." for name in (*self.names, *without))
        wanted = [name for name in self.model.state_dict() if not name.startswith(prefixes)]
        self.shards.load(self.model, wanted)
        self.settle()
        try:
            yield
        finally:
            for module in self._modules_outside():
                release(module, recurse=False)
            self.model.tie_weights()

    def settle(self) -> None:
        """Move what is in memory outside of the blocks to the device, and tie what is tied."""
        for module in self._modules_outside():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.device.type != "meta" and parameter.device != self.place:
                    setattr(module, key, nn.Parameter(parameter.to(self.place), requires_grad=False))
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta":
                    setattr(module, key, buffer.to(self.place))
        self.model.tie_weights()

    def _modules_outside(self) -> list[nn.Module]:
        inside = tuple(f"{name}." for name in self.names)
        return [module for name, module in self.model.named_modules() if not f"{name}.".startswith(inside)]

    @contextmanager
    def _stubbed(self, stub: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """Let `stub` stand for every block while the context is open."""
        blocks = list(map(self._block, range(len(self.names))))
        try:
            for index, block in enumerate(blocks):
                block.__dict__["forward"] = lambda *args, _i=index, **kwargs: stub(_i, args, kwargs)
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def enter(self, window: Tensor) -> Tensor:
        """Return the hidden states (1, seq_len, d) that the first block gets for `window` (seq_len,)."""
        found: list[Tensor] = []

        def stop(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
            found.append(hidden_of(args, kwargs, _ADVICE))
            raise _Reached

        with self._stubbed(stop), suppress(_Reached):
            self.model(input_ids=window[None].to(self.place), use_cache=False)
        return found[0]

    def leave(self, hidden: Tensor) -> Tensor:
        """Return the logits (seq_len, v) of what comes out of the last block, `hidden` (1, seq_len, d)."""
        table = self.model.get_submodule(self.table)

        def pass_on(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (hidden,) if self.in_tuple else hidden

        def nothing(ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, table.embedding_dim, dtype=self.model.dtype, device=self.place)

        ids = torch.zeros(1, hidden.shape[1], dtype=torch.int64, device=self.place)
        with self._stubbed(pass_on):
            try:
                table.__dict__["forward"] = nothing
                logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
            finally:
                table.__dict__.pop("forward", None)
        return logits

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Return what block number `index`, in memory, makes of `hidden` (1, seq_len, d)."""
        return output_of(self._calls[hidden.shape[1]][index].on(self._block(index), hidden))

    def _block(self, index: int) -> nn.Module:
        found: nn.Module = self.model.get_submodule(self.names[index])
        return found

    @torch.no_grad()
    def learn(self, lengths: Sequence[int]) -> None:
        """Learn how the blocks are called on windows of these `lengths`.

        Raises:
            ModelError: what goes from block to block is more than the hidden states.
        """
        with self.entrance():
            size = models.vocabulary(self.model)
            probes = [torch.arange(length) * step % size for length in lengths for step in (1, 7)]
            hidden = self.enter(probes[0])
            self._width = hidden.shape[-1]
            (first,) = self._noted(probes[0], 1)
            with self.block(0) as block:
                out = first.on(block, hidden)
            self.in_tuple = isinstance(out, tuple)
            if self.in_tuple and any(isinstance(part, Tensor) for part in out[1:]):
                raise ModelError(self._no_chain())
            for one, other in zip(probes[::2], probes[1::2], strict=True):
                calls = self._noted(one, len(self.names))
                if not _same(calls, self._noted(other, len(self.names))):
                    raise ModelError(self._no_chain())
                self._calls[len(one)] = calls

    def _noted(self, window: Tensor, count: int) -> list[Call]:
        """Return what the first `count` blocks are called with."""
        calls: list[Call] = []
        last: list[Tensor] = []

        def note(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = hidden_of(args, kwargs, _ADVICE)
            if last and hidden is not last[-1]:
                raise ModelError(self._no_chain())
            calls.append(Call.noted(args, kwargs))
            if len(calls) == count:
                raise _Reached
            last.append(hidden.clone())
            return (last[-1],) if self.in_tuple else last[-1]

        with self._stubbed(note):
            try:
                self.model(input_ids=window[None].to(self.place), use_cache=False)
            except _Reached:
                return calls
        raise ModelError(self._no_chain())

    def _no_chain(self) -> str:
        return (
            f"the blocks of {type(self.model).__name__} pass on more than hidden states, so they cannot be "
            "run one at a time: leave out --memory"
        )


def release(module: nn.Module, recurse: bool = True) -> None:
    """Put what is stored on disk of `module` on the meta device; computed buffers stay."""
    for part in module.modules() if recurse else (module,):
        for key, parameter in part.named_parameters(recurse=False):
            setattr(part, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
        for key, buffer in part.named_buffers(recurse=False):
            if key not in part._non_persistent_buffers_set:
                setattr(part, key, buffer.to("meta"))


def _same(one: Any, other: Any) -> bool:
    """Tell whether two calls have equal arguments."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Call):
        return _same([one.by_keyword, one.args, one.kwargs], [other.by_keyword, other.args, other.kwargs])
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other) or (not isinstance(one, int | float | str) and type(one) is type(other))
