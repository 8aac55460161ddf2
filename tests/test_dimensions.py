"""Hidden dimensions: what shapes suggest and behaviour verifies, narrow linears, and the budget over both."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import eckart
from eckart import ConfigError, ModelError, Override, RankError, Recipe, budget, dimensions, models
from eckart import dense as dense_module
from eckart.choices import Budget, Choice
from eckart.dimensions import Dimension
from eckart.factors import NarrowLinear
from eckart.menus import Estimates

from . import tiny
from .conftest import Compress, logits
from .test_linalg import FAST, SEEDS, gaussian, seeded

NAMES = list(tiny.LINEAR)


def found(model: Any) -> list[Dimension]:
    return dimensions.find(model, models.targets(model))


def some_units(dimension: Dimension, seed: int) -> Tensor:
    generator = seeded(seed)
    count = int(torch.randint(1, dimension.units, (), generator=generator))
    return torch.randperm(dimension.units, generator=generator)[:count].sort().values


def put(model: Any, modules: dict[str, NarrowLinear]) -> Any:
    for name, module in modules.items():
        models.replace(model, name, module)
    return model


# found by shapes, verified by behaviour


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_an_mlp_in_every_block(name: str) -> None:
    model = tiny.build(name)
    verified = dimensions.verified(model, found(model))
    mlps = [dimension for dimension in verified if dimension.kind == "mlp"]
    config = model.config
    assert {mlp.units for mlp in mlps} == {getattr(config, "intermediate_size", None) or config.ffn_dim}
    for block in models.block_names(model):
        assert sum(f"{mlp.name}.".startswith(f"{block}.") for mlp in mlps) == 1
    assert {m for dimension in verified for m in dimension.members} <= set(models.linear_names(model))


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_model_is_the_one_with_the_columns_zeroed(name: str) -> None:
    reference = tiny.build(name, torch.float64)
    whole = logits(reference, tiny.tokens())
    tolerance = 1e-10 * float(whole.abs().max())
    for seed, dimension in enumerate(dimensions.verified(reference, found(reference))):
        kept = some_units(dimension, seed)
        narrow = put(tiny.build(name, torch.float64), dimensions.narrowed(reference, dimension, kept))
        zeroed = tiny.build(name, torch.float64)
        weight = models.find(zeroed, dimension.reader).weight.data.view(-1, dimension.units, weight_block(
            zeroed, dimension))  # fmt: skip
        gone = [unit for unit in range(dimension.units) if unit not in kept.tolist()]
        weight[:, gone] = 0
        expected = logits(zeroed, tiny.tokens())
        assert torch.allclose(logits(narrow, tiny.tokens()), expected, rtol=0, atol=tolerance)
        assert not torch.allclose(whole, expected, rtol=0, atol=tolerance)
        assert models.parameter_count(narrow) < models.parameter_count(zeroed)


def weight_block(model: Any, dimension: Dimension) -> int:
    return models.find(model, dimension.reader).in_features // dimension.units


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_full_width_is_the_original_exactly(name: str, dtype: torch.dtype) -> None:
    model = tiny.build(name, dtype)
    before = logits(model, tiny.tokens())
    for dimension in dimensions.verified(model, found(model)):
        put(model, dimensions.narrowed(model, dimension, torch.arange(dimension.units)))
    assert any(isinstance(module, NarrowLinear) for module in model.modules())
    assert torch.equal(logits(model, tiny.tokens()), before)


def test_verification_leaves_the_model_as_it_is() -> None:
    model = tiny.build("opt")  # its attention fails, so that the error path is taken too
    before, modules = logits(model, tiny.tokens()), dict(model.named_modules())
    assert len(dimensions.verified(model, found(model))) < len(found(model))
    assert torch.equal(logits(model, tiny.tokens()), before)
    assert all(module is modules[name] for name, module in model.named_modules())


def test_modules_come_back_after_an_error() -> None:
    model = tiny.build("llama")
    name = "model.layers.0.mlp.up_proj"
    before = model.get_submodule(name)

    def fail() -> None:
        with dimensions.swapped(model, {name: nn.Linear(32, 48)}):
            assert model.get_submodule(name) is not before
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert model.get_submodule(name) is before


class Between(nn.Module):
    """An MLP of two matrices with anything at all between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], inner: int = 48) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, inner), nn.Linear(inner, 32)
        self.between = between

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., 32) to (..., 32)."""
        out: Tensor = self.down(self.between(self.up(inputs)))
        return out


class ReadTwice(Between):
    """Something else than the reader sees the channels."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `inputs` (..., 32) to (..., 32)."""
        out: Tensor = self.up(inputs).mean(-1, keepdim=True)
        return super().forward(inputs) + out


