"""Memory of a training step before it is done: the same step on tensors that have no storage.

The model is copied without its weights (torch's FakeTensorMode) and goes forward and backward on one micro
batch, while every storage that comes and goes is counted. What kernels need inside of them is not seen.
"""

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .. import models
from ..errors import ModelError
from ..stages import silent
from ..training import around, precision, recomputed
from . import attach, quantised, targets
from .tuning import Method, Tuning

_STEPS = 100
"""AdaLoRA wants to know how many; it makes no difference to the memory."""
_BLOCK, _OUTER = 64, 256
"""NF4: values that share a constant, and constants that share one of theirs."""
_REFUSALS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


def estimate(
    model: Any,
    tuning: Tuning,
    ranks: Mapping[str, int],
    rows: int,
    tokens: int,
    *,
    learned: int | None = None,
    passes: int | None = None,
    methods: Sequence[Method] | None = None,
) -> dict[str, dict[str, int]]:
    """Return what a training step needs at most, in bytes, by method.

    Of each method: `weights` (of the model as it is trained), `gradients` and `optimizer` (AdamW's moments,
    AdaLoRA's averages), all exact; `activations`, the most that activations and temporaries take at once; and
    `total`, the peak of everything. The total is less than the sum where gradients come as activations go.

    Args:
        model: a causal language model before anything is attached to it, on the device to train on; meta
            tensors count as on the CPU. It is left alone.
        tuning: the settings; `checkpointing`, `precision`, `packing`, `dropout` and `targets` count.
        ranks: of each matrix to adapt by tuning.method; methods that they are not for take tuning's rank.
        rows, tokens: of the largest micro batch.
        learned: tokens of it that are learned; default: all but the first of each row.
        passes: backward passes a step; default: tuning.batch / tuning.micro.
        methods: default: full, lora, qlora, and tuning's own.

    Raises:
        ConfigError: PEFT is not installed.
        ModelError: what the model computes depends on values, so that it cannot run without them.
    """
    place = torch.device("cpu") if model.device.type == "meta" else model.device
    count = rows * (tokens - 1) if learned is None else learned
    again = (passes or tuning.batch // tuning.micro) > 1
    usual: tuple[Method, ...] = ("full", "lora", "qlora", tuning.method)
    found: dict[str, dict[str, int]] = {}
    for method in dict.fromkeys(methods or usual):
        own = _settings(tuning, method)
        made = _prepared(model, own, _ranks(model, tuning, ranks, method), place)
        try:
            found[method] = _step(made, own, (rows, tokens, count), again, place)
        except _REFUSALS as error:
            raise ModelError(
                f"no estimate of memory: what {type(model).__name__} computes depends on values ({error})"
            ) from error
    return found


def _settings(tuning: Tuning, method: Method) -> Tuning:
    rank = tuning.auto_rank if tuning.rank == "auto" else tuning.rank
    start = tuning.start_rank if method == "adalora" else None
    return replace(
        tuning,
        method=method,
        rank=rank,
        start_rank=start,
        init="default",
        budget=None,
        penalty=None,
        optimizer="adamw",
        optimizer_args=None,
    )


def _ranks(model: Any, tuning: Tuning, ranks: Mapping[str, int], method: Method) -> dict[str, int]:
    if method == "full":
        return {}
    if ranks and (method == "adalora") == (tuning.method == "adalora"):
        return dict(ranks)
    chosen = targets.names(model, tuning.targets, tuning.exclude)
    return dict.fromkeys(chosen, _settings(tuning, method).rank_at_start)


def _prepared(model: Any, own: Tuning, ranks: Mapping[str, int], place: torch.device) -> Any:
    """Return a copy of `model`, on meta tensors, as `own` trains it."""
    made = _copied(model, torch.device("meta"))
    compute = precision(own, place)
    if own.method == "qlora":
        for name in dict.fromkeys([*targets.names(made), *ranks]):
            linear = models.find(made, name)
            if quantised.fits(linear):
                models.replace(made, name, _Nf4(linear, own.double, compute))
        own = replace(own, method="lora")
    with torch.device("meta"):
        attached = attach.attach(
            made, own, ranks, (), steps=_STEPS, passes=1, compute=compute, around=nullcontext,
            watch=silent,
        )  # fmt: skip
    return attached.model.train()


def _copied(model: Any, place: torch.device) -> Any:
    """Return a copy of `model` with empty tensors on `place`, tied ones still tied."""
    memo: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=place)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


class _Nf4(nn.Linear):
    """Takes the memory of a linear map in NF4: bytes that stay, and a weight that comes and goes."""

    def __init__(self, linear: nn.Linear, double: bool, compute: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, False, "meta")
        self.bias, self.compute, self.stored = linear.bias, compute, linear.weight.dtype
        size = nf4_bytes(linear.out_features, linear.in_features, double)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = _Product.apply(inputs.to(self.compute), self)  # type: ignore[no-untyped-call]
        # PEFT clones what a quantised layer returns.
        cloned: Tensor = outputs.to(inputs.dtype).clone()
        return cloned


