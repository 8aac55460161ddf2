"""What is needed around gradient descent on a model: precision, which parameters, adapters, memory."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import models
from .errors import ConfigError, ModelError
from .healing import Healing, Precision, Train
from .shared import common


def is_main() -> bool:
    """Tell whether this process is the one that writes: the first that torchrun started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """Return how many processes torchrun or accelerate launch started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Precise(Protocol):
    """Settings that say what to multiply in."""

    @property
    def precision(self) -> Precision:
        """float32, bfloat16 or auto."""


def precision(settings: Precise, device: torch.device) -> torch.dtype:
    """Return the dtype to multiply in: bfloat16 where the device has it in hardware, if it is not given."""
    if settings.precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = device.type == "cpu" and bool(known.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def around(settings: Precise, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return the context to compute in."""
    dtype = precision(settings, device)
    if dtype == torch.float32:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype)


def trained_names(model: nn.Module, train: Train) -> list[str]:
    """Return the names of the parameters that `train` says.

    Raises:
        ModelError: there is none, since no module of the model was made smaller.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    if train == "all":
        return names
    if train == "blocks":
        blocks = models.block_names(model)
        return [name for name in names if models.owner(name, blocks)]
    smaller = models.low_rank_modules(model)
    if not smaller:
        raise ModelError(
            "no module of the model is low-rank or narrow: nothing to train with train 'factors' or "
            "'adapter'; use train 'blocks' or 'all'"
        )
    return [name for name in names if models.owner(name, smaller)]


@contextlib.contextmanager
def adapted(model: Any, healing: Healing) -> Iterator[Any]:
    """Give a model with a LoRA adapter on the factors, and merge the adapter when the body ends."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("train 'adapter' needs PEFT: pip install 'eckart[peft]'") from error
    trained_names(model, "adapter")
    smaller, rank = models.low_rank_modules(model), healing.adapter_rank
    repeated = common(model)
    everyones = {*repeated, *repeated.values()}
    inner = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (name in smaller or models.owner(name, smaller))
        and f"{name}.weight" not in everyones
    ]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=inner)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(healing.seed)
        adapted = peft.get_peft_model(model, config)
    try:
        yield adapted
    finally:
        adapted.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


@contextlib.contextmanager
def training(model: nn.Module, names: Sequence[str], healing: Healing) -> Iterator[dict[str, nn.Parameter]]:
    """Let the named parameters learn; give everything back as it was. Dropout stays off."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    chosen = set(names)
    modes = {module: module.training for module in model.modules()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    model.eval()
    again = recomputed(model) if healing.checkpointing else contextlib.nullcontext()
    try:
        with again:
            yield {name: parameter for name, parameter in model.named_parameters() if name in chosen}
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Recompute the activations of the blocks on the way back.

    What transformers has for this needs the blocks in training mode, and some drop out then.
    """
    blocks = [model.get_submodule(name) for name in models.block_names(model)]
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        vars(block)["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward
