"""A linear map with a low-rank correction beside it."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..factors import LowRank, Replacement
from ..linalg import check_rank, to_float64


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight (m, n), float64, that a linear module multiplies by.

    Of modules that store it otherwise than as it is, `dequantised()` says what it is.

    Raises:
        ModelError: the module has neither that nor a weight of its shape.
    """
    inner: Any = module
    if hasattr(module, "dequantised"):
        return to_float64(inner.dequantised().detach())
    weight = getattr(module, "weight", None)
    shape = (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
    if not isinstance(weight, Tensor) or tuple(weight.shape) != shape:
        raise ModelError(
            f"{type(module).__name__} is no linear module: it needs dequantised(), or a weight of its shape"
        )
    return to_float64(weight.detach())


class CorrectedLinear(Replacement):
    """y = base(x) + up(down(x)): a linear map, and what is added to it.

    The bias is that of the base. Base and correction may each be stored as they like: as nn.Linear, or in
    few bits.

    Args:
        base: the linear module, n -> m.
        rank: of the correction, 1 <= rank <= min(m, n).
    """

    kind: Literal["corrected"] = "corrected"

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = cast(int, base.in_features), cast(int, base.out_features)
        self.rank = check_rank(rank, (self.out_features, self.in_features))
        self.base = base
        self.down: nn.Module = nn.Linear(self.in_features, rank, bias=False)
        self.up: nn.Module = nn.Linear(rank, self.out_features, bias=False)

    @classmethod
    @torch.no_grad()
    def of(cls, base: nn.Module, factors: LowRank, dtype: torch.dtype) -> "CorrectedLinear":
        """Return `base` with the correction `factors` (m, r) (r, n) in `dtype`, on the device of the factors.

        Raises:
            ConfigError: the factors do not fit the base.
            RankError: their rank is above min(m, n).
        """
        (rows, rank), (terms, columns) = factors.left.shape, factors.right.shape
        with torch.device("meta"):
            made = cls(base, rank)
        if (rows, terms, columns) != (made.out_features, rank, made.in_features):
            raise ConfigError(
                f"factors of {rows} x {rank} and {terms} x {columns} for a map of "
                f"{made.in_features} inputs and {made.out_features} outputs"
            )
        for module, weight in ((made.up, factors.left), (made.down, factors.right)):
            module.weight = nn.Parameter(weight.detach().to(dtype, copy=True).contiguous())
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        return cast(Tensor, self.base(inputs) + self.up(self.down(inputs)))

    def map(self) -> LowRank:
        """Return the correction, float64."""
        return LowRank(weight_of(self.up), weight_of(self.down))

    def dense_weight(self) -> Tensor:
        """Return the weight (m, n) of the whole map, float64."""
        return weight_of(self.base) + self.map().dense()

    def dense_bias(self) -> Tensor | None:
        """Return the bias (m,) of the map, or None."""
        bias = getattr(self.base, "bias", None)
        return None if bias is None else cast(Tensor, bias).detach()

    def extra_repr(self) -> str:
        """Describe the map for print(model)."""
        return f"{self.in_features} -> {self.out_features}, corrected by rank {self.rank}"
