"""Projections of one input with a common right factor, which runs once for all of them.

The module that holds them (an attention, a gated MLP) gets z = down(x) instead of x, and each projection goes
on from z. Nothing is kept from one call to the next: there is no cache that could be stale, and what is
traced, recomputed, replicated or run in threads is an ordinary forward.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .errors import ModelError, RankError
from .factors import LowRank, Replacement, pivot, rearranged


class JointLinear(Replacement):
    """y = up(z), or some of z as it is and rest(z), where z = down(x) is computed by what holds this.

    Factored: `up` maps z (r) to y (m), and has the bias. Pivoted: `own` of the outputs stand in z already,
    and `up` gives the others; `order (m,)` int32 says where each output stands in the concatenation of both.

    Args:
        down: x (n) -> z (r), one and the same module in all that share it; with a bias if pivoted.
        out_features: m.
        own: how many outputs stand in z, None where the form is factored.
        bias: whether the map has one.

    Raises:
        RankError: own is not in 0 .. min(m, r).
    """

    kind: Literal["joint"] = "joint"
    order: Tensor | None

    def __init__(
        self, down: nn.Linear, out_features: int, own: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = down.in_features, out_features, down.out_features
        self.own = own
        if own is not None and not 0 <= own <= min(out_features, self.rank):
            raise RankError(
                f"{own} outputs of {out_features} stand in a joint product of rank {self.rank}: legal are 0 "
                f"to {min(out_features, self.rank)}"
            )
        left = out_features - (own or 0)
        self.down = down
        self.up = nn.Linear(self.rank, left, bias=bias) if left else None
        order = None if own is None else torch.arange(out_features, dtype=torch.int32)
        self.register_buffer("order", order)

    def forward(self, joint: Tensor) -> Tensor:
        """Map `joint` z (..., r) to (..., m)."""
        if self.order is None:
            return cast(Tensor, cast(nn.Linear, self.up)(joint))
        known = joint if self.up is None else torch.cat([joint, self.up(joint)], dim=-1)
        return rearranged(known, self.order)

    def left(self) -> Tensor:
        """Return the matrix (m, r) from z to the outputs."""
        down = self.down.weight.detach()
        rows = down.new_zeros(0, self.rank) if self.up is None else self.up.weight.detach()
        if self.order is None:
            return rows
        eye = torch.eye(self.rank, dtype=down.dtype, device=down.device)
        return torch.cat([eye, rows.to(down)]).index_select(0, self.order)

    def map(self) -> LowRank:
        """Return the linear map from x to y without its bias."""
        return LowRank(self.left(), self.down.weight.detach())

    def dense_bias(self) -> Tensor | None:
        """Return the bias (m,) of the map, or None."""
        second = None if self.up is None or self.up.bias is None else self.up.bias.detach()
        if self.order is None or self.down.bias is None:
            return second
        first = self.down.bias.detach()
        carried = first.new_zeros(0)
        if self.up is not None and second is not None:
            carried = self.up.weight.detach() @ first + second
        return torch.cat([first, carried]).index_select(0, self.order)

    def extra_repr(self) -> str:
        """Describe the map for print(model)."""
        return f"{self.in_features} -> {self.rank} (joint) -> {self.out_features}"


@torch.no_grad()
def build(stack: LowRank, maps: Sequence[tuple[int, Tensor | None]], form: str) -> list[JointLinear]:
    """Return the modules that compute a `stack` (sum m_i, n) of maps, with one `down`, in float64.

    Args:
        stack: of the maps, one above the other, rank r.
        maps: height m_i and bias (m_i,) of each; of pivoted ones, all have a bias or none has.
        form: factored or pivoted.

    Raises:
        NotPositiveDefinite: `form` is pivoted and the left factor has dependent columns.
    """
    heights = [height for height, _ in maps]
    if form == "pivoted":
        return _pivoted(stack, heights, [bias for _, bias in maps if bias is not None])
    product = stack.balanced()
    down, made = _linear(product.right, None), []
    for left, (height, bias) in zip(torch.split(product.left, heights), maps, strict=True):
        module = JointLinear(down, height, None, bias is not None)
        module.up = _linear(left, bias)
        made.append(module)
    return made


def _pivoted(stack: LowRank, heights: Sequence[int], biases: Sequence[Tensor]) -> list[JointLinear]:
    """Some rows of the whole stack are computed from the input, all others from those."""
    found = pivot(stack)
    pivots, rest, multipliers = found.skeleton.pivots, found.skeleton.rest, found.skeleton.multipliers
    bias = torch.cat([one.detach().to(found.rows) for one in biases]) if biases else None
    down = _linear(found.rows, None if bias is None else bias[pivots])
    made, start, rank = [], 0, len(pivots)
    for height in heights:
        inside = (pivots >= start) & (pivots < start + height)
        others = (rest >= start) & (rest < start + height)
        module = JointLinear(down, height, int(inside.sum()), bias is not None)
        rows = multipliers[others]
        carried = None if bias is None else bias[rest[others]] - rows @ bias[pivots]
        module.up = _linear(rows, carried) if len(rows) else None
        order = torch.empty(height, dtype=torch.int32, device=rows.device)
        order[pivots[inside] - start] = inside.nonzero()[:, 0].to(torch.int32)
        order[rest[others] - start] = rank + torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        module.order = order
        made.append(module)
        start += height
    return made


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    made.weight = nn.Parameter(weight.detach().clone().contiguous())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(weight).clone())
    return made


class _Entrance:
    """Goes before the class of what holds joint projections: its first argument passes their `down`."""

    _first: str
    eckart_entry: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on the joint product."""
        holder: Any = self
        entry = getattr(holder, holder.eckart_entry).down
        if args:
            args = (entry(args[0]), *args[1:])
        else:
            kwargs = {**kwargs, self._first: entry(kwargs[self._first])}
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle it by the class that it has a name for."""
        return _blank, (type(self).__mro__[2],), vars(self)


_KNOWN: dict[type[nn.Module], type[nn.Module]] = {}


def _entered(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of modules of `kind` that compute a joint product, always the same."""
    if kind in _KNOWN:
        return _KNOWN[kind]
    first = next(iter(list(inspect.signature(kind.forward).parameters)[1:]), None)
    if first is None:
        raise ModelError(f"{kind.__name__} takes no input that its projections could share")
    made = type(f"Joint{kind.__name__}", (_Entrance, kind), {"_first": first, "__module__": __name__})
    return _KNOWN.setdefault(kind, made)


