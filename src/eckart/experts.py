"""Experts whose matrices are stacked in 3-D parameters, as a module that holds an nn.Linear for each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
_SAME = 1e-9
_TOKENS, _CHOICES = 24, 2
_OUTER, _INNER = 10, 6


class Expert(nn.Module):
    """One expert: `gate_up` (or `up`), what the stacked module has between its matrices, and `down`.

    Args:
        first, down: its two maps.
        stacked: the stacked module, without its weights.
    """

    def __init__(self, first: nn.Module, down: nn.Module, stacked: nn.Module) -> None:
        super().__init__()
        self.first = _first(stacked)
        self.add_module(self.first, first)
        self.down = down
        self.stacked = (stacked,)  # in a tuple: no submodule, it has no weights

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (tokens, d) to (tokens, d)."""
        stacked: Any = self.stacked[0]
        hidden = self.get_submodule(self.first)(inputs)
        between = stacked._apply_gate if stacked.has_gate else stacked.act_fn
        return cast(Tensor, self.down(between(hidden)))

    def probe(self) -> Callable[[], Tensor]:
        """Return what gives its outputs, as it is then, on always the same random numbers."""
        weight = next(self.parameters())
        generator = torch.Generator().manual_seed(0)
        width = cast(Any, self.get_submodule(self.first)).in_features
        inputs = torch.randn(_TOKENS, width, generator=generator, device="cpu").to(weight)
        return lambda: self(inputs)


