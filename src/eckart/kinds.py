"""The kinds of modules that hold matrices: how each becomes nn.Linear, and the stock module again.

Everything else works on nn.Linear. `unfold` puts modules of nn.Linear that compute the same where a kind of
the table is; `fold` puts the stock module back where nothing was made smaller. What is made smaller keeps
the stock module, without its weights, to become it again when it is dense.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .experts import Experts, emptied, is_stacked, stacked, unstacked
from .factors import NarrowLinear
from .fused import SplitLinear

_STOCK = "eckart_stock"
_PROBE = (5, 3)
_SAME = 1e-9
# nn.MultiheadAttention reads the weight of its output and never calls it.
_NEVER_CALLED = (NonDynamicallyQuantizableLinear,)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of module that is one matrix.

    Args:
        holds: tells whether a module is of this kind.
        weight: returns its matrix (m, n), a view.
        fill: puts a matrix (m, n) into a module of this kind that has none.
    """

    holds: Callable[[nn.Module], bool]
    weight: Callable[[nn.Module], Tensor]
    fill: Callable[[nn.Module, nn.Parameter], None]


def _is_conv1d(module: nn.Module) -> bool:
    return type(module) is Conv1D


def _transposed(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight).T


def _fill_conv1d(module: nn.Module, weight: nn.Parameter) -> None:
    conv: Any = module
    conv.nf, conv.nx = weight.shape
    conv.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)


def _is_linear_by_another_name(module: nn.Module) -> bool:
    """Tell whether a subclass of nn.Linear, with a product of its own, computes what nn.Linear does."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind is nn.Linear or kind.__module__.startswith("eckart."):
        return False
    parts = {name for name, own in module.named_parameters() if own is not None}
    if isinstance(module, _NEVER_CALLED) or not parts <= {"weight", "bias"} or list(module.buffers()):
        return False
    return _agrees(module)


@torch.no_grad()
def _agrees(linear: nn.Linear) -> bool:
    """Compare a module of the class of `linear`, with small weights, with nn.Linear."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        for shape in (_PROBE, (4, 3), (4,))
    )
    small: Any = emptied(linear)
    small.in_features, small.out_features = 3, 4
    small.weight, small.bias = nn.Parameter(weight), None if linear.bias is None else nn.Parameter(bias)
    expected = nn.functional.linear(inputs, weight, small.bias)
    try:
        with torch.device("cpu"):
            found = small(inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    same = isinstance(found, Tensor) and found.shape == expected.shape
    return same and bool((found - expected).abs().max() < _SAME)


def _fill_linear(module: nn.Module, weight: nn.Parameter) -> None:
    linear = cast(nn.Linear, module)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = weight


KINDS = (
    Kind(_is_conv1d, _transposed, _fill_conv1d),
    Kind(_is_linear_by_another_name, lambda module: cast(Tensor, module.weight), _fill_linear),
)

CONTAINERS = (Experts, SplitLinear)


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind that `module` is of, None for nn.Linear itself and what is no matrix."""
    return next((kind for kind in KINDS if kind.holds(module)), None)


def stock(module: nn.Module) -> nn.Module | None:
    """Return the module, without weights, that `module` stands for; None where it is of no kind."""
    found: tuple[nn.Module] | None = vars(module).get(_STOCK)
    return None if found is None else found[0]


def stands_for(new: nn.Module, old: nn.Module) -> nn.Module:
    """Let `new`, which takes the place of `old`, become what `old` was when it is dense; return it."""
    if _STOCK in vars(old):
        vars(new)[_STOCK] = vars(old)[_STOCK]
    return new


def on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of `module` without values: all parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(module, memo)


def containers(module: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, the modules inside of `module` that hold the parts of a stock one."""
    return {name: part for name, part in module.named_modules() if isinstance(part, CONTAINERS)}


def unfold(module: nn.Module) -> nn.Module:
    """Turn every module of a known kind inside of `module`, in place, into nn.Linear that compute the same.

    Weights are views of what was there, also on the meta device. Nothing happens the second time.

    Returns:
        `module`, or what takes its place if it is itself of a known kind.
    """
    stacks = {part: unstacked(part) for part in module.modules() if is_stacked(part)}
    root = _exchanged(module, stacks)
    kinds = {part: kind_of(part) for part in root.modules()}
    return _exchanged(root, {part: _unfolded(part, kind) for part, kind in kinds.items() if kind is not None})


def _unfolded(module: nn.Module, kind: Kind) -> nn.Module:
    """Return the nn.Linear that computes what `module` does."""
    source: Any = module
    weight, bias = kind.weight(module), source.bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
    linear.weight = nn.Parameter(weight.detach(), source.weight.requires_grad)
    linear.bias = bias
    vars(linear)[_STOCK] = (emptied(module),)
    return linear.train(module.training)


def fold(module: nn.Module, narrower: bool = False) -> nn.Module:
    """Put the stock module back, in place, wherever what stands for it is whole.

    Args:
        module: any module.
        narrower: and where it only lost rows or columns.

    Returns:
        `module`, or what takes its place.
    """
    return _refolded(module, (nn.Linear, NarrowLinear) if narrower else (nn.Linear,), {})


def _refolded(
    module: nn.Module, whole: Sequence[type[nn.Module]], known: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module not in known:
        # What is inside of a low-rank module is its own.
        if stock(module) is None or isinstance(module, CONTAINERS):
            for name, child in list(module._modules.items()):
                if child is not None:
                    module._modules[name] = _refolded(child, whole, known)
        made: nn.Module | None = None
        if isinstance(module, Experts):
            made = stacked(module, whole)
        elif isinstance(module, SplitLinear):
            joined = module.joined(whole)
            made = joined if joined is None or stock(module) is None else _folded(stands_for(joined, module))
        elif stock(module) is not None and type(module) in whole:
            made = _folded(module)
        if made is None and isinstance(module, CONTAINERS):
            _own(module)
        known[module] = module if made is None else made
    return known[module]


def _own(module: nn.Module) -> None:
    """Copy weights that are views of something larger, which would stay in memory for them."""
    for parameter in module.parameters():
        if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _folded(module: nn.Module) -> nn.Module:
    linear, known = cast(nn.Linear, module), stock(module)
    assert known is not None
    made: Any = emptied(known)
    kind = kind_of(known)
    assert kind is not None
    kind.fill(made, cast(nn.Parameter, linear.weight))
    made.bias = linear.bias
    trained: nn.Module = made.train(module.training)
    return trained


def _exchanged(module: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put the values of `new` wherever its keys are: a module that two others share stays shared."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                parent._modules[name] = new[child]
    return new.get(module, module)