class _Product(torch.autograd.Function):
    """Multiply by a weight that is made for it, forward and once more backward, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, module: _Nf4) -> Tensor:
        ctx.module = module
        weight = inputs.new_empty(module.out_features, module.in_features)
        return F.linear(inputs, weight, None if module.bias is None else module.bias.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        shape = (ctx.module.out_features, ctx.module.in_features)
        weight = gradient.new_empty(shape, dtype=ctx.module.stored).to(gradient.dtype)
        return gradient @ weight, None


def nf4_bytes(m: int, n: int, double: bool) -> int:
    """Return what bitsandbytes stores for a weight (m, n) in NF4 in blocks of 64, codebooks included.

    Four bits a value and 32 a block; doubly quantised, 8 a block, 32 for each 256 blocks and one offset.
    """
    blocks = math.ceil(m * n / _BLOCK)
    codebook, outer = 16 * 4, 256 * 4
    constants = blocks + 4 * math.ceil(blocks / _OUTER) + outer + 4 if double else 4 * blocks
    return math.ceil(m * n / 2) + codebook + constants


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that live, and the most that lived at once.

    Gradients count apart, from when they are a parameter's own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: Any = WeakIdKeyDictionary()
        self.passing = self.kept = self.most_passing = self.most = 0

    def add(self, tensor: Tensor, *, count: bool = True) -> None:
        """Watch the storage of `tensor`; one that is there from the start is not counted."""
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        cell = [storage.nbytes() if count else 0, 0]
        self.known[storage] = cell
        weakref.finalize(storage, self._gone, cell).atexit = False
        self.passing += cell[0]
        self._mark()

    def keep(self, parameter: Tensor) -> None:
        """Take the gradient of `parameter` for one of those that stay."""
        assert parameter.grad is not None
        cell = self.known[parameter.grad.untyped_storage()]
        self.passing, self.kept = self.passing - cell[0], self.kept + cell[0]
        cell[:] = [0, cell[0] + cell[1]]

    def _gone(self, cell: list[int]) -> None:
        self.passing, self.kept = self.passing - cell[0], self.kept - cell[1]

    def _mark(self) -> None:
        self.most_passing = max(self.most_passing, self.passing)
        self.most = max(self.most, self.passing + self.kept)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return outputs


def _step(
    made: Any, own: Tuning, sizes: tuple[int, int, int], again: bool, place: torch.device
) -> dict[str, int]:
    """Return the bytes of a step of `made`, which is on meta tensors."""
    rows, tokens, learned = sizes
    with FakeTensorMode():
        model = _copied(made, place)
        state = [*model.parameters(), *model.buffers()]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        batch = _batch(rows, tokens, own.packing, place)
        if again:  # gradients stay from one pass to the next
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        live = _Live()
        for tensor in [*state, *batch.values(), *(parameter.grad for parameter in trained if again)]:
            live.add(tensor, count=False)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(live.keep)
        with live, recomputed(_inner(model)) if own.checkpointing else nullcontext():
            _pass(model, batch, learned, around(own, place))
    gradients = _bytes(trained)
    moments, temporary = _optimizer(own, trained, place)
    most = live.most + (gradients if again else 0)
    weights = _bytes(state)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": moments,
        "activations": live.most_passing,
        "total": weights + moments + max(most, gradients + temporary),
    }


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _batch(rows: int, tokens: int, packing: bool, place: torch.device) -> dict[str, Tensor]:
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device=place)
    if not packing:
        return {"input_ids": ids}
    # What transformers makes of positions that begin anew; it looks at their values for that.
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=place)
    return {"input_ids": ids, "position_ids": torch.zeros_like(ids), "attention_mask": mask}


def _pass(model: Any, batch: Mapping[str, Tensor], learned: int, within: Callable[[], Any]) -> None:
    """Go forward and backward as the trainer does: logits for learned tokens alone, the loss in float32."""
    targets_of_rows = torch.zeros(learned, dtype=torch.int64, device=batch["input_ids"].device)
    with _head_at(model, learned):
        with within():
            logits = model(**batch, use_cache=False).logits
        logits = logits.float()
        loss = F.cross_entropy(logits, targets_of_rows, reduction="none").sum()
    del logits
    loss.backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _head_at(model: Any, learned: int) -> Iterator[None]:
    """Let the head see `learned` states alone (losses.head_at chooses them by values, which are not here)."""

    def chosen(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        states = given[0]
        places = torch.zeros(learned, dtype=torch.int64, device=states.device)
        return (states.flatten(0, -2)[places], *given[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        handle.remove()


def _optimizer(own: Tuning, trained: list[Tensor], place: torch.device) -> tuple[int, int]:
    """Return the bytes that AdamW holds, and those that a step of it needs besides.

    On a CPU it goes from tensor to tensor, with a root of the second moment and its quotient; elsewhere it
    takes all roots at once.
    """
    size = _bytes(trained)
    held = 2 * size + 4 * len(trained)  # two moments, and the count of steps of each tensor
    if own.method == "adalora":
        held += 3 * size  # PEFT's allocator: importance, its average and its uncertainty
    sizes = [parameter.numel() * parameter.element_size() for parameter in trained]
    return held, 2 * max(sizes) if place.type == "cpu" else size


def _bytes(tensors: list[Tensor]) -> int:
    storages = {id(tensor.untyped_storage()): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