class Experts(nn.Module):
    """Experts one by one: every token goes to those that the router chose for it.

    While an expert runs, what listens to its maps finds the rows of `hidden_states` that it got in their
    attribute `routed` (eckart.stats.collect).

    Args:
        each: the experts.
        stacked: the stacked module that they are from, without its weights.
    """

    def __init__(self, each: Sequence[Expert], stacked: nn.Module) -> None:
        super().__init__()
        self.each = nn.ModuleList(each)
        self.stacked = (stacked,)

    @property
    def first(self) -> str:
        """The name of the first map of each expert."""
        return _first(self.stacked[0])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum (tokens, d) of what the chosen experts make of each token.

        Args:
            hidden_states: (tokens, d).
            top_k_index: (tokens, k), the experts of each token; an index beyond the last one is none.
            top_k_weights: (tokens, k), how much each of them counts.
        """
        total = torch.zeros_like(hidden_states)
        for index in sorted(set(top_k_index.flatten().tolist())):
            if index >= len(self.each):
                continue
            choices, rows = torch.where(top_k_index.T.eq(index))
            expert = cast(Expert, self.each[index])
            with _routed(expert, rows):
                found = expert(hidden_states[rows]) * top_k_weights[rows, choices, None]
            total.index_add_(0, rows, found.to(total.dtype))
        return total


class _routed:
    """Tell what listens to the modules of an expert which rows it gets."""

    def __init__(self, expert: nn.Module, rows: Tensor) -> None:
        self.heard = [module for module in expert.modules() if module._forward_hooks]
        self.rows = rows

    def __enter__(self) -> None:
        for module in self.heard:
            vars(module)["routed"] = self.rows

    def __exit__(self, *error: object) -> None:
        for module in self.heard:
            del vars(module)["routed"]


def _first(stacked: Any) -> str:
    return "gate_up" if stacked.has_gate else "up"


def names(stacked: nn.Module) -> tuple[str, str]:
    """Return the names of the two stacked matrices; those of their biases end in _bias."""
    return f"{_first(stacked)}_proj", "down_proj"


def is_stacked(module: nn.Module) -> bool:
    """Tell whether `module` holds the matrices of experts as 3-D parameters, in a way that is understood.

    Structure first (what transformers' interface of experts says of a class), then behaviour: the same
    code, on small matrices of random numbers, must compute what `Experts` does.
    """
    if not all(hasattr(module, flag) for flag in _FLAGS) or getattr(module, "has_post_expert_norm", False):
        return False
    wanted = set(_parameters(module))
    own = {name for name, parameter in module.named_parameters() if parameter is not None}
    return own == wanted and not list(module.buffers()) and _agrees(module)


def _parameters(module: Any) -> list[str]:
    both = names(module)
    return [*both, *(f"{name}_bias" for name in both if module.has_bias)]


@torch.no_grad()
def _agrees(module: nn.Module) -> bool:
    try:
        with torch.device("cpu"):  # also where models are made on the meta device
            return _compared(_shrunk(module))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return False


def _compared(small: Any) -> bool:
    count = int(small.num_experts)
    generator = torch.Generator().manual_seed(0)
    width = small.get_parameter(names(small)[0]).shape[1 if small.is_transposed else 2]
    inputs = torch.randn(_TOKENS, width, generator=generator, dtype=torch.float64)
    scores = torch.rand(_TOKENS, count, generator=generator, dtype=torch.float64)
    weights, chosen = scores.topk(min(_CHOICES, count))
    # The class's own loop, not the kernel that its config may ask for.
    forward: Callable[..., Tensor] = getattr(type(small).forward, "__wrapped__", type(small).forward)
    expected = forward(small, inputs, chosen, weights)
    found = unstacked(small)(inputs, chosen, weights)
    return bool(expected.shape == found.shape and (expected - found).abs().max() < _SAME)


def _shrunk(module: nn.Module) -> Any:
    """Return a module of the class of `module` with few and small random matrices, on the CPU.

    Sizes that the class wrote down for itself shrink along, by their values.
    """
    outer, inner = _sizes(module)
    # A ratio that makes two of the values equal stays.
    small_outer = _INNER * outer // inner if outer in (inner, 2 * inner, inner / 2) else _OUTER
    sizes = {2 * inner: 2 * _INNER, inner: _INNER, outer: small_outer}
    generator = torch.Generator().manual_seed(1)
    made = emptied(module)
    made.__dict__["_parameters"] = {}
    for name in _parameters(module):
        shape = [made.num_experts, *(sizes[size] for size in module.get_parameter(name).shape[1:])]
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        made.register_parameter(name, nn.Parameter(value))
    for key, value in vars(module).items():
        if type(value) is int and value in sizes and key != "num_experts":
            made.__dict__[key] = sizes[value]
    return made


def _sizes(module: Any) -> tuple[int, int]:
    """Return the width of the tokens and that of the hidden dimension of each expert."""
    _, rows, columns = module.down_proj.shape
    return (columns, rows) if module.is_transposed else (rows, columns)


def emptied(module: nn.Module) -> Any:
    """Return a copy of `module` without its parameters, which shares everything else."""
    made: Any = type(module).__new__(type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__["_parameters"] = dict.fromkeys(module._parameters)
    return made


def unstacked(module: nn.Module) -> Experts:
    """Return what computes the same as the stacked `module`; weights are views of what it has."""
    source, known = cast(Any, module), emptied(module)
    first, down = names(module)
    maps = {name: list(_maps(source, name)) for name in (first, down)}
    each = [Expert(*pair, known) for pair in zip(maps[first], maps[down], strict=True)]
    made = Experts(each, known)
    return made.train(module.training)


def _maps(module: Any, name: str) -> Iterator[nn.Linear]:
    """Yield one of the maps of every expert."""
    stack: nn.Parameter = getattr(module, name)
    biases: nn.Parameter | None = getattr(module, f"{name}_bias") if module.has_bias else None
    for index, matrix in enumerate(stack.detach()):
        weight = matrix.T if module.is_transposed else matrix
        linear = nn.Linear(weight.shape[1], weight.shape[0], biases is not None, "meta")
        linear.weight = nn.Parameter(weight, stack.requires_grad)
        if biases is not None:
            linear.bias = nn.Parameter(biases.detach()[index], biases.requires_grad)
        yield linear


def stacked(module: Experts, whole: Sequence[type[nn.Module]]) -> nn.Module | None:
    """Return the stacked module that computes what `module` does, None where a map is no more a matrix.

    Matrices that are still views of one tensor are not copied.

    Args:
        module: the experts.
        whole: the classes of the maps that are matrices.
    """
    made, first = emptied(module.stacked[0]), module.first
    names_of = dict(zip((first, "down"), names(made), strict=True))
    for part, name in names_of.items():
        maps = [cast(Any, expert).get_submodule(part) for expert in module.each]
        if any(type(found) not in whole or found.weight.shape != maps[0].weight.shape for found in maps):
            return None
        weights = [found.weight.T if made.is_transposed else found.weight for found in maps]
        setattr(made, name, _joined(weights))
        if made.has_bias:
            setattr(made, f"{name}_bias", _joined([found.bias for found in maps]))
    return cast(nn.Module, made).train(module.training)


def _joined(parts: Sequence[Tensor]) -> nn.Parameter:
    """Return `parts` stacked, without a copy where they lie one after another in one storage."""
    first, size = parts[0], parts[0].numel()
    places = [(part.untyped_storage().data_ptr(), part.storage_offset()) for part in parts]
    start, offset = places[0]
    adjacent = all(place == (start, offset + index * size) for index, place in enumerate(places))
    trained = any(part.requires_grad for part in parts)
    if adjacent and first.is_contiguous() and first.device.type != "meta":
        shape = (len(parts), *first.shape)
        return nn.Parameter(first.detach().as_strided(shape, (size, *first.stride()), offset), trained)
    return nn.Parameter(torch.stack([part.detach() for part in parts]), trained)
