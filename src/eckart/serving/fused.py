"""One layer of a serving engine that computes matrices of several forms from one input."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .shards import FACTORED, NARROW, PARTIAL, PIVOTED, Layer, Shard

Run = Callable[["Product", Tensor], Tensor]


class Product(nn.Module):
    """A matrix (m, n) that is multiplied by. An engine may keep it in another layout than `weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = weight.shape[0]
        self.weight = nn.Parameter(weight, requires_grad=False)


def plain(product: Product, inputs: Tensor) -> Tensor:
    """Map `inputs` (..., n) to (..., m)."""
    return nn.functional.linear(inputs, product.weight)


class FusedLinear(nn.Module):
    """The outputs of all shards of a `layer`, in their order.

    What shards compute from the input itself (right factors, pivots, whole matrices) is one product; then
    each has its second one; one index puts all outputs in order, and zeros where there are none. Right
    factors that other layers share stay products of their own, so that they are held once.

    Args:
        layer: its shards.
        tensors: of each shard, by the names of `Shard.tensors` and `Shard.biases`.
        bases: the shared right factors of those shards that have one, by the name of whose they are.
        run: multiplies by a product.

    `bias` holds that of all outputs, or None: adding it is left to the engine.

    Raises:
        StoreError: the tensors are not those of the layer.
    """

    order: Tensor | None
    places: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        layer: Layer,
        tensors: Sequence[Mapping[str, Tensor]],
        bases: Mapping[str, Product],
        run: Run = plain,
    ) -> None:
        super().__init__()
        for shard, found in zip(layer.shards, tensors, strict=True):
            shard.check({name: tuple(tensor.shape) for name, tensor in found.items()})
        self.run, self.read, self.outputs = run, layer.shards[0].read, layer.outputs
        self._read(layer.shards, tensors, bases)
        second = [_second(shard, found) for shard, found in zip(layer.shards, tensors, strict=True)]
        self.seconds = nn.ModuleList(
            nn.Identity() if weight is None else Product(weight) for weight in second
        )
        self.kinds = [shard.kind for shard in layer.shards]
        self.register_buffer("places", _columns(layer.shards, tensors), persistent=False)
        order, computed = _order(layer, tensors)
        whole = torch.equal(order, torch.arange(computed, device="cpu"))
        self.padded = bool((order == computed).any())
        self.register_buffer("order", None if whole else order, persistent=False)
        self.bias = _bias(layer.shards, tensors, order)

    def _read(
        self, shards: Sequence[Shard], tensors: Sequence[Mapping[str, Tensor]], bases: Mapping[str, Product]
    ) -> None:
        own, self.firsts, self.members = [], nn.ModuleList(), []
        for index, (shard, found) in enumerate(zip(shards, tensors, strict=True)):
            shared = bases.get(shard.basis or shard.name)
            if shared is None:
                own.append((index, _first(shard, found)))
            else:
                self.firsts.append(shared)
                self.members.append(([index], [shared.rows]))
        if own:
            weights = [weight for _, weight in own]
            self.firsts.append(Product(torch.cat(weights) if len(weights) > 1 else weights[0]))
            self.members.append(([index for index, _ in own], [weight.shape[0] for weight in weights]))

    def products(self) -> list[Product]:
        """Return the products that belong to this layer alone or to several."""
        return [part for part in (*self.firsts, *self.seconds) if isinstance(part, Product)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., n) to (..., m), without the bias."""
        pieces = self._pieces(self._chosen(inputs))
        if self.padded:
            pieces.append(pieces[0].new_zeros(*pieces[0].shape[:-1], 1))
        outputs = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return outputs if self.order is None else outputs.index_select(-1, self.order)

    def _chosen(self, inputs: Tensor) -> Tensor:
        if self.places is not None:
            return inputs.index_select(-1, self.places)
        return inputs if inputs.shape[-1] == self.read else inputs[..., : self.read].contiguous()

    def _pieces(self, inputs: Tensor) -> list[Tensor]:
        firsts: dict[int, Tensor] = {}
        for product, (members, sizes) in zip(self.firsts, self.members, strict=True):
            outputs = self.run(cast(Product, product), inputs)
            parts = [outputs] if len(sizes) == 1 else torch.split(outputs, sizes, dim=-1)
            firsts.update(zip(members, parts, strict=True))
        pieces = []
        for index, (kind, second) in enumerate(zip(self.kinds, self.seconds, strict=True)):
            first = firsts[index]
            if kind != FACTORED:
                pieces.append(first)
            if isinstance(second, Product):
                pieces.append(self.run(second, first.contiguous()))
        return pieces


def _first(shard: Shard, tensors: Mapping[str, Tensor]) -> Tensor:
    names = {FACTORED: "down.weight", PIVOTED: "pivot.weight", PARTIAL: "inner.weight"}
    return tensors[names.get(shard.kind, "weight")]


def _second(shard: Shard, tensors: Mapping[str, Tensor]) -> Tensor | None:
    if shard.kind == FACTORED:
        return tensors["up.weight"]
    return tensors.get("rest.weight") if shard.kind == PIVOTED else None


def _columns(shards: Sequence[Shard], tensors: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    first = shards[0]
    by_columns = first.kind == PARTIAL and first.spec["side"] == "columns"
    return tensors[0]["places"].to(torch.int64) if by_columns else None


def _order(layer: Layer, tensors: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, int]:
    """Return where each output stands among what is computed, and how many are; that number for a zero."""
    orders, start = [], 0
    computed = sum(shard.made for shard in layer.shards)
    for shard, found in zip(layer.shards, tensors, strict=True):
        own = torch.arange(shard.made, device="cpu")
        if shard.kind == PIVOTED:
            own = found["order"].to("cpu", torch.int64)
        if shard.made < shard.outputs and not layer.narrowed:
            wide = torch.full((shard.outputs,), computed - start, device="cpu")
            own = wide.index_copy(0, _standing(shard, found), own)
        orders.append(own + start)
        start += shard.made
    return torch.cat(orders), computed


def _standing(shard: Shard, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return which of all outputs of `shard` are computed."""
    if shard.kind != NARROW:
        return tensors["places"].to("cpu", torch.int64)
    starts = torch.arange(shard.copies, device="cpu")[:, None] * (shard.outputs // shard.copies)
    return (starts + torch.arange(shard.made // shard.copies, device="cpu")).flatten()


def _bias(shards: Sequence[Shard], tensors: Sequence[Mapping[str, Tensor]], order: Tensor) -> Tensor | None:
    if not any(
        name in found for shard, found in zip(shards, tensors, strict=True) for name in shard.biases()
    ):
        return None
    parts = [_own_bias(shard, found) for shard, found in zip(shards, tensors, strict=True)]
    computed = torch.cat([*parts, parts[0].new_zeros(1)])
    like = _first(shards[0], tensors[0]) if not shards[0].basis else tensors[0]["up.weight"]
    return computed.to(like.dtype)[order.to(computed.device)]


def _own_bias(shard: Shard, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the bias of what `shard` computes, float64."""
    found = {name: tensors[name].to(torch.float64) for name in shard.biases() if name in tensors}
    if not found:
        return torch.zeros(shard.made, dtype=torch.float64)
    if shard.kind != PIVOTED:
        return next(iter(found.values()))
    first = found["pivot.bias"]
    if "rest.weight" not in tensors:
        return first
    return torch.cat([first, tensors["rest.weight"].to(torch.float64) @ first + found["rest.bias"]])