def with_mlp(*mlps: nn.Module) -> Any:
    model = tiny.build("llama")
    for layer, mlp in zip(model.model.layers, mlps, strict=False):
        torch.manual_seed(1)
        for parameter in mlp.parameters():
            nn.init.normal_(parameter, std=0.3)
        layer.mlp = mlp
    return model.eval()


def first_mlp(model: Any) -> Dimension:
    return next(d for d in found(model) if d.name == "model.layers.0.mlp")


@pytest.mark.parametrize(
    ("mlp", "legal"),
    [
        (Between(torch.relu), True),
        (Between(lambda hidden: hidden.sigmoid() * hidden), True),
        (Between(lambda hidden: nn.functional.normalize(hidden, dim=-1)), False),
        pytest.param(
            Between(lambda hidden: nn.functional.rms_norm(hidden, hidden.shape[-1:])),
            False,
        ),
        (Between(nn.LayerNorm(48, elementwise_affine=False)), False),
        (Between(lambda hidden: hidden.softmax(-1)), False),
        (Between(lambda hidden: hidden.cumsum(-1).tanh()), False),
        (Between(lambda hidden: torch.relu(hidden) * hidden.roll(1, -1)), False),
        (Between(lambda hidden: torch.relu(hidden).view(*hidden.shape[:-1], 6, 8).flatten(-2)), False),
        (ReadTwice(torch.relu), False),
    ],
    ids=["relu", "gated", "unit", "rms", "layer", "softmax", "sum", "roll", "shape", "twice"],
)  # fmt: skip
def test_what_mixes_channels_is_rejected(mlp: nn.Module, legal: bool) -> None:
    model = with_mlp(mlp)
    dimension = first_mlp(model)
    assert (dimension.kind, dimension.units) == ("mlp", 48)
    assert dimensions.holds(model, dimension) is legal
    assert (dimension in dimensions.verified(model, found(model))) is legal


def test_what_has_no_effect_is_not_verified() -> None:
    mlp = Between(torch.relu)
    model = with_mlp(mlp)
    nn.init.zeros_(mlp.down.weight)
    assert not dimensions.holds(model, first_mlp(model))


def test_one_of_each_build_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_mlp(Between(torch.relu, 40))
    tried: list[str] = []

    def holds(model: Any, dimension: Dimension) -> bool:
        tried.append(dimension.name)
        return True

    monkeypatch.setattr(dimensions, "holds", holds)
    assert dimensions.verified(model, found(model)) == found(model)
    assert tried == ["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.mlp"]


def test_a_dimension_lacks_none_of_its_linears() -> None:
    model = tiny.build("llama")
    targets = models.targets(model, include=["embed_tokens", "*.mlp.*"], exclude=["layers.0.mlp.up_proj"])
    verified = dimensions.verified(model, dimensions.find(model, targets))
    assert [dimension.name for dimension in verified] == ["model.layers.1.mlp"]
    assert dimensions.find(model, models.targets(model, ["embed_tokens"])) == []


def test_a_square_mlp_is_not_taken_for_one() -> None:
    """Which of two equal shapes reads the other cannot be told from the shapes."""
    assert all(d.kind != "mlp" or "layers.1" in d.name for d in found(with_mlp(Between(torch.relu, 32))))


def test_a_fused_gate_is_sliced_in_both_halves() -> None:
    dimension = next(d for d in found(tiny.build("phi3")) if d.kind == "mlp")
    assert [copies for _, copies in dimension.writers] == [2]
    made = dimensions.narrowed(tiny.build("phi3"), dimension, torch.tensor([1, 4]))
    fused = models.find(tiny.build("phi3"), dimension.writers[0][0]).weight
    assert torch.equal(made[dimension.writers[0][0]].weight, fused[[1, 4, 49, 52]])


# narrow linears


