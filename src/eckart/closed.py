"""Closed-form refinement: least squares, block by block, on the inputs that each matrix now sees.

With x the inputs of a matrix W in the dense model and x' those in the compressed one, after everything
before it was compressed, the map that best reproduces the dense outputs from x' is
W E[x x'^T] E[x' x'^T]^-1 (AA-SVD, arXiv:2604.02119). A mixture t of it with the map itself,
W + t W (E[x x'^T] - E[x' x'^T]) (E[x' x'^T] + damp)^-1, is brought to the form, rank or width that the matrix
has; t between 0 and 1 is the compromise of SAES-SVD.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import calibrate, mixtures, models
from .chain import Chain, chain, matching
from .errors import NotPositiveDefinite
from .factors import FactoredLinear, LowRank, PartialLinear, PivotedLinear, build
from .joint import JointLinear
from .linalg import Metric, to_float64, weighted_svd
from .shared import SharedLinear


@dataclass(frozen=True, slots=True)
class Metrics:
    """E[g g^T] of the gradients at the outputs of the dense model's matrices, by name: what errors cost."""

    outputs: Mapping[str, Tensor]

    @classmethod
    def measured(
        cls,
        dense: Any,
        names: Sequence[str],
        windows: Tensor,
        watch: Callable[[int, int], None] | None = None,
    ) -> "Metrics":
        """Gather them on `windows` (k, seq_len), of the loss on the text's own labels."""
        found = calibrate.calibrate(
            dense, windows, names, ("gradient",),
            gradient_windows=len(windows), generator=torch.Generator(), watch=watch,
        )  # fmt: skip
        return cls({name: found.stats.moment("gradient", name).mean() for name in names})

    def metric(self, name: str, size: int, damp: float) -> Metric:
        """Return the metric of one matrix, the identity where nothing is known."""
        return Metric(size, self.outputs[name], damp) if name in self.outputs else Metric(size)


def linears(model: nn.Module, block: str) -> dict[str, nn.Module]:
    """Return the linear maps of a block by name: every nn.Linear that is whole, and what was made smaller.

    Not those of experts: the dense model may send other tokens to an expert than the compressed one does, and
    then there are no pairs of inputs to fit to.
    """
    smaller, routed = models.low_rank_modules(model), mixtures.expert_lists(model, [block])
    inside = {
        name: module
        for name, module in model.named_modules()
        if models.owner(name, [block]) and (name in smaller or isinstance(module, nn.Linear))
    }
    return {
        name: module for name, module in inside.items() if models.owner(name, (*smaller, *routed)) is None
    }


def stages(chain: Chain, index: int, hidden: Tensor, names: Sequence[str]) -> list[list[str]]:
    """Group `names` by the tensor that they read, in the order in which the block runs them."""
    groups: list[tuple[Tensor, list[str]]] = []
    for name, tensor in chain.reads(index, hidden, names):
        known = next((group for read, group in groups if read is tensor), None)
        if known is None:
            groups.append((tensor, [name]))
        else:
            known.append(name)
    return [group for _, group in groups]


@torch.no_grad()
def refit(
    student: Any,
    dense: Any,
    windows: Tensor,
    mixture: float,
    *,
    metrics: Metrics,
    damp: float = 1e-4,
    watch: Callable[[int, int], None] | None = None,
) -> None:
    """Solve for every linear map in the blocks of `student`, in place, first block first.

    Args:
        student: the compressed model: low-rank, narrow, or both.
        dense: the model that it comes from, with the same blocks.
        windows: (k, seq_len) to fit to.
        mixture: 0 leaves each target at the dense map (what was left out of a narrow one stays out), 1 makes
            it the map that reproduces the dense outputs.
        metrics: of the outputs.
        damp: added to the diagonal of E[x' x'^T], in units of its mean.
        watch: called with (blocks done, blocks).

    Raises:
        ModelError: the blocks do not correspond, or are no chain.
    """
    windows = windows.to(student.device)
    own, original = chain(student, windows[0]), chain(dense, windows[0])
    matching(own, original)
    bases = models.bases(student)
    shared = {*bases, *bases.values()}
    mine = [own.entry(window) for window in windows]
    theirs = [original.entry(window) for window in windows]
    for index, block in enumerate(own.names):
        names = list(linears(student, block))
        groups = stages(own, index, mine[0], names)
        dense_reads = [dict(original.reads(index, hidden, [g[0] for g in groups])) for hidden in theirs]
        for group in groups:
            wanted = (reads[group[0]] for reads in dense_reads)
            gram, cross = _moments(own, index, mine, wanted, group[0])
            inputs = Metric(len(gram), gram, damp)  # its roots serve all that read the same
            for name in group:
                weight = models.find(dense, name).weight.double()
                module = student.get_submodule(name)
                if isinstance(module, SharedLinear):
                    target = weight + mixture * anchored(weight @ (cross - gram), gram, damp)
                    _differ(module, target, inputs, metrics.metric(name, weight.shape[0], damp))
                    continue
                if isinstance(module, JointLinear):
                    _continue(module, weight, gram, cross, mixture, damp)
                    continue
                if not isinstance(module, FactoredLinear | PivotedLinear):
                    _adjust(module, weight, gram, cross, mixture, damp)
                    continue
                target = weight + mixture * anchored(weight @ (cross - gram), gram, damp)
                if name in shared:
                    _coefficients(module, target, gram, damp)
                else:
                    outputs = metrics.metric(name, weight.shape[0], damp)
                    models.replace(student, name, _decomposed(module, target, inputs, outputs))
        mine = [own.run(index, hidden) for hidden in mine]
        theirs = [original.run(index, hidden) for hidden in theirs]
        if watch:
            watch(index + 1, len(own.names))


