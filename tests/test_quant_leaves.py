"""Laws of leaves: the metric of each is that of the map, and rounding them together keeps the map."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eckart.errors import ConfigError, ModelError
from eckart.factors import FactoredLinear, LowRank, NarrowLinear, PartialLinear, PivotedLinear, build
from eckart.linalg import Metric, weighted_error
from eckart.quant.leaves import leaves, metrics, mixed, quantise
from eckart.quant.storage import get

FAST = settings(deadline=None, max_examples=20, derandomize=True)
SEEDS = st.integers(0, 10_000)


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def correlated(size: int, seed: int) -> Tensor:
    """Return the second moment (size, size) of samples that share a few directions."""
    samples = gaussian(3 * size, size, seed) @ (torch.eye(size) + gaussian(size, size, seed + 1))
    return samples.T @ samples / len(samples)


def decaying(rows: int, columns: int, rank: int, seed: int) -> LowRank:
    """Return a low-rank map with a spectrum as matrices of models have."""
    return LowRank(
        gaussian(rows, rank, seed) * torch.logspace(0, -1, rank), gaussian(rank, columns, seed + 1)
    )


def plain(rows: int, columns: int, seed: int) -> nn.Linear:
    linear = nn.Linear(columns, rows).double()
    with torch.no_grad():
        linear.weight.copy_(gaussian(rows, columns, seed))
        assert linear.bias is not None
        linear.bias.copy_(gaussian(rows, 1, seed + 1)[:, 0])
    return linear


def low_rank(form: Any, rows: int, columns: int, rank: int, seed: int) -> nn.Module:
    return build(decaying(rows, columns, rank, seed), form, gaussian(rows, 1, seed)[:, 0])


MAKERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "linear": plain,
    "factored": lambda m, n, seed: low_rank("factored", m, n, min(m, n) // 2, seed),
    "pivoted": lambda m, n, seed: low_rank("pivoted", m, n, min(m, n) // 2, seed),
    "rows": lambda m, n, seed: PartialLinear.slice(plain(m, n, seed), "rows", torch.arange(1, m, 2)),
    "columns": lambda m, n, seed: PartialLinear.slice(plain(m, n, seed), "columns", torch.arange(0, n, 2)),
    "narrow": lambda m, n, seed: NarrowLinear.slice(plain(m + 2, n, seed), torch.arange(m), None),
}


def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what `module` computes: a matrix (m, n) and what it adds (m,)."""
    columns: Any = module.in_features
    zero = module(torch.zeros(1, columns, dtype=torch.float64))[0].detach()
    found: Tensor = module(torch.eye(columns, dtype=torch.float64)).detach() - zero
    return found.T, zero


def loss(error: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    return weighted_error(error, Metric(len(inputs), inputs), Metric(len(outputs), outputs))


def written(module: nn.Module, rounded: Any) -> nn.Module:
    """Return a copy of `module` with the rounded leaves in it."""
    changed = copy.deepcopy(module)
    for name, leaf in leaves(changed).items():
        leaf.linear.weight.data = rounded[name].values()
        if leaf.linear.bias is not None:
            leaf.linear.bias.data = rounded[name].bias
    return changed


@pytest.mark.parametrize("kind", MAKERS)
@FAST
@given(rows=st.integers(2, 8), columns=st.integers(2, 8), seed=SEEDS)
def test_an_error_of_a_leaf_costs_what_its_metrics_say(kind: str, rows: int, columns: int, seed: int) -> None:
    module = MAKERS[kind](rows, columns, seed)
    inputs, outputs = correlated(columns, seed), correlated(rows, seed + 7)
    before, _ = affine(module)
    for name in leaves(module):
        changed = copy.deepcopy(module)
        leaf = leaves(module)[name]
        error = gaussian(leaf.linear.out_features, leaf.linear.in_features, seed + 3)
        leaves(changed)[name].linear.weight.data += error
        own = loss(error, *metrics(leaf, inputs, outputs))
        whole = loss(affine(changed)[0] - before, inputs, outputs)
        assert own == pytest.approx(whole, rel=1e-8, abs=1e-8)
        assert changed.get_submodule(name) is leaves(changed)[name].linear


def test_a_pivoted_map_of_full_rank_has_one_leaf() -> None:
    module = low_rank("pivoted", 4, 6, 4, 0)
    assert list(leaves(module)) == ["pivot"]
    inputs, outputs = correlated(6, 0), correlated(4, 1)
    found = written(module, quantise(module, {"pivot": get("int8")}, inputs, outputs))
    assert (
        0
        < loss(affine(found)[0] - affine(module)[0], inputs, outputs)
        < 1e-2 * loss(affine(module)[0], inputs, outputs)
    )


@FAST
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), seed=SEEDS)
def test_mixing_changes_factors_and_not_their_product(rows: int, columns: int, seed: int) -> None:
    rank = min(rows, columns)
    before = decaying(rows, columns, rank, seed)
    after = mixed(before)
    torch.testing.assert_close(after.dense(), before.dense())
    # Balanced: both sides have the same Gram matrix, whose trace is the sum of the singular values.
    gram = after.left.T @ after.left
    torch.testing.assert_close(gram, after.right @ after.right.T)
    assert float(gram.trace()) == pytest.approx(float(torch.linalg.svdvals(before.dense()).sum()))
    other = mixed(before, torch.Generator().manual_seed(1))
    torch.testing.assert_close(other.dense(), before.dense())


