"""A linear map whose weight belongs to other modules, too."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .errors import RankError
from .factors import FactoredLinear, LowRank, Replacement
from .joint import JointLinear
from .linalg import check_rank, to_float64


class SharedLinear(Replacement):
    """y = scale * base(x) + up(down(x)) + bias, where `base` is one and the same module in several of these.

    Args:
        base: n -> m, without bias.
        rank: of the difference `up(down(x))`; 0 for none.
        scaled: whether the outputs of the base have a scale each, `scale (m,)`.
        bias: whether there is one, `bias (m,)`.
    """

    kind: Literal["shared"] = "shared"
    bias: nn.Parameter | None
    scale: nn.Parameter | None

    def __init__(self, base: nn.Linear, rank: int = 0, scaled: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = base.in_features, base.out_features, rank
        if rank < 0:
            raise RankError(
                f"rank {rank} of a difference: legal are 0, for none, to {min(base.weight.shape)}"
            )
        if rank:
            check_rank(rank, (self.out_features, self.in_features))
        self.base = base
        self.down = nn.Linear(self.in_features, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, self.out_features, bias=False) if rank else None
        self.register_parameter("scale", nn.Parameter(torch.ones(self.out_features)) if scaled else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.out_features)) if bias else None)

    @classmethod
    @torch.no_grad()
    def of(
        cls, base: nn.Linear, difference: LowRank | None, scale: Tensor | None, bias: Tensor | None
    ) -> "SharedLinear":
        """Return the module with these values, in the dtype and on the device of `base`."""
        rank = 0 if difference is None else difference.right.shape[0]
        like = base.weight
        with torch.device("meta"):
            made = cls(base, rank, scale is not None, bias is not None)
        for part in (made.down, made.up):
            if part is not None:
                part.to(like.dtype).to_empty(device=like.device)
        if difference is not None:
            cast(nn.Linear, made.down).weight.copy_(difference.right)
            cast(nn.Linear, made.up).weight.copy_(difference.left)
        made.scale = None if scale is None else nn.Parameter(scale.detach().to(like, copy=True))
        made.bias = None if bias is None else nn.Parameter(bias.detach().to(like, copy=True))
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        outputs: Tensor = self.base(inputs)
        if self.scale is not None:
            outputs = outputs * self.scale.to(outputs.dtype)
        if self.up is not None and self.down is not None:
            outputs = outputs + self.up(self.down(inputs))
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def difference(self) -> LowRank | None:
        """Return the product of the difference, None without one."""
        if self.up is None or self.down is None:
            return None
        return LowRank(self.up.weight.detach(), self.down.weight.detach())

    def dense_weight(self) -> Tensor:
        """Return the weight (m, n) of the whole map, float64."""
        weight, difference = to_float64(self.base.weight.detach()), self.difference()
        if self.scale is not None:
            weight = self.scale.detach().to(weight)[:, None] * weight
        if difference is None:
            return weight
        return weight + to_float64(difference.left) @ to_float64(difference.right)

    def dense_bias(self) -> Tensor | None:
        """Return the bias (m,) of the map, or None."""
        return None if self.bias is None else self.bias.detach()

    def extra_repr(self) -> str:
        """Describe the map for print(model)."""
        return f"{self.in_features} -> {self.out_features}, differs by rank {self.rank}"


def sources(model: nn.Module) -> dict[str, str]:
    """Return, for each SharedLinear whose base is that of an earlier one, the name of that one."""
    return {name: first for name, (first, part) in _repeated(model).items() if part == "base"}


def common(model: nn.Module) -> dict[str, str]:
    """Return, for each tensor inside a module that is an earlier module's as well, its name and that one's.

    Bases of SharedLinear, and right factors of FactoredLinear and JointLinear.
    """
    return {
        f"{name}.{part}.{tensor}": f"{first}.{part}.{tensor}"
        for name, (first, part) in _repeated(model).items()
        for tensor, _ in model.get_submodule(f"{first}.{part}").named_parameters(recurse=False)
    }


def _repeated(model: nn.Module) -> dict[str, tuple[str, str]]:
    firsts: dict[int, str] = {}
    found: dict[str, tuple[str, str]] = {}
    for name, module in model.named_modules():
        inner: Any = None
        if isinstance(module, SharedLinear | FactoredLinear | JointLinear):
            part = "base" if isinstance(module, SharedLinear) else "down"
            inner = getattr(module, part)
            first = firsts.setdefault(id(inner), name)
            if first != name:
                found[name] = (first, part)
    return found