def _moments(
    own: Chain, index: int, mine: Sequence[Tensor], theirs: Iterable[Tensor], name: str
) -> tuple[Tensor, Tensor]:
    """Return E[x' x'^T] (n', n') and E[x x'^T] (n, n') of the module `name`, in float64.

    `mine` is what its block gets, `theirs` what the module reads in the dense model.
    """
    gram, cross, count = torch.zeros(()), torch.zeros(()), 0
    for now, then in zip(mine, theirs, strict=True):
        rows, dense = own.read(index, now, name), then.reshape(-1, then.shape[-1]).float()
        gram = gram.to(rows.device) + rows.T @ rows
        cross = cross.to(rows.device) + dense.T @ rows
        count += len(rows)
    return gram.double() / count, cross.double() / count


def _decomposed(
    module: FactoredLinear | PivotedLinear, target: Tensor, inputs: Metric, outputs: Metric
) -> nn.Module:
    """Return a module of the kind and rank of `module` that is closest to `target`."""
    svd, rank, bias = weighted_svd(target, inputs, outputs), module.rank, module.dense_bias()
    low_rank = LowRank(svd.left[:, :rank], svd.right[:rank])
    made = build(low_rank, module.kind, None if bias is None else bias.double())
    like = next(module.parameters())
    return made.to(like.dtype).to(like.device)


def _coefficients(module: nn.Module, target: Tensor, gram: Tensor, damp: float) -> None:
    """Solve for the left factor alone: the right one belongs to other blocks, too."""
    assert isinstance(module, FactoredLinear)
    basis = module.down.weight.double()
    module.up.weight.copy_(anchored(target @ gram @ basis.T, basis @ gram @ basis.T, damp))


def _differ(module: SharedLinear, target: Tensor, inputs: Metric, outputs: Metric) -> None:
    """Solve for the difference alone: the base belongs to other blocks, too."""
    difference = module.difference()
    if difference is None:
        return
    base = module.dense_weight() - to_float64(difference.left) @ to_float64(difference.right)
    svd, rank = weighted_svd(target - base, inputs, outputs), module.rank
    found = LowRank(svd.left[:, :rank], svd.right[:rank]).balanced()
    difference.left.copy_(found.left)
    difference.right.copy_(found.right)


def _continue(
    module: JointLinear, weight: Tensor, gram: Tensor, cross: Tensor, mixture: float, damp: float
) -> None:
    """Solve for what goes on from a joint product; that itself belongs to others, too.

    Where the product has a bias, moments about zero do not tell it from the map, and all stays.
    """
    if module.up is None or module.down.bias is not None:
        return
    if module.order is not None:
        # Rows that stand in the joint product come first in the order.
        weight = weight[torch.argsort(module.order.to(torch.int64))[module.own :]]
    _adjust(module.up, weight, gram, cross, mixture, damp)


def _adjust(
    module: nn.Module, weight: Tensor, gram: Tensor, cross: Tensor, mixture: float, damp: float
) -> None:
    """Solve for a map of full rank, whole or without some rows or columns, that `weight` was once."""
    inner = module.inner if isinstance(module, PartialLinear) else module
    assert isinstance(inner, nn.Linear)
    if isinstance(module, PartialLinear) and module.side == "columns":
        places = module.places.to(torch.int64)
        gram, cross = gram[places][:, places], cross[:, places]
    current = inner.weight.double()
    # Where rows were left out, those that are left are to give what they give on the dense inputs.
    wanted = weight if len(weight) == len(current) else current
    change = anchored(wanted @ cross - current @ gram, gram, damp)
    inner.weight.copy_(current + mixture * change)


def anchored(error: Tensor, gram: Tensor, damp: float) -> Tensor:
    """Return error (gram + damp)^-1, with damping in units of the mean of the diagonal: ridge regression.

    Raises:
        NotPositiveDefinite: the sum is singular.
    """
    size = len(gram)
    ridge = gram + damp * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype, device=gram.device)
    solved, info = torch.linalg.solve_ex(ridge, error, left=False)
    if int(info):
        raise NotPositiveDefinite(
            f"the second moment of {size} inputs is singular with damp={damp}: raise `damp`, or fit to more "
            "tokens"
        )
    return cast(Tensor, solved)
