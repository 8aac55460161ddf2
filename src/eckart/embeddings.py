"""Low-rank embedding tables, and the output head that is tied to one."""

from typing import cast

import torch
from torch import Tensor, nn

from .factors import LowRank
from .linalg import check_rank


class FactoredEmbedding(nn.Module):
    """A table (v, d) of rank `rank`: short rows, `codes (v, r)`, and one map for all, `up` (r -> d).

    Args:
        num_embeddings, embedding_dim: v and d of the table.
        rank: 1 <= rank <= min(v, d).
        padding_idx: as in nn.Embedding.
    """

    kind = "embedding"

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rank: int, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        check_rank(rank, (num_embeddings, embedding_dim))
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.codes = nn.Embedding(num_embeddings, rank, padding_idx)
        self.up = nn.Linear(rank, embedding_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (...) to rows (..., d)."""
        return cast(Tensor, self.up(self.codes(ids)))


class FactoredHead(nn.Module):
    """The output head of a FactoredEmbedding: logits = codes (up^T h), with the same two weights.

    Args:
        in_features, out_features: d and v.
        rank: that of the table.
        bias: of the head, its own.
    """

    kind = "head"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        check_rank(rank, (out_features, in_features))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.up = nn.Linear(rank, in_features, bias=False)
        self.codes = nn.Linear(rank, out_features, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` (..., d) to logits (..., v)."""
        return cast(Tensor, self.codes(hidden @ self.up.weight.to(hidden.dtype)))


@torch.no_grad()
def build_embedding(low_rank: LowRank, padding_idx: int | None = None) -> FactoredEmbedding:
    """Return the table whose transpose (d, v) is `low_rank`, in float64."""
    table = low_rank.balanced()
    (dim, rank), count = table.left.shape, table.right.shape[1]
    with torch.device("meta"):
        module = FactoredEmbedding(count, dim, rank, padding_idx)
    module = module.to(torch.float64).to_empty(device=table.left.device)
    module.up.weight.copy_(table.left)
    module.codes.weight.copy_(table.right.T)
    return module


@torch.no_grad()
def tied_head(embedding: FactoredEmbedding, bias: Tensor | None = None) -> FactoredHead:
    """Return the head that shares both weights of `embedding`."""
    with torch.device("meta"):
        head = FactoredHead(
            embedding.embedding_dim, embedding.num_embeddings, embedding.rank, bias is not None
        )
    share(embedding, head)
    if bias is not None:
        head.codes.bias = nn.Parameter(bias.clone())
    return head


def share(embedding: FactoredEmbedding, head: FactoredHead) -> None:
    """Make `head` use the parameters of `embedding`."""
    head.up.weight = embedding.up.weight
    head.codes.weight = embedding.codes.weight


@torch.no_grad()
def dense_embedding(module: FactoredEmbedding) -> nn.Embedding:
    """Return the nn.Embedding (v, d) with the same rows; the product is formed in float64."""
    codes, up = (part.weight.detach().cpu().double() for part in (module.codes, module.up))
    own = module.codes.weight
    padding = module.codes.padding_idx
    dense = nn.Embedding(
        module.num_embeddings, module.embedding_dim, padding, device=own.device, dtype=own.dtype
    )
    dense.weight.copy_(codes @ up.T)
    return dense