@given(
    copies=st.integers(1, 3), units=st.integers(2, 6), block=st.integers(1, 3), seed=SEEDS, bias=st.booleans()
)
@FAST
def test_padding_gives_the_same_function(copies: int, units: int, block: int, seed: int, bias: bool) -> None:
    generator = seeded(seed)
    size = units * block
    torch.manual_seed(seed)
    writer = nn.Linear(5, copies * size, bias, dtype=torch.float64)
    reader = nn.Linear(size, 4, bias, dtype=torch.float64)
    kept = torch.randperm(units, generator=generator)[: 1 + seed % units].sort().values
    rows = dimensions.indices(copies * size, units, copies, kept)
    columns = dimensions.indices(size, units, 1, kept)
    first = NarrowLinear.slice(writer, rows, None, copies)
    second = NarrowLinear.slice(reader, None, columns)
    assert (first.whole, second.whole) == ((copies * size, 5), (4, size))
    inputs = gaussian(7, 5, generator)

    def run(up: Callable[[Tensor], Tensor], down: Callable[[Tensor], Tensor]) -> Tensor:
        return down(up(inputs).view(7, copies, -1).tanh().prod(-2))

    wide = [dense_module.dense_linear(module) for module in (first, second)]
    assert [tuple(module.weight.shape) for module in wide] == [first.whole, second.whole]
    expected = run(first, second)
    assert torch.allclose(run(*wide), expected, rtol=0, atol=1e-12)
    zeroed = torch.zeros_like(reader.weight)
    zeroed[:, columns] = reader.weight[:, columns].detach()
    masked = run(writer, lambda hidden: nn.functional.linear(hidden, zeroed, reader.bias))
    assert torch.allclose(masked, expected, rtol=0, atol=1e-12)
    if len(kept) < units:
        assert not torch.allclose(run(writer, reader), expected, rtol=0, atol=1e-12)


def test_a_slice_is_a_copy_without_gradient_history() -> None:
    linear = nn.Linear(4, 6)
    made = NarrowLinear.slice(linear, torch.arange(6), torch.arange(4))
    assert made.weight.is_leaf
    assert made.weight.requires_grad
    made.weight.data.zero_()
    assert linear.weight.abs().sum() > 0
    assert torch.equal(dimensions.indices(12, 3, 2, torch.tensor([0, 2])), torch.tensor([0, 1, 4, 5, 6, 7, 10, 11]))  # fmt: skip  # noqa: E501


# the budget over ranks, widths and blocks


class Setup:
    """A tiny model with losses drawn at random, all of them falling."""

    def __init__(self, seed: int, name: str = "llama") -> None:
        self.model = tiny.build(name)
        self.targets = models.targets(self.model)
        self.dimensions = dimensions.verified(self.model, found(self.model))
        generator = seeded(seed)
        sizes = {target.name: min(target.shape) for target in self.targets}
        sizes |= {dimension.name: dimension.units for dimension in self.dimensions}
        self.losses = {name: falling(size, generator) for name, size in sizes.items()}
        names = models.block_names(self.model)[1:]
        self.blocks = {name: 3 * float(torch.rand((), generator=generator)) for name in names}

    @property
    def size(self) -> int:
        return sum(target.size for target in self.targets)

    def choose(self, recipe: Recipe, limit: int, exchange: float = 1.0, blocks: bool = False) -> list[Choice]:
        return budget.choose(
            recipe, Budget(limit, "the budget"), self.targets, self.dimensions, Estimates(self.losses),
            exchange=exchange, blocks=self.blocks if blocks else None,
        )  # fmt: skip

    def loss(self, choices: Sequence[Choice]) -> float:
        readers = {dimension.reader: dimension.name for dimension in self.dimensions}
        members = {name for dimension in self.dimensions for name in dimension.members}
        total = sum(
            self.blocks[block]
            for block in self.blocks
            if any(c.form == "dropped" and c.target.name.startswith(f"{block}.") for c in choices)
        )
        for choice in choices:
            name = choice.target.name
            if choice.form == "narrow":
                assert name in members
                total += float(self.losses[readers[name]][choice.rank]) if name in readers else 0.0
            elif choice.form not in ("dense", "dropped"):
                total += float(self.losses[name][choice.rank])
        return total


def falling(size: int, generator: torch.Generator) -> Tensor:
    """Convex losses of every rank, the last of them 0."""
    steps = torch.rand(size, generator=generator, dtype=torch.float64).sort().values
    return torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0) / size]).flip(0)


def cost(choices: Sequence[Choice]) -> int:
    return sum(choice.parameters for choice in choices)


RECIPES = {
    "width": Recipe(keep=0.5, form="width"),
    "mixed": Recipe(keep=0.5, form="mixed"),
    "width-uniform": Recipe(keep=0.5, form="width", allocation="uniform"),
    "mixed-uniform": Recipe(keep=0.5, form="mixed", allocation="uniform"),
    "width-8": Recipe(keep=0.5, form="width", multiple=8),
    "mixed-7": Recipe(keep=0.5, form="mixed", multiple=7),
}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", RECIPES)
def test_a_budget_is_never_exceeded_and_more_of_it_never_hurts(kind: str, blocks: bool) -> None:
    setup, recipe = Setup(1), RECIPES[kind]
    seen: list[tuple[int, float]] = []
    for share in range(20, 102, 2):
        limit = setup.size * share // 100
        try:
            choices = setup.choose(recipe, limit, blocks=blocks)
        except RankError:
            assert not seen, "what was reachable stays reachable"
            continue
        assert [choice.target for choice in choices] == setup.targets
        assert cost(choices) <= limit
        assert all(
            choice.rank % recipe.step() == 0
            for choice in choices
            if choice.form == "pivoted" or (choice.form == "narrow" and choice.units == 48)
        )
        seen.append((cost(choices), setup.loss(choices)))
    assert len(seen) > 10
    # Ranks cost unequal steps: between breakpoints the filling is off by one hull step at most.
    slack = 0.06 if kind == "mixed" else 1e-12
    assert all(second <= first + slack for (_, first), (_, second) in pairwise(seen))
    assert seen[-1][1] <= 1e-9 or blocks
    assert seen[0][1] > seen[-1][1]


@given(seed=SEEDS, share=st.floats(0.2, 1.0))
@FAST
def test_members_of_a_dimension_go_together(seed: int, share: float) -> None:
    setup = Setup(seed)
    choices = {c.target.name: c for c in setup.choose(RECIPES["mixed"], int(setup.size * share))}
    for dimension in setup.dimensions:
        widths = {
            choice.rank if choice.form == "narrow" else 0
            for choice in map(choices.__getitem__, dimension.members)
        }
        assert len(widths) == 1
        assert all(choices[name].units in (0, dimension.units) for name in dimension.members)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_the_exchange_rate_decides_between_ranks_and_widths_of_mlps(share: float) -> None:
    setup = Setup(3)
    mlps = {name for d in setup.dimensions if d.kind == "mlp" for name in d.members}

    def forms(rate: float) -> set[str]:
        choices = setup.choose(RECIPES["mixed"], int(setup.size * share), exchange=rate)
        return {str(choice.form) for choice in choices if choice.target.name in mlps} - {"dense"}

    assert forms(1e9) == {"narrow"}
    assert forms(1e-9) <= {"pivoted"}


