"""Training through the quantiser: float masters of stored matrices, rounded in every product.

The gradient of a rounded value goes straight to its master (Bengio et al. 2013, section 4), and the scales
are trained as in EfficientQAT (Chen et al. 2024, section 3.3): by the levels that they multiply.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import NotFinite
from ..factors import NarrowLinear
from .cells import GAIN, Cells, Matrix, gathered, rescaled, scale_name
from .stored import StoredEmbedding, StoredHead, StoredLinear


class _Straight(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, gain: Tensor | None, module: Matrix) -> Tensor:
        ctx.module = module
        found = Cells.of(module, gain).rounded(master)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(found)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gain = None
        if ctx.needs_input_grad[1]:
            (found,) = ctx.saved_tensors
            gain = GAIN * gathered(ctx.module, gradient * found)
        return gradient, gain, None


_straight: Any = _Straight.apply


class _Master(nn.Module):
    """What has a float master for the stored matrix `grid[0]`; in a tuple, so that it is no child."""

    weight: Tensor
    gain: nn.Parameter | None
    grid: tuple[Matrix]

    def rounded(self) -> Tensor:
        """Return the grid values (m, n), float32, nearest to the master, by the scales as they are now."""
        module, device = self.grid[0], self.weight.device
        if next(module.buffers()).device != device:
            module.to(device)
        return cast(Tensor, _straight(self.weight, self.gain, module))


class MasterLinear(_Master, nn.Linear):
    """An nn.Linear that multiplies by the grid values nearest to its weight."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return functional.linear(inputs, self.rounded().to(inputs.dtype), bias)


class MasterNarrow(MasterLinear, NarrowLinear):
    """The same of a NarrowLinear."""


class MasterEmbedding(_Master, nn.Embedding):
    """An nn.Embedding that looks up the grid values nearest to its weight."""

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (...) to rows (..., d)."""
        rows = functional.embedding(ids, self.rounded(), self.padding_idx)
        return rows.to(cast(Tensor, self.grid[0]._like).dtype)


@contextlib.contextmanager
def through(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Let the stored matrices of `model` be trained while the body runs.

    Each StoredLinear is an nn.Linear, each StoredEmbedding an nn.Embedding (a StoredHead reads the same
    weight), whose `weight` is a float32 master, and whose `gain` moves the scales. Products take the grid
    value next to the master, at first what was stored, and the gradient goes to the master. Masters begin
    evenly spread over what is rounded to the stored value: began they all in the middle, none would reach
    another value for long, and then many at once.

    In the end every matrix is stored again with the codes nearest to its masters, and with the scales as
    trained (those of double quantisation stay). What was not trained stays to the bit. LLM.int8() trains as
    int8: inputs are not quantised.

    Args:
        model: anything with stored modules.
        seed: of where the masters begin.

    Raises:
        NotFinite: a master or a scale is NaN or infinite in the end; its matrix stays as it was.
    """
    opened: dict[nn.Module, nn.Module] = {}
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Matrix):
            opened[module] = _opened(module, generator)
    for module in model.modules():
        if isinstance(module, StoredHead):
            opened[module] = _head(module, cast(MasterEmbedding, opened[module.table]))
    _exchange(model, opened)
    try:
        yield
    finally:
        broken = [_close(module, cast(_Master, master)) for module, master in opened.items()]
        _exchange(model, {master: module for module, master in opened.items()})
    if any(broken):
        raise NotFinite(
            f"{sum(broken)} of {len(broken)} stored matrices are NaN or infinite after training, and stay as "
            "they were: lower the rate"
        )


@torch.no_grad()
def _opened(module: Matrix, generator: torch.Generator) -> nn.Module:
    made: MasterLinear | MasterEmbedding
    with torch.device("meta"):
        if isinstance(module, StoredEmbedding):
            made = MasterEmbedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
        elif module.narrow is None:
            made = MasterLinear(module.in_features, module.out_features, False)
        else:
            whole, copies = module.narrow
            made = MasterNarrow(module.in_features, module.out_features, False, whole=whole, copies=copies)
    made.grid = (module,)
    made.weight = nn.Parameter(Cells.of(module).scattered(module.dequantised(), generator))
    name = scale_name(module)
    count = 0 if name is None else module.tensors()[name].numel()
    gain = None if name is None else nn.Parameter(torch.zeros(count, device=made.weight.device))
    made.register_parameter("gain", gain)
    if isinstance(module, StoredLinear):
        made.register_parameter("bias", module.bias)
    return made.train(module.training)


def _head(module: StoredHead, table: MasterEmbedding) -> nn.Module:
    with torch.device("meta"):
        made = MasterLinear(module.in_features, module.out_features, False)
    made.weight, made.grid = table.weight, table.grid
    made.register_parameter("gain", table.gain)
    made.register_parameter("bias", module.bias)
    return made.train(module.training)


def _exchange(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the values of `new` wherever its keys are: a module that two others share stays shared."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                parent._modules[name] = new[child]


@torch.no_grad()
def _close(module: nn.Module, master: _Master) -> bool:
    """Store what `master` has become in `module`; tell whether that was impossible."""
    module.train(master.training)
    module.to(master.weight.device)
    if isinstance(module, StoredHead):
        return False
    assert isinstance(module, Matrix)
    storage, weight, cells = module.storage, master.weight, Cells.of(module)
    made = module.tensors() if master.gain is None else rescaled(module, master.gain)
    if not (bool(torch.isfinite(weight).all()) and storage.finite(made)):
        return True
    old, grid = storage.unpack(module.tensors(), module.shape)
    kept = cells.rounded(weight) == grid.values(old)
    packed = storage.pack(torch.where(kept, old, cells.codes(weight)), grid)
    for name, tensor in (made | {"codes": packed["codes"]}).items():
        setattr(module, name, tensor)
    return False
