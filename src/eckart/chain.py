"""A model's transformer blocks as a chain: hidden states go in, the next block's come out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import models
from .errors import ModelError

_SAME = 1e-3
_ADVICE = "use refinement logits"


@dataclass(frozen=True, slots=True)
class Call:
    """What a block is called with beside its hidden states: masks, positions."""

    by_keyword: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def noted(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Return what a block was called with."""
        others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        return cls(not args, args[1:], others)

    def on(self, block: nn.Module, hidden: Tensor) -> Any:
        """Return all that `block` makes of `hidden`, called so."""
        if self.by_keyword:
            return block(*self.args, hidden_states=hidden, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)


@dataclass(frozen=True, slots=True)
class Chain:
    """The blocks of `model` on windows of one length.

    Args:
        names: of the blocks, in order.
        calls: what else each is called with, the same for every window.
    """

    model: Any
    names: Sequence[str]
    calls: Sequence[Call]

    def block(self, index: int) -> nn.Module:
        """Return block number `index`."""
        found: nn.Module = self.model.get_submodule(self.names[index])
        return found

    def entry(self, window: Tensor) -> Tensor:
        """Return the hidden states (1, seq_len, d) that the first block gets for `window` (seq_len,)."""

        def whole() -> None:
            self.model(input_ids=window[None], use_cache=False)

        return hidden_of(*_reached(self.block(0), whole), _ADVICE).detach()

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Return what block number `index` makes of `hidden` (1, seq_len, d)."""
        return output_of(self.calls[index].on(self.block(index), hidden))

    def reads(self, index: int, hidden: Tensor, names: Sequence[str]) -> list[tuple[str, Tensor]]:
        """Return what each of the modules `names` of block `index` reads, in the order in which they run.

        Modules that read the same tensor get the same object.
        """
        found: list[tuple[str, Tensor]] = []

        def listen(name: str) -> Any:
            return lambda module, args: found.append((name, args[0]))

        handles = [self.model.get_submodule(name).register_forward_pre_hook(listen(name)) for name in names]
        try:
            self.run(index, hidden)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def read(self, index: int, hidden: Tensor, name: str) -> Tensor:
        """Return what the module `name` of block `index` reads, as float32 rows (tokens, n); stop there."""
        args, _ = _reached(self.model.get_submodule(name), lambda: self.run(index, hidden))
        found: Tensor = args[0].detach()
        return found.reshape(-1, found.shape[-1]).float()


class _Reached(Exception):
    """What was asked for was reached."""


def _reached(module: nn.Module, run: Callable[[], object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `module` is called with by `run`, which goes no further."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        found.append((args, kwargs))
        raise _Reached

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any], advice: str) -> Tensor:
    """Return the hidden states that a block is called with.

    Raises:
        ModelError: there are none; `advice` says what to do.
    """
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise ModelError(f"the blocks of this model are not called with hidden states: {advice}")
    return found


def output_of(found: Any) -> Tensor:
    """Return the hidden states among what a block makes of others."""
    first = found[0] if isinstance(found, tuple) else found
    assert isinstance(first, Tensor)
    return first


@contextmanager
def _watching(model: Any, names: Sequence[str]) -> Iterator[tuple[dict[str, Call], list[Tensor]]]:
    """Note what each block is called with, and what comes out of the last."""
    calls: dict[str, Call] = {}
    last: list[Tensor] = []

    def note(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = Call.noted(args, kwargs)

        return before

    blocks = [model.get_submodule(name) for name in names]
    handles = [
        block.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, block in zip(names, blocks, strict=True)
    ]
    handles.append(
        blocks[-1].register_forward_hook(lambda module, args, output: last.append(output_of(output)))
    )
    try:
        yield calls, last
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def chain(model: Any, window: Tensor) -> Chain:
    """Return the chain of `model` for windows as long as `window` (seq_len,).

    Raises:
        ModelError: what goes from block to block is more than the hidden states, so they are no chain.
    """
    names = models.block_names(model)
    with _watching(model, names) as (calls, _):
        model(input_ids=window[None], use_cache=False)
    if len(calls) != len(names):
        raise ModelError("not every block ran: the blocks are no chain, use refinement logits")
    found = Chain(model, names, [calls[name] for name in names])
    other = (window + 1) % models.vocabulary(model)
    hidden = found.entry(other)
    for index in range(len(names)):
        hidden = found.run(index, hidden)
    with _watching(model, names) as (_, expected):
        model(input_ids=other[None], use_cache=False)
    if not torch.allclose(hidden, expected[0], rtol=_SAME, atol=_SAME * float(expected[0].abs().max())):
        raise ModelError(
            f"the blocks of {type(model).__name__} pass on more than hidden states: use refinement logits"
        )
    return found


def matching(own: Chain, other: Chain) -> None:
    """Raise ModelError unless both chains have the same number of blocks."""
    if len(own.names) != len(other.names):
        raise ModelError(
            f"the model has {len(own.names)} blocks and the dense one {len(other.names)}: whole blocks were "
            "left out, and closed and block refinement match block with block; use refinement logits"
        )