def test_a_block_is_dropped_where_that_is_cheapest() -> None:
    setup = Setup(4)
    (block,) = setup.blocks
    inside = [target.name for target in setup.targets if target.name.startswith(f"{block}.")]
    for loss, expected in ((1e-6, {"dropped"}), (1e6, set[str]())):
        setup.blocks[block] = loss
        choices = setup.choose(RECIPES["mixed"], setup.size // 2, blocks=True)
        gone = {c.target.name for c in choices if c.form == "dropped"}
        assert gone == (set(inside) if expected else set())
        assert cost(choices) <= setup.size // 2


def test_a_dimension_with_a_matrix_that_is_ruled_stays_whole() -> None:
    setup = Setup(5)
    recipe = Recipe(keep=0.5, form="mixed", overrides=(Override("layers.0.mlp.up_proj", rank=4),))
    choices = {c.target.name: c for c in setup.choose(recipe, setup.size * 6 // 10)}
    assert (choices["model.layers.0.mlp.up_proj"].form, choices["model.layers.0.mlp.up_proj"].rank) == (
        "pivoted",
        4,
    )
    assert choices["model.layers.0.mlp.gate_proj"].form != "narrow"
    assert choices["model.layers.0.mlp.down_proj"].form != "narrow"


@pytest.mark.parametrize("kind", ["width", "width-uniform", "width-8"])
def test_an_unreachable_width_says_what_can_be_had(kind: str) -> None:
    setup, recipe = Setup(6), RECIPES[kind]
    with pytest.raises(RankError, match=r"the budget cannot be reached: .* the least is \d+; raise the bud") as caught:  # fmt: skip  # noqa: E501
        setup.choose(recipe, 10)
    least = int(str(caught.value).split("the least is ")[1].split(";")[0])
    assert cost(setup.choose(recipe, least)) <= least
    with pytest.raises(RankError):
        setup.choose(recipe, least - 1)


# on models


@pytest.mark.parametrize(
    "options",
    [
        {"form": "width", "keep": 0.75},
        {"form": "width", "keep": 0.75, "allocation": "uniform"},
        {"form": "width", "method": "svd", "keep": 0.75},
        {"form": "mixed", "method": "svd-llm", "keep": 0.5},
        {"form": "mixed", "keep": 0.4},
        {"form": "width", "keep": 0.9, "exclude": ["layers.0.mlp.*"]},
        {"form": "width", "keep": 0.9, "exclude": ["self_attn.*"]},
        {"form": "mixed", "keep": 0.5, "include": ["*"]},
        {"form": "width", "keep": 0.9, "include": ["*"]},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "phi3"])
def test_budgets_hold_on_models(name: str, options: dict[str, Any], compress: Compress) -> None:
    if name == "phi3" and "exclude" in options:
        options = options | {"exclude": ["layers.1.mlp.*"]}
    model, result = compress(tiny.build(name), of="linears", **options)
    assert options["keep"] - 0.13 < result.keep_linears <= options["keep"]
    assert result.after.model == models.parameter_count(model)
    assert any(row.form == "narrow" for row in result.modules) or options["form"] == "mixed"
    for row in result.modules:
        module = model.get_submodule(row.name)
        assert isinstance(module, NarrowLinear) is (row.form == "narrow")
        assert row.loss >= 0
        assert row.energy <= 1 + 1e-9


def test_nothing_is_needed_to_narrow_by_the_weights_alone() -> None:
    model, result = eckart.compress(tiny.build("llama"), method="svd", form="width", keep=0.7, of="linears")
    assert result.keep_linears <= 0.7
    assert result.calibration_tokens == 0
    assert {row.form for row in result.modules} == {"dense", "narrow"}
    assert logits(model, tiny.tokens()).isfinite().all()


def test_a_multiple_that_does_not_divide_and_one_that_is_too_large(compress: Compress) -> None:
    text = ("unused",)
    _, result = compress(
        tiny.build("llama"), recipe=Recipe(keep=0.7, of="linears", form="width", multiple=7, text=text)
    )
    widths = {row.rank for row in result.modules if row.form == "narrow" and ".mlp." in row.name}
    assert widths
    assert all(width % 7 == 0 for width in widths)
    large = Recipe(keep=0.7, of="linears", form="width", multiple=64, text=text)
    with pytest.raises(RankError, match="cannot be reached"):
        compress(tiny.build("llama"), recipe=large, keep=0.5, of="linears", exclude=["self_attn.*"])


def test_a_model_without_such_an_mlp_is_refused(compress: Compress) -> None:
    message = "LlamaForCausalLM has no MLP that can be made narrower among the treated matrices: .* use form"
    with pytest.raises(ModelError, match=message):
        compress(tiny.build("llama"), form="width", keep=1.0, include=["q_proj", "up_proj"])
    mixing = [Between(lambda hidden: hidden.softmax(-1)) for _ in range(2)]
    with pytest.raises(ModelError, match=message):
        compress(with_mlp(*mixing), form="width", keep=0.9, of="linears")


@pytest.mark.parametrize("rule", [{"dense": True}, {"rank": 4}, {"keep": 0.5}])
def test_a_rule_on_one_matrix_with_widths(rule: dict[str, Any], compress: Compress) -> None:
    overrides = [Override("layers.0.mlp.up_proj", **rule)]
    if "dense" in rule:
        _, result = compress(tiny.build("llama"), form="width", keep=0.9, of="linears", overrides=overrides)
        assert result.modules[5].form == "dense"
    else:  # there is no rank in form width: silence would leave the matrix dense
        with pytest.raises(ConfigError, match="rank"):
            compress(tiny.build("llama"), form="width", keep=0.9, of="linears", overrides=overrides)
