"""From choices to modules: build what was chosen out of the decompositions and put it into the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import dimensions, joint, models
from .choices import Choice
from .dimensions import Dimension
from .embeddings import FactoredEmbedding, build_embedding, tied_head
from .factorize import Decomposed, Decomposition
from .factors import FORMS, FactoredLinear, LowRank, PartialLinear, PivotedLinear, build, parameters
from .heads import Heads, PairNarrowing, ValueNarrowing, places
from .linalg import WeightedSVD
from .models import Target
from .quant import storage
from .quant.corrected import CorrectedLinear
from .recipe import FLOAT
from .result import Module


def build_modules(
    model: nn.Module,
    choices: Sequence[Choice],
    found: Decomposed,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
) -> dict[str, nn.Module]:
    """Return what goes where of `choices`: one module per matrix that does not stay dense.

    Weights are rounded to `dtype`, once, from float64, and come in the dtype of what they replace.
    """
    made: dict[str, nn.Module] = {}
    shared = found.shared()
    by_reader = {dimension.reader: dimension for dimension in found.dimensions}
    for done, choice in enumerate(choices, 1):
        name = choice.target.name
        if choice.basis:
            if name == choice.basis[0]:
                reading = found.reading(choice.basis)
                make = _joint if reading is not None and reading.once else _with_basis
                made |= make(model, choice, found, dtype)
        elif choice.form in FORMS:
            made |= _low_rank(model, found.parts[name].svd, choice, dtype)
        elif choice.form == "narrow" and name in by_reader:
            dimension = by_reader[name]
            made |= _narrow(model, dimension, found.parts[dimension.name], choice.rank, dtype)
        elif choice.form == "partial":
            attention, key = shared[name]
            partial = _partial(model, attention, found.parts[key], choice)
            made[name] = _rounded(partial, models.find(model, name).weight, dtype)
        progress(done, len(choices))
    return made


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put `modules` into `model`; a factored head shares the weights of the factored embeddings."""
    for name, module in modules.items():
        models.replace(model, name, module)
    models.tie(model)


def _rounded(module: nn.Module, own: Tensor, dtype: torch.dtype) -> nn.Module:
    # float64 to the output dtype at once: by way of the dtype computed in, it would be rounded twice.
    kind, place = own.dtype, own.device  # `own` may be a parameter of `module`, which is cast in place
    return module.to(dtype).to(kind).to(place)