def naive(module: nn.Module, storages: dict[str, Any]) -> nn.Module:
    """Return `module` with every leaf at the nearest values, as it stands."""
    changed = copy.deepcopy(module)
    for name, leaf in leaves(changed).items():
        weight = leaf.linear.weight.data
        grid = storages[name].grid(weight)
        leaf.linear.weight.data = grid.rounded(weight.float()).double()
    return changed


@pytest.mark.parametrize(("kind", "bound"), [("factored", 0.25), ("pivoted", 0.5), ("linear", 0.5)])
@pytest.mark.parametrize("storage", ["nf4", "int3"])
def test_rounding_together_beats_rounding_alone(kind: str, bound: float, storage: str) -> None:
    totals = [0.0, 0.0]
    for seed in range(4):
        module = MAKERS[kind](48, 64, 10 * seed)
        inputs, outputs = correlated(64, seed), correlated(48, seed + 7)
        storages = {name: get(storage) for name in leaves(module)}
        aware = written(module, quantise(module, storages, inputs, outputs))
        for place, found in enumerate((aware, naive(module, storages))):
            totals[place] += loss(affine(found)[0] - affine(module)[0], inputs, outputs)
    assert totals[0] < bound * totals[1]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("moments", ["full", "diagonal", "none"])
def test_values_are_of_the_storage_and_what_is_added_stays(kind: str, moments: str) -> None:
    module = MAKERS[kind](12, 10, 0)
    before, added = affine(module)
    full = correlated(10, 0), correlated(12, 1)
    ends: dict[str, Any] = {"full": full, "diagonal": [m.diagonal() for m in full], "none": [None, None]}
    found = quantise(module, {name: get("int8") for name in leaves(module)}, *ends[moments])
    for name, leaf in leaves(module).items():
        rounded, shape = found[name], (leaf.linear.out_features, leaf.linear.in_features)
        stored = get("int8").pack(rounded.codes, rounded.grid)
        assert torch.equal(get("int8").decode(stored, shape), rounded.values().float())
        assert (rounded.bias is None) == (leaf.linear.bias is None)
    after, still = affine(written(module, found))
    torch.testing.assert_close(still, added)
    assert 0 < float((after - before).norm()) < 0.05 * float(before.norm())
    torch.testing.assert_close(affine(module)[0], before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("form", "first", "second"), [("factored", "down", "up"), ("pivoted", "pivot", "rest")]
)
def test_the_second_leaf_is_fitted_to_the_first_as_it_is(form: str, first: str, second: str) -> None:
    module = MAKERS[form](24, 20, 0)
    inputs, outputs = correlated(20, 0), correlated(24, 1)
    before, _ = affine(module)
    found = quantise(module, {first: get("int2"), second: get("int8")}, inputs, outputs)
    rows = found[first].values()
    reached = loss(affine(written(module, found))[0] - before, inputs, outputs)
    # No left factor does better with these rows than least squares, with a metric near to the damped one.
    best = before @ inputs @ rows.T @ torch.linalg.inv(rows @ inputs @ rows.T) @ rows
    least = loss(best - before, inputs, outputs)
    if form == "factored":
        assert least * (1 - 1e-9) <= reached < 1.05 * least
    else:
        places = module.map().skeleton  # type: ignore[operator]
        kept = before.clone()
        kept[places.pivots] = rows
        kept[places.rest] = module.rest.weight.detach() @ rows  # type: ignore[union-attr, operator]
        assert least < reached < 0.7 * loss(kept - before, inputs, outputs)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_maps_that_vanish_are_rounded_to_zero(form: str) -> None:
    module = FactoredLinear(4, 6, 2) if form == "factored" else PivotedLinear(4, 6, 2)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    found = quantise(
        module, {name: get("nf4") for name in leaves(module)}, correlated(4, 0), correlated(6, 1)
    )
    assert all(bool((rounded.values() == 0).all()) for rounded in found.values())


def test_what_has_no_leaves_is_refused() -> None:
    factored = FactoredLinear(4, 6, 2)
    with pytest.raises(ModelError, match="LayerNorm has no known linear leaves: legal are nn.Linear"):
        leaves(nn.LayerNorm(3))
    with pytest.raises(ConfigError, match=r"storages for \['up'\]: give one for each of the leaves \['down'"):
        quantise(factored, {"up": get("nf4")}, None, None)
    with pytest.raises(ConfigError, match=r"metric of shape \(3, 3\) for a side of 4"):
        quantise(factored, {name: get("nf4") for name in leaves(factored)}, torch.eye(3), None)
    factored.up = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ModelError, match="a module of type Identity in place of an nn.Linear: leaves are"):
        leaves(factored)
