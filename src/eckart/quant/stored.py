"""The modules that hold a matrix in few bits and multiply by it, or look up its rows."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..embeddings import FactoredEmbedding
from ..errors import StoreError
from ..factors import NarrowLinear, Replacement
from . import kernels
from .grid import Grid
from .storage import Shape, Storage


class _Stored(nn.Module):
    """A matrix (m, n) as the tensors of a storage, each of them a buffer of integers by its name."""

    def __init__(self, storage: Storage, shape: Shape) -> None:
        super().__init__()
        self.storage, self.shape = storage, shape
        for name, (size, dtype) in storage.layout(shape).items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype))

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by the names of `storage.layout`."""
        return {name: cast(Tensor, self._buffers[name]) for name in self.storage.layout(self.shape)}

    def _fill(self, codes: Tensor, grid: Grid) -> None:
        packed = self.storage.pack(codes, grid)
        self.storage.check(packed, self.shape)
        for name, tensor in packed.items():
            self._buffers[name] = tensor.contiguous()

    def dequantised(self) -> Tensor:
        """Return the matrix (m, n), float32."""
        return kernels.dequantised(self.storage, self.tensors(), self.shape)

    def check(self, name: str = "it") -> None:
        """Check the tensors, as after loading; `name` is what the messages call the module.

        Raises:
            StoreError: a tensor is not of the storage's shape and dtype, or a scale is NaN or infinite.
        """
        try:
            self.storage.check(self.tensors(), self.shape)
        except StoreError as error:
            raise StoreError(f"{name}: {error}") from error
        if not self.storage.finite(self.tensors()):
            raise StoreError(
                f"scales of {name} ({self.storage.name}, {self.shape[0]} x {self.shape[1]}) are NaN or "
                "infinite: the file is damaged"
            )

    def align(self) -> None:
        """Move what lies anywhere in a mapped file to where every kernel takes it."""
        for name, tensor in self.tensors().items():
            if tensor.data_ptr() % kernels.ALIGNMENT:
                self._buffers[name] = tensor.clone()


class StoredLinear(_Stored, Replacement):
    """y = W x + b with W (m, n) stored in few bits.

    Inputs keep their dtype, or take that of autocast; the bias is a parameter in its own dtype.

    Args:
        in_features, out_features: n and m.
        storage: of W.
        bias: as in nn.Linear.
        narrow: (m, n) before and copies of an eckart.factors.NarrowLinear that is stored.
        dtype: of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        storage: Storage,
        bias: bool = False,
        *,
        narrow: tuple[Shape, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(storage, (out_features, in_features))
        self.in_features, self.out_features, self.narrow = in_features, out_features, narrow
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, storage: Storage, codes: Tensor, grid: Grid) -> "StoredLinear":
        """Return `linear` with its weight stored as `codes` (m, n) uint8 on `grid`, its bias copied.

        Raises:
            StoreError: codes or grid are not of the linear's shape.
        """
        with torch.device("meta"):
            made = cast(StoredLinear, empty(linear, storage))
        made._fill(codes, grid)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return made.train(linear.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m)."""
        return kernels.linear(inputs, self.storage, self.tensors(), self.shape, self.bias)

    def extra_repr(self) -> str:
        """Describe the map for print(model)."""
        return f"{self.in_features} -> {self.out_features}, {self.storage.name}, bias={self.bias is not None}"