def _blank(kind: type[nn.Module]) -> nn.Module:
    made = _entered(kind)
    return made.__new__(made)


def enters(module: nn.Module) -> bool:
    """Tell whether `module` computes a joint product for what it holds."""
    return isinstance(module, _Entrance)


def first_argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a call hands `module` first, by place or by name; None where that is nothing."""
    if args:
        return args[0]
    names = list(inspect.signature(type(module).forward).parameters)[1:2]
    return kwargs.get(names[0]) if names else None


def bind(holder: nn.Module) -> None:
    """Let `holder` compute the joint product if a child of it goes on from one, and else no longer."""
    entry = next((name for name, part in holder.named_children() if isinstance(part, JointLinear)), None)
    if entry is None:
        if enters(holder):
            holder.__class__ = type(holder).__mro__[2]
            del vars(holder)["eckart_entry"]
        return
    if not enters(holder):
        holder.__class__ = _entered(type(holder))
    vars(holder)["eckart_entry"] = entry


def counted_twice(modules: list[nn.Module]) -> int:
    """Return the multiply-adds per token that a count of each of `modules` has too many: `down` runs once."""
    seen: set[int] = set()
    total = 0
    for module in modules:
        if isinstance(module, JointLinear):
            if id(module.down) in seen:
                total += module.in_features * module.rank
            seen.add(id(module.down))
    return total