def _low_rank(model: nn.Module, svd: WeightedSVD, choice: Choice, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the low-rank module of `choice`, and the head that is tied to it."""
    name, dense = choice.target.name, model.get_submodule(choice.target.name)
    low_rank = LowRank(svd.left[:, : choice.rank], svd.right[: choice.rank])
    own = next(dense.parameters())
    if isinstance(dense, nn.Embedding):
        table = _rounded(build_embedding(low_rank, dense.padding_idx), own, dtype)
        assert isinstance(table, FactoredEmbedding)
        if choice.target.head is None:
            return {name: table}
        head = models.find(model, choice.target.head)
        return {name: table, choice.target.head: tied_head(table, head.bias)}
    assert choice.form == "factored" or choice.form == "pivoted"
    bias = models.find(model, name).bias
    module = build(low_rank, choice.form, None if bias is None else bias.detach().to(svd.left))
    return {name: _rounded(module, own, dtype)}


def _with_basis(
    model: nn.Module, choice: Choice, found: Decomposed, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Return the factored modules of all that share a basis: they hold one and the same `down`."""
    rank, names = choice.rank, choice.basis
    stacked = _stack(choice, found).balanced()
    made: dict[str, nn.Module] = {}
    basis: nn.Linear | None = None
    heights = [models.find(model, name).out_features for name in names]
    for name, left in zip(names, torch.split(stacked.left, heights), strict=True):
        dense = models.find(model, name)
        module = FactoredLinear(dense.in_features, dense.out_features, rank, dense.bias is not None)
        module = module.to(torch.float64).to(left.device)
        with torch.no_grad():
            module.up.weight.copy_(left)
            module.down.weight.copy_(stacked.right)
            if dense.bias is not None:
                module.up.bias.copy_(dense.bias)
        rounded = _rounded(module, dense.weight, dtype)
        assert isinstance(rounded, FactoredLinear)
        basis = basis or rounded.down
        rounded.down = basis
        made[name] = rounded
    return made


def _stack(choice: Choice, found: Decomposed) -> LowRank:
    """Return the product that stands for all that share the basis of `choice`, one above the other."""
    rank, reading = choice.rank, found.reading(choice.basis)
    if reading is not None:
        svd = found.parts[reading.name].svd
        return LowRank(svd.left[:, :rank], svd.right[:rank])
    parts = [found.parts[name].svd for name in choice.basis]
    return LowRank(torch.cat([part.left[:, :rank] for part in parts]), parts[0].right[:rank])


@torch.no_grad()
def _joint(model: nn.Module, choice: Choice, found: Decomposed, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return what goes on from one joint product, for all that share it: they hold one `down`."""
    linears = [models.find(model, name) for name in choice.basis]
    made = joint.build(_stack(choice, found), [(one.out_features, one.bias) for one in linears], choice.form)
    # All are cast in place, and with the first of them what they have in common.
    return {
        name: _rounded(module, linear.weight, dtype)
        for name, linear, module in zip(choice.basis, linears, made, strict=True)
    }


def _narrow(
    model: nn.Module, dimension: Dimension, part: Decomposition, width: int, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Return the linears of `dimension` at `width` units, the one that reads them re-fitted."""
    made = dimensions.narrowed(model, dimension, part.narrowing.units(width))
    reader = made[dimension.reader]
    weight = part.narrowing.refit(width).to(dtype).to(reader.weight)
    reader.weight = nn.Parameter(weight)
    return {name: _rounded(module, module.weight, dtype) for name, module in made.items()}


def _partial(model: nn.Module, heads: Heads, part: Decomposition, choice: Choice) -> PartialLinear:
    """Return one of the linears of `heads` with the chosen number of values or of pairs."""
    linear, kept = models.find(model, choice.target.name), choice.rank
    if isinstance(part.found, PairNarrowing):
        count = heads.count // heads.groups if choice.target.name == heads.query else 1
        rows = [torch.cat(heads.halves(order[:kept])).sort().values for order in part.found.order]
        starts = torch.arange(heads.groups) * count * heads.size
        whole = [start + places(own, count, heads.size) for start, own in zip(starts, rows, strict=True)]
        return PartialLinear.slice(linear, "rows", torch.cat(whole))
    assert isinstance(part.found, ValueNarrowing)
    own = torch.arange(kept)
    if choice.target.name == heads.output:
        columns = places(own, heads.count, heads.size)
        return PartialLinear.of(linear, "columns", columns, part.found.output(kept), linear.bias)
    bias = None if linear.bias is None else part.found.value(linear.bias.detach(), kept).flatten()
    weight = part.found.value(linear.weight.detach(), kept)
    return PartialLinear.of(linear, "rows", places(own, heads.groups, heads.size), weight, bias)


def updated(found: Sequence[Module], targets: Sequence[Target], model: nn.Module) -> list[Module]:
    """Return the rows with the ranks that the low-rank matrices of `model`, and corrections, have now.

    `targets` are those of `model`: of the rows in order, without what was dropped.
    """
    made, names = [], iter([target.name for target in targets])
    for row in found:
        name = row.name if row.form == "dropped" else next(names)
        module = None if row.form == "dropped" else model.get_submodule(name)
        if isinstance(module, CorrectedLinear):
            row = corrected(row, module)
        elif isinstance(module, FactoredLinear | PivotedLinear) and module.rank != row.rank:
            row = replace(row, rank=module.rank, after=parameters(module.kind, row.shape, module.rank))
        made.append(row)
    return made


def corrected(row: Module, module: CorrectedLinear) -> Module:
    """Return the row of a matrix that has a correction."""
    return replace(row, form=module.kind, rank=module.rank, after=row.after + module.rank * sum(row.shape))


def rows(choices: Sequence[Choice], found: Decomposed) -> list[Module]:
    """Return the rows of the result.

    The loss of a narrower dimension stands with its reader, that of a dropped block with the last of
    its matrices.
    """
    last = {models.owner(choice.target.name, found.blocks): choice.target.name for choice in choices}
    whole_blocks = {name: found.blocks[block] for block, name in last.items() if block is not None}
    shared = found.shared()
    by_member = {name: dimension for dimension in found.dimensions for name in dimension.members}
    made = []
    for choice in choices:
        name, target = choice.target.name, choice.target
        key, counted, form = name, True, str(choice.form)
        if choice.form == "narrow":
            key, counted = by_member[name].name, by_member[name].reader == name
        elif choice.basis:
            counted = name == choice.basis[0]
            reading = found.reading(choice.basis)
            key, form = (name, form) if reading is None else (reading.name, "joint")
        elif choice.form == "partial":
            attention, key = shared[name]
            counted = name in (attention.output, attention.query)
        part = found.parts.get(key)
        losses = torch.zeros(choice.rank + 1) if part is None or not part.decomposed else part.losses()
        lost, all_of_it = float(losses[choice.rank]), float(losses[0])
        if choice.form == "dropped":
            lost, all_of_it = whole_blocks.get(name, 0.0), 0.0
        made.append(
            Module(
                name=name,
                shape=target.shape,
                form=form,
                rank=choice.rank,
                before=target.size,
                after=choice.parameters,
                energy=1 - lost / all_of_it if all_of_it else 1.0,
                loss=(lost if counted else 0.0) + _rounding(choice, found),
                storage=choice.storage,
            )
        )
    return made


def _rounding(choice: Choice, found: Decomposed) -> float:
    """Return the estimated loss of rounding what `choice` is stored as."""
    part = found.parts.get(choice.target.name)
    noise = None if part is None else part.noises()
    if choice.storage == FLOAT or choice.form == "dropped" or noise is None:
        return 0.0
    share = choice.rank / choice.units if choice.form in ("narrow", "partial") else 1.0
    ranked = choice.form in FORMS and noise.low_rank is not None
    amount = float(noise.low_rank[choice.rank]) if ranked and noise.low_rank is not None else noise.dense
    return storage.get(choice.storage).noise * amount * share