class StoredEmbedding(_Stored):
    """A table (v, d), one row per token, stored in few bits.

    Args:
        num_embeddings, embedding_dim: v and d of the table.
        storage: of the table.
        padding_idx: as in nn.Embedding.
        dtype: of the rows that it gives: casts of the module change it.
    """

    _like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        storage: Storage,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(storage, (num_embeddings, embedding_dim))
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.register_buffer("_like", torch.zeros(0, dtype=dtype), persistent=False)

    @classmethod
    @torch.no_grad()
    def of(cls, embedding: nn.Embedding, storage: Storage, codes: Tensor, grid: Grid) -> "StoredEmbedding":
        """Return `embedding` with its table stored as `codes` (v, d) uint8 on `grid`.

        Raises:
            StoreError: codes or grid are not of the table's shape.
        """
        with torch.device("meta"):
            made = cast(StoredEmbedding, empty(embedding, storage))
        made._fill(codes, grid)
        made._like = embedding.weight.new_zeros(0)
        return made.train(embedding.training)

    def rows_in(self, dtype: torch.dtype) -> None:
        """Give rows in `dtype` from now on."""
        self._like = self._like.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (...) to rows (..., d).

        Raises:
            IndexError: an id on the CPU is outside of the table.
        """
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"token ids from {low} to {high}: the table has {self.num_embeddings} rows")
        return self.storage.rows(self.tensors(), self.shape, ids).to(self._like.dtype)

    def extra_repr(self) -> str:
        """Describe the table for print(model)."""
        return f"{self.num_embeddings} x {self.embedding_dim}, {self.storage.name}"


class StoredHead(nn.Module):
    """The output head of a StoredEmbedding: logits = table h + b, with the tensors of the table.

    It holds nothing but its bias: the table belongs to the embedding, which moves, saves and loads it.

    Args:
        table: the embedding.
        bias: of the head, its own.
    """

    def __init__(self, table: StoredEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        # In a tuple, so that the embedding is no child of the head.
        self._tables = (table,)
        self.in_features, self.out_features = table.embedding_dim, table.num_embeddings
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)

    @property
    def table(self) -> StoredEmbedding:
        """The embedding."""
        return self._tables[0]

    @property
    def storage(self) -> Storage:
        """The storage of the table."""
        return self.table.storage

    def dequantised(self) -> Tensor:
        """Return the table (v, d), float32."""
        return self.table.dequantised()

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` (..., d) to logits (..., v)."""
        table = self.table
        return kernels.linear(hidden, table.storage, table.tensors(), table.shape, self.bias)

    def extra_repr(self) -> str:
        """Describe the head for print(model)."""
        return f"{self.in_features} -> {self.out_features}, {self.storage.name}, tied"


class StoredReturn(nn.Module):
    """What the head of a stored FactoredEmbedding multiplies by first: `up` of the embedding, its weight.

    It holds nothing: `up` belongs to the embedding, which moves, saves and loads it.

    Args:
        embedding: whose `up` is stored.
    """

    def __init__(self, embedding: FactoredEmbedding) -> None:
        super().__init__()
        # In a tuple, so that the embedding is no child of the head.
        self._tables = (embedding,)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.rank

    @property
    def table(self) -> StoredLinear:
        """The stored map of the embedding."""
        return cast(StoredLinear, self._tables[0].up)

    @property
    def storage(self) -> Storage:
        """The storage of that map."""
        return self.table.storage

    @property
    def weight(self) -> Tensor:
        """The matrix (d, r), float32; while it is trained, what its master is rounded to."""
        up: Any = self._tables[0].up
        found: Tensor = up.rounded() if hasattr(up, "rounded") else up.dequantised()
        return found

    def dequantised(self) -> Tensor:
        """Return the matrix (d, r) that is stored, float32."""
        return self.table.dequantised()

    def extra_repr(self) -> str:
        """Describe the map for print(model)."""
        return f"{self.in_features} -> {self.out_features}, tied"


def empty(plain: Any, storage: Storage) -> StoredLinear | StoredEmbedding:
    """Return the stored module that takes the place of `plain`, an nn.Linear or nn.Embedding, with zeros.

    Of the current default device. Rows and bias have the dtype of the weight of `plain`.
    """
    if isinstance(plain, nn.Embedding):
        sizes = plain.num_embeddings, plain.embedding_dim
        return StoredEmbedding(*sizes, storage, plain.padding_idx, dtype=plain.weight.dtype)
    narrow = (plain.whole, plain.copies) if isinstance(plain, NarrowLinear) else None
    biased, dtype = plain.bias is not None, plain.weight.dtype
    return StoredLinear(plain.in_features, plain.out_features, storage, biased, narrow=narrow, dtype=dtype)
