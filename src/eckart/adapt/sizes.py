"""How many parameters an adapter has: exactly, from the shapes of what it adapts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .. import models
from ..errors import ModelError
from . import targets

Shape = tuple[int, int]
Matrices = tuple[tuple[Shape, int], ...]
"""Shapes (m, n), and how many matrices have each."""
Kind = Literal["lora", "dora", "adalora"]
RANKS = (8, 16, 64)
SHARES = (0.001, 0.01)
"""An adapter is said to have 0.1 to 1 % of the parameters."""
ONE, ALL = "one d x d", "all linear"
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "q, v": ("q_proj", "v_proj"),
    "q, k, v, o": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


def adapter(shape: Shape, rank: int, kind: Kind = "lora") -> int:
    """Return the trainable parameters of an adapter of rank `rank` on a matrix of `shape` (m, n).

    LoRA: r (m + n) (Hu et al. 2021, section 4.1). DoRA: m magnitudes besides. AdaLoRA: r singular values
    besides. Rank 0 is no adapter.
    """
    m, n = shape
    extra = {"lora": 0, "dora": m, "adalora": rank}[kind]
    return rank * (m + n) + extra if rank else 0


def break_even(shape: Shape) -> float:
    """Return the rank mn / (m + n) at which two factors hold as many parameters as the matrix (m, n)."""
    m, n = shape
    return m * n / (m + n)


def per_module(model: nn.Module, ranks: Mapping[str, int], kind: Kind = "lora") -> dict[str, int]:
    """Return the trainable parameters of the adapter on each of the linear maps in `ranks`.

    Exactly what PEFT's layers have; meta tensors will do. (AdaLoRA's layers hold one number more each, their
    present rank, which is not trained.)

    Raises:
        ModelError: no linear map of that name.
    """
    known = targets.linears(model)
    missing = [name for name in ranks if name not in known]
    if missing:
        raise ModelError(f"{missing[0]} is not a linear map of this {type(model).__name__}")
    shapes = targets.shapes(model, list(ranks))
    return {name: adapter(shapes[name], rank, kind) for name, rank in ranks.items()}


@dataclass(frozen=True, slots=True)
class Selections:
    """What an adapter may go on, of one model.

    Args:
        name: of the model.
        parameters: of the model.
        columns: title -> what is adapted, None where the model has no such matrices.
        matrices: name -> shapes of the matrices of that name in the blocks.
    """

    name: str
    parameters: int
    columns: Mapping[str, Matrices | None]
    matrices: Mapping[str, Matrices]

    def count(self, column: str, rank: int) -> int | None:
        """Return the parameters of a LoRA of rank `rank` on what `column` selects."""
        chosen = self.columns[column]
        return None if chosen is None else sum(times * adapter(shape, rank) for shape, times in chosen)

    def within(self, column: str) -> tuple[int, int] | None:
        """Return the least and the largest rank with SHARES of the parameters; none if least > largest."""
        each = self.count(column, 1)
        low, high = (share * self.parameters for share in SHARES)
        return None if each is None else (math.ceil(low / each), math.floor(high / each))


@dataclass(frozen=True, slots=True)
class Decoder:
    """The shapes of a published decoder.

    Args:
        name: of it.
        hidden: width d of the residual stream.
        layers: blocks.
        ffn: width inside the MLP.
        values: width of keys and of values; less than `hidden` with grouped-query attention.
        gated: whether the MLP has a gate, that is three matrices for two.
        others: parameters beside the matrices of the blocks: embeddings, head, norms, biases.
    """

    name: str
    hidden: int
    layers: int
    ffn: int
    values: int
    gated: bool
    others: int

    def matrices(self) -> dict[str, Shape]:
        """Return (m, n) of each matrix of a block."""
        d, inner = self.hidden, self.ffn
        found = {"q_proj": (d, d), "k_proj": (self.values, d), "v_proj": (self.values, d), "o_proj": (d, d)}
        if self.gated:
            found["gate_proj"] = (inner, d)
        return {**found, "up_proj": (inner, d), "down_proj": (d, inner)}

    def selections(self) -> Selections:
        """Return what an adapter may go on."""
        own = {name: ((shape, self.layers),) for name, shape in self.matrices().items()}
        columns: dict[str, Matrices | None] = {ONE: (((self.hidden, self.hidden), self.layers),)}
        for title, names in COLUMNS.items():
            columns[title] = tuple(own[name][0] for name in names)
        columns[ALL] = tuple(pair[0] for pair in own.values())
        inside = sum(m * n for m, n in self.matrices().values()) * self.layers
        return Selections(self.name, inside + self.others, columns, own)


def _llama(name: str, hidden: int, layers: int, ffn: int, values: int) -> Decoder:
    # A table and a head of 32,000 tokens, two norms a block, one at the end; no biases.
    return Decoder(name, hidden, layers, ffn, values, True, 2 * 32_000 * hidden + (2 * layers + 1) * hidden)


PUBLISHED = (
    _llama("Llama 7B", 4096, 32, 11_008, 4096),
    _llama("Llama 13B", 5120, 40, 13_824, 5120),
    _llama("Llama 70B", 8192, 80, 28_672, 8 * 128),
    # 50,257 tokens, tied, 2,048 positions; nine biases of width d and two norms a block, one at the end.
    Decoder("GPT-3 175B", 12_288, 96, 49_152, 12_288, False, (50_257 + 2_048 + 13 * 96 + 2) * 12_288),
)
"""Touvron et al. 2023 (Llama 2 70B: 8 of 64 heads for keys and values), Brown et al. 2020 (table 2.1)."""


def selections(name: str, model: Any, chosen: Sequence[str] = ()) -> Selections:
    """Return what an adapter may go on in `model`, which may be on the meta device or compressed.

    Args:
        name: to show.
        model: a causal language model.
        chosen: globs for a column of their own.

    Raises:
        ModelError: a glob matches nothing.
    """
    layers, width = len(models.block_names(model)), model.config.get_text_config().hidden_size
    columns: dict[str, Matrices | None] = {ONE: (((width, width), layers),)}
    for title, names in COLUMNS.items():
        columns[title] = _among(model, names)
    every = targets.names(model)
    columns[ALL] = _gathered(model, every)
    if chosen:
        columns[", ".join(chosen)] = _gathered(model, targets.names(model, chosen))
    kinds: dict[str, list[str]] = {}
    blocks = models.block_names(model)
    for one in every:
        kinds.setdefault(one.removeprefix(f"{models.owner(one, blocks)}."), []).append(one)
    matrices = {kind: _gathered(model, names) for kind, names in kinds.items()}
    return Selections(name, models.parameter_count(model), columns, matrices)


def _among(model: Any, names: Sequence[str]) -> Matrices | None:
    try:
        return _gathered(model, targets.names(model, names))
    except ModelError:
        return None


def _gathered(model: nn.Module, names: Sequence[str]) -> Matrices:
    found: dict[Shape, int] = {}
    for shape in targets.shapes(model, names).values():
        found[shape] = found.get(shape, 0) + 1
    return tuple(found.items())


def verdict(shown: Sequence[Selections], ranks: Sequence[int]) -> dict[str, int]:
    """Return how many of the adapters that are shown have less than SHARES, are within, and have more."""
    low, high = SHARES
    found = {"less": 0, "within": 0, "more": 0}
    for one in shown:
        for column in one.columns:
            for count in filter(None, (one.count(column, rank) for rank in ranks)):
                share = count / one.parameters
                found["less" if share < low else "more" if share > high else "within"] += 1
    return found
