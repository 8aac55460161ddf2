"""A base in NF4 by bitsandbytes, and the low-rank part of the error that this makes."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..errors import ConfigError, ModelError
from ..factors import LowRank
from ..linalg import to_float64
from ..quant import correction
from ..stats import Statistic
from .tuning import Init

CORRECTIONS: dict[Init, str] = {"residual": "qera", "lqer": "lqer", "loftq": "loftq"}
"""By what correction an adapter starts."""
_BLOCK = 64
DAMP = 1e-3
"""Of the metric of the inputs, relative to its mean: the first batches do not span every input."""


def quiet() -> None:
    """Keep bitsandbytes from saying, when it is imported, that a package of kernels is missing: no need."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _bitsandbytes() -> Any:
    quiet()
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError("NF4 needs bitsandbytes: pip install 'eckart[tune]'") from error
    return bitsandbytes


def fits(linear: Any) -> bool:
    """Tell whether `linear` can be stored so that it is read right everywhere: its width is in whole blocks.

    On a CPU bitsandbytes (0.50) counts blocks by the row when it reads what it wrote in one piece: where rows
    do not hold whole blocks, it reads other weights than it wrote.
    """
    return int(linear.in_features) % _BLOCK == 0


@torch.no_grad()
def quantise(model: Any, name: str, *, double: bool, compute: torch.dtype) -> Tensor:
    """Store an nn.Linear of `model`, in place, in NF4 in blocks of 64 (QLoRA, Dettmers et al. 2023).

    Args:
        model: on the device that it will run on.
        name: of the nn.Linear.
        double: quantise the constants of the blocks as well, in blocks of 256.
        compute: dtype of inputs and products.

    Returns:
        The weight (m, n) as it was.

    Raises:
        ConfigError: bitsandbytes is not installed.
        ModelError: no nn.Linear of that name, or its width is not a multiple of 64.
    """
    bnb = _bitsandbytes()
    linear = models.find(model, name)
    if not fits(linear):
        raise ModelError(f"{name} has {linear.in_features} inputs: NF4 takes multiples of {_BLOCK}")
    options = {"compress_statistics": double, "quant_type": "nf4"}
    with torch.device("meta"):
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=compute, **options
        )
    weight = linear.weight.detach()
    made.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, blocksize=_BLOCK, **options)
    made.bias = linear.bias
    # On some CPUs an evaluation would otherwise repack the weight for good: other numbers, which are no
    # longer doubly quantised and which cannot be trained on, and an error unless widths are multiples of 64.
    made.support_avx512bf16_for_cpu = False
    models.replace(model, name, made.to(weight.device))
    model.is_loaded_in_4bit = True  # by this PEFT knows which layers to make
    return weight


def dequantised(module: nn.Module) -> Tensor:
    """Return the weight (m, n) that an NF4 linear map multiplies by.

    Raises:
        ModelError: it is not one.
    """
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ModelError(f"{type(module).__name__} holds no quantised weight")
    found: Tensor = _bitsandbytes().functional.dequantize_4bit(weight.data, state)
    return found


def bits_per_parameter(module: nn.Module) -> float:
    """Return what an NF4 linear map really stores, codebooks and constants included, per parameter."""
    state: Any = getattr(module.weight, "quant_state")  # noqa: B009
    tensors = [module.weight.data, state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset.reshape(1)]
    sizes: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return 8 * sizes / int(state.shape.numel())


def residual(
    weight: Tensor, module: nn.Module, moments: Mapping[Statistic, Tensor], rank: int, method: str = "qera"
) -> LowRank:
    """Return the best rank-`rank` part of W - Q in the metric of `method`, float64 on the CPU.

    L R is what a LoRA on Q starts from to be nearest to W; by default it minimises
    tr((W - Q - L R) H (W - Q - L R)^T), H the second moment of the inputs (QERA-exact, Zhang et al. 2024).

    Args:
        weight: W (m, n) as it was.
        module: the NF4 linear map that holds Q.
        moments: the statistics of its inputs that the method needs.
        rank: at most min(m, n).
        method: a key of eckart.quant.correction.METHODS.
    """
    error = to_float64(weight) - to_float64(dequantised(module))
    shape = (weight.shape[0], weight.shape[1])
    return correction.fit(error, rank, *correction.get(method).metrics(shape, moments, DAMP)).factors
