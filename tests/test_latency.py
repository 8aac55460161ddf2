"""Plans in time: laws of the plan given a table of times, and the whole way from a command to a report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

import eckart
from eckart import (
    ConfigError,
    ModelError,
    Override,
    RankError,
    Recipe,
    budget,
    hub,
    kinds,
    latency,
    models,
    selection,
    timekeeping,
)
from eckart import recipe as recipes
from eckart import timed as in_time
from eckart.choices import Budget, Choice
from eckart.cli import app
from eckart.dimensions import Dimension
from eckart.factors import FORMS, Form, parameters
from eckart.latency import Seconds, Share
from eckart.menus import Estimates
from eckart.models import Target
from eckart.ranks import legal_ranks
from eckart.recipe import from_mapping, to_yaml
from eckart.speed import grid, passing
from eckart.speed.options import Rounds
from eckart.speed.times import Kind, Row, Times, Where
from eckart.timed import Timed

from . import tiny
from .test_dimensions import Setup
from .test_linalg import FAST, SEEDS

WHERE = Where("cpu", "a processor", "float32", 1, "2.0")
TEXT = ("t.txt",)
NANO = 1e-9
FACTORED = Recipe(latency=0.5, method="io-svd", form="factored", allocation="curvature", text=TEXT)
PIVOTED = replace(FACTORED, form="pivoted")
MIXED = Recipe(latency=0.5, text=TEXT)


def rows_of(kind: Kind, shape: tuple[int, int], seconds: Any) -> list[Row]:
    """A row of `kind` at every rank; `seconds` (kind, shape, rank) is in nanoseconds."""
    ranks: Sequence[int] = [min(shape)]
    if kind in FORMS:
        ranks = legal_ranks(kind, shape)
    elif kind != "dense":
        ranks = range(1, shape[0] if kind == "rows" else shape[1])
    return [
        Row(shape, kind, rank, 1, took, took, took, 3)
        for rank in ranks
        for took in [seconds(kind, shape, rank) * NANO]
    ]


def table(targets: Sequence[Target], seconds: Any, kinds: Sequence[Kind] = ("dense", *FORMS)) -> Times:
    shapes = dict.fromkeys(target.shape for target in targets)
    return Times(WHERE, tuple(row for s in shapes for kind in kinds for row in rows_of(kind, s, seconds)))


def weights(kind: Kind, shape: tuple[int, int], rank: int) -> int:
    if kind == "factored" or kind == "pivoted":
        return parameters(kind, shape, rank)
    return {"rows": rank * shape[1], "columns": rank * shape[0]}.get(kind, shape[0] * shape[1])


def proportional(kind: Kind, shape: tuple[int, int], rank: int) -> float:
    return 1000.0 * weights(kind, shape, rank)


def stepped(kind: Kind, shape: tuple[int, int], rank: int) -> float:
    """Overhead for each product, and plateaus."""
    return 20_000.0 * (kind in FORMS) + 1000.0 * (weights(kind, shape, rank) // 64 + 1) * 64


@cache
def setup_of(seed: int) -> Setup:
    return Setup(seed % 5)


def plan(
    setup: Setup, recipe: Recipe, limit: Budget, dimensions: Sequence[Dimension] = (), blocks: bool = False
) -> list[Choice]:
    return budget.choose(
        recipe, limit, setup.targets, dimensions, Estimates(setup.losses),
        blocks=setup.blocks if blocks else None,
    )  # fmt: skip


def lost(setup: Setup, choices: Sequence[Choice]) -> float:
    return sum(float(setup.losses[c.target.name][c.rank]) for c in choices if c.form != "dense")


ALL: tuple[Kind, ...] = ("dense", "factored", "pivoted", "rows", "columns")


# laws


@given(seed=SEEDS, share=st.floats(0.05, 1.0), form=st.sampled_from(FORMS))
@FAST
def test_with_times_proportional_to_parameters_the_plan_is_that_of_size(
    seed: int, share: float, form: Form
) -> None:
    setup = setup_of(seed)
    timed = Timed.of(table(setup.targets, proportional), 1)
    recipe = replace(FACTORED, form=form)
    limit = int(share * setup.size)
    by_size = Recipe(keep=share, method="io-svd", form=form, allocation="curvature", text=TEXT)
    expected: Any
    try:
        expected = plan(setup, by_size, Budget(limit, "the budget"))
    except RankError:
        with pytest.raises(RankError, match="cannot be reached"):
            plan(setup, recipe, in_time.in_time(timed, Share(limit / setup.size), setup.targets))
        return
    found = plan(setup, recipe, in_time.in_time(timed, Share(limit / setup.size), setup.targets))
    assert found == expected
    assert timed.timing("latency", setup.targets, found).planned == pytest.approx(
        1000 * NANO * sum(choice.parameters for choice in found)
    )
    other = plan(
        setup, recipe, in_time.in_time(Timed.of(table(setup.targets, stepped), 1), Share(1.0), setup.targets)
    )
    assert all(choice.form == "dense" for choice in other)


@given(seed=SEEDS, share=st.floats(0.05, 1.0))
@FAST
def test_widths_as_well(seed: int, share: float) -> None:
    setup = setup_of(seed)
    timed = Timed.of(table(setup.targets, proportional, ALL), 1)
    limit = int(share * setup.size)
    by_size = replace(MIXED, latency=None, keep=share, depth=True)
    expected = plan(setup, by_size, Budget(limit, "the budget"), setup.dimensions, blocks=True)
    own = Budget(1000 * limit, "the time", str, timed.cost, timed.admits, timed.step)
    assert plan(setup, replace(MIXED, depth=True), own, setup.dimensions, blocks=True) == expected


@given(
    seed=SEEDS,
    share=st.floats(0.05, 1.0),
    per_token=st.booleans(),
    law=st.sampled_from([proportional, stepped]),
)
@FAST
def test_the_time_of_the_plan_is_within_the_budget_and_nothing_is_slower_than_dense(
    seed: int, share: float, per_token: bool, law: Any
) -> None:
    setup = setup_of(seed)
    timed = Timed.of(table(setup.targets, law, ALL), 1)
    whole = timed.total(setup.targets)
    asked = Seconds(share * whole * NANO) if per_token else Share(share)
    try:
        found = plan(setup, MIXED, in_time.in_time(timed, asked, setup.targets), setup.dimensions)
    except RankError as error:
        # What the message names can be had.
        named = float(str(error).partition("the least is latency ")[2].split()[0])
        assert named > share - 1e-3
        plan(setup, MIXED, in_time.in_time(timed, Share(named), setup.targets), setup.dimensions)
        return
    timing = timed.timing("latency", setup.targets, found)
    assert timing.planned <= share * timing.dense * (1 + 1e-9)
    assert timing.dense == pytest.approx(whole * NANO)
    assert timing.slower == 0
    assert all(timed.cost(c) < timed.dense(c.target) for c in found if c.form != "dense")
    if share < 0.99:
        assert any(choice.form != "dense" for choice in found)


@given(seed=SEEDS, first=st.floats(0.3, 1.0), second=st.floats(0.3, 1.0))
@FAST
def test_a_larger_budget_never_loses_more(seed: int, first: float, second: float) -> None:
    """Where losses are convex and times linear, so that every option is on the hull of its curve."""
    setup = setup_of(seed)
    targets = setup.targets
    convex: dict[str, Tensor] = {}
    for place, target in enumerate(targets):
        size = min(target.shape)
        convex[target.name] = torch.arange(size, -1, -1, dtype=torch.float64) ** 2 * (1.0 + place)

    def linear(kind: Kind, shape: tuple[int, int], rank: int) -> float:
        return 1000.0 * (rank if kind in FORMS else min(shape) + 1) * shape[0]

    timed = Timed.of(table(targets, linear), 1)

    def loss(share: float) -> float:
        limit = in_time.in_time(timed, Share(share), targets)
        found = budget.choose(FACTORED, limit, targets, (), Estimates(convex))
        return sum(float(convex[c.target.name][c.rank]) for c in found)

    small, large = sorted((first, second))
    assert loss(large) <= loss(small)
    assert loss(0.2) > loss(1.0) == 0.0


@given(seed=SEEDS, keep=st.floats(0.3, 0.9))
@FAST
def test_where_no_form_is_faster_everything_stays_dense(seed: int, keep: float) -> None:
    setup = setup_of(seed)

    def slow(kind: Kind, shape: tuple[int, int], rank: int) -> float:
        return 1000.0 * shape[0] * shape[1] * (2 if kind in FORMS else 1)

    timed = Timed.of(table(setup.targets, slow), 1)
    limit = in_time.in_time(timed, Share(1.0), setup.targets)
    found = plan(setup, PIVOTED, limit)
    assert {choice.form for choice in found} == {"dense"}
    assert timed.timing("latency", setup.targets, found).never_faster == len(found)
    with pytest.raises(RankError, match=r"latency 0.9 cannot be reached: .* the least is latency 1 \("):
        plan(setup, PIVOTED, in_time.in_time(timed, Share(0.9), setup.targets))
    size = Budget(int(keep * setup.size), f"keep {keep}")
    with pytest.raises(RankError, match="with nothing slower than dense cannot be reached"):
        plan(setup, PIVOTED, in_time.within(timed, "balanced", size, setup.targets))
    # In time alone, the budget in size is only where the time to spend comes from.
    spent = in_time.within(timed, "latency", size, setup.targets)
    assert {choice.form for choice in plan(setup, PIVOTED, spent)} == {"dense"}
    assert any(choice.form == "pivoted" for choice in plan(setup, PIVOTED, size))


@given(seed=SEEDS, keep=st.floats(0.4, 0.95))
@FAST
def test_balanced_holds_the_size_and_offers_nothing_slower(seed: int, keep: float) -> None:
    setup = setup_of(seed)
    small = min(setup.targets, key=lambda target: target.size).shape

    def mixed(kind: Kind, shape: tuple[int, int], rank: int) -> float:
        return proportional(kind, shape, rank) * (3 if kind in FORMS and shape == small else 1)

    timed = Timed.of(table(setup.targets, mixed), 1)
    size = Budget(int(keep * setup.size), f"keep {keep}")
    found = plan(setup, PIVOTED, in_time.within(timed, "balanced", size, setup.targets))
    assert sum(choice.parameters for choice in found) <= size.limit  # type: ignore[operator]
    assert all(timed.admits(choice) for choice in found)
    own = [c for c in found if c.target.shape == small and c.form != "dense"]
    assert all(parameters("pivoted", small, c.rank) * 3 < small[0] * small[1] for c in own)
    fast = Timed.of(table(setup.targets, proportional), 1)
    unchanged = plan(setup, PIVOTED, in_time.within(fast, "balanced", size, setup.targets))
    assert unchanged == plan(setup, PIVOTED, size)


@given(seed=SEEDS, keep=st.floats(0.3, 0.95))
@FAST
def test_objective_latency_takes_no_longer_than_the_plan_of_size(seed: int, keep: float) -> None:
    setup = setup_of(seed)
    size = Budget(int(keep * setup.size), f"keep {keep}")
    for law in (proportional, stepped):
        timed = Timed.of(table(setup.targets, law), 1)
        first = plan(setup, PIVOTED, replace(size, step=timed.step))
        found = plan(setup, PIVOTED, in_time.within(timed, "latency", size, setup.targets))
        taken = [sum(map(timed.cost, choices)) for choices in (first, found)]
        assert taken[1] <= min(taken[0], timed.total(setup.targets))
        assert all(map(timed.admits, found))
        if law is proportional:
            assert lost(setup, found) <= lost(setup, first) + 1e-9


@given(seed=SEEDS, share=st.floats(0.3, 0.95))
@FAST
def test_ranks_are_multiples_of_what_the_recipe_or_the_table_says(seed: int, share: float) -> None:
    setup = setup_of(seed)

    def odd_is_slow(kind: Kind, shape: tuple[int, int], rank: int) -> float:
        return proportional(kind, shape, rank) * (1.3 if kind in FORMS and rank % 4 else 1.0)

    rows = table(setup.targets, odd_is_slow)
    for multiple, legal in ((None, (1, 4)), (3, (3,))):
        timed = Timed.of(rows, 1, multiple)
        found = plan(setup, PIVOTED, in_time.in_time(timed, Share(share), setup.targets))
        steps = {step.shape: step for step in timed.steps.values() if step.form == "pivoted"}
        assert {step.multiple for step in steps.values()} <= set(legal)
        assert all(c.rank % steps[c.target.shape].multiple == 0 for c in found if c.form == "pivoted")
        assert (steps[setup.targets[0].shape].why == "the recipe says so") == (multiple is not None)
        remarks = timed.timing("latency", setup.targets, found).remarks()
        assert any(said.startswith("ranks are multiples of") for said in remarks)


def test_on_a_plateau_the_largest_rank_is_taken() -> None:
    target = Target("a", (64, 48))

    def plateaus(kind: Kind, shape: tuple[int, int], rank: int) -> float:
        return 10_000.0 if kind == "dense" else 1000.0 * -(-rank // 8)

    timed = Timed.of(table([target], plateaus), 1)
    losses = {"a": torch.linspace(1, 0, 49, dtype=torch.float64)}
    limit = in_time.in_time(timed, Share(0.37), [target])
    (found,) = budget.choose(PIVOTED, limit, [target], (), Estimates(losses))
    assert found.rank == 24


def test_overrides_that_are_slower_are_said() -> None:
    setup = setup_of(0)
    timed = Timed.of(
        table(setup.targets, lambda k, s, r: proportional(k, s, r) * (3 if k in FORMS and r > 12 else 1)), 1
    )
    recipe = replace(PIVOTED, overrides=(Override("*q_proj", rank=15),), method="eckart")
    found = plan(setup, recipe, in_time.in_time(timed, Share(1.0), setup.targets))
    slower = [choice for choice in found if not timed.admits(choice)]
    assert [choice.rank for choice in slower] == [15, 15]
    timing = timed.timing("latency", setup.targets, found)
    assert timing.slower == 2
    assert any(said == "matrices that overrides make slower than dense: 2" for said in timing.remarks())


def test_what_has_no_time_is_refused() -> None:
    target, timed = Target("a", (8, 4)), Timed.of(Times(WHERE), 7)
    with pytest.raises(ModelError, match="a: the table has no times of dense maps of 8 x 4 for 7 tokens"):
        timed.dense(target)
    with pytest.raises(ModelError, match="no times are measured of maps that are partial with others"):
        timed.cost(Choice(target, "partial", 2, 4))
    with pytest.raises(ModelError, match="is a table, which takes no time like that of a map"):
        in_time.wanted([Target("t", (8, 4), embedding=True)], "pivoted", [])
    model = tiny.build("mixtral")
    kinds.unfold(model)
    with pytest.raises(ModelError, match="belongs to an expert, which runs for some tokens only"):
        timekeeping.timed(MIXED, model, models.targets(model), torch.device("cpu"), torch.float32)


def test_the_plan_before_the_losses_are_known_is_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(1)
    timed = Timed.of(table(setup.targets, proportional), 1)
    for share in (0.3, 0.6, 1.0):
        limit = in_time.in_time(timed, Share(share), setup.targets)
        found = selection.unseen(PIVOTED, limit, setup.model, setup.targets, [])
        assert sum(map(timed.cost, found)) <= share * timed.total(setup.targets)
        assert any(choice.form == "pivoted" for choice in found) == (share < 1)
    with pytest.raises(
        RankError, match=r"latency 0.001 cannot be reached: .* the least is latency 0\.\d+ \("
    ):
        selection.unseen(
            PIVOTED, in_time.in_time(timed, Share(0.001), setup.targets), setup.model, setup.targets, []
        )


# what is written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0.6, Share(0.6)), ("0.6", Share(0.6)), (1, Share(1.0)), ("12ms", Seconds(0.012)),
        (" 800 us ", Seconds(8e-4)), ("0.02S", Seconds(0.02)), ("1e-3s", Seconds(1e-3)),
    ],
)  # fmt: skip
def test_a_budget_in_time_is_a_share_or_a_time(text: Any, expected: Share | Seconds) -> None:
    found = latency.parse(text)
    assert type(found) is type(expected)
    assert next(iter([getattr(found, n) for n in found.__slots__])) == pytest.approx(
        next(iter([getattr(expected, n) for n in expected.__slots__]))
    )


@pytest.mark.parametrize("text", [0, 1.5, -1, "12", "ms", "0ms", "1.2.3ms", "12 parsecs", True, "nan"])
def test_other_budgets_are_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"give a share of the dense model's time in \(0, 1\], as 0.6, or"):
        latency.parse(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latency": 0.5, "keep": 0.5}, "got keep and latency: give exactly one of keep, size"),
        ({"latency": 2.0}, "latency 2.0: give a share"),
        ({"latency": 0.5, "objective": "size"}, "spent in time, and objective 'size' in bytes"),
        ({"keep": 0.5, "objective": "speed"}, "objective 'speed': legal are size, latency, balanced"),
        ({"keep": 0.5, "workload": 16}, "workload is for plans in time"),
        ({"keep": 0.5, "times": "t.json"}, "times is for plans in time"),
        ({"latency": 0.5, "workload": 0}, "workload 0: give decode .one token. or how many"),
        ({"latency": 0.5, "workload": "prefill"}, "workload 'prefill': give decode"),
        ({"rank": 3, "objective": "balanced"}, "rank and energy are rules"),
        ({"size": "200MB", "objective": "balanced"}, "give storage float with it"),
        ({"latency": 0.5, "storage": "int8"}, "give storage float with it"),
        ({"latency": 0.5, "form": "width"}, "form 'width' has none, use pivoted"),
        ({"latency": 0.5, "method": "svd"}, "allocation 'uniform' has none; use method eckart"),
        (
            {"max_ppl_increase": "3%", "objective": "balanced"},
            "which is found over sizes, do not go together",
        ),
        ({"keep": 0.5, "stock": True, "objective": "latency"}, "stock has one width for all"),
        ({"latency": 0.5, "heal": {"steps": ["ranks"]}}, "moves rank at equal size, not at equal time"),
    ],
)
def test_what_does_not_fit_is_refused(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(values)


def test_the_default_is_size_and_recipes_come_back() -> None:
    assert (Recipe(keep=0.5).resolved_objective, Recipe(keep=0.5).timed) == ("size", False)
    made = Recipe(latency="12ms", workload=512, times="t.json", text=TEXT)
    assert (made.resolved_objective, made.timed, latency.tokens(made.workload)) == ("latency", True, 512)
    assert from_mapping(yaml.safe_load(to_yaml(made))) == made
    assert recipes.override({"latency": 0.5}, {"keep": 0.5}) == {"keep": 0.5}


# the whole way


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "WORKING_SET", 40_000)
    monkeypatch.setattr(grid, "_BLOCK_SECONDS", 1e-4)
    for function in (grid.measure, passing.seconds):
        defaults = {**(function.__kwdefaults__ or {}), "rounds": Rounds(runs=3, warmup=1)}
        monkeypatch.setattr(function, "__kwdefaults__", defaults)


def synthetic(file: Path, model: Any) -> None:
    """Write a table for this machine in which times are proportional to parameters."""
    made = table(models.targets(model), proportional, ALL)
    file.write_text(replace(made, where=grid.here(torch.device("cpu"), torch.float32)).to_json())


@pytest.mark.usefixtures("quick")
def test_a_model_is_compressed_to_a_time(
    llama_folder: Path, text_file: Path, tmp_path: Path, llama: Any
) -> None:
    file, out = tmp_path / "times.json", tmp_path / "out"
    synthetic(file, llama)
    command = [
        "compress", str(llama_folder), "--latency", "0.6", "--times", str(file), "--text", str(text_file),
        "--tokens", "512", "--gradient-tokens", "256", "--seq-len", "32", "--eval-tokens", "64",
        "--device", "cpu",
    ]  # fmt: skip
    before = file.read_text()
    dry = CliRunner().invoke(app, [*command, "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    timing = json.loads(dry.stdout)["timing"]
    assert 0 < timing["planned"] <= 0.6 * timing["dense"] * (1 + 1e-9)
    assert timing["measured"] is None
    done = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert file.read_text() == before
    result = json.loads((out / "eckart.json").read_text())
    found = result["timing"]
    assert found["dense"] == timing["dense"]
    assert found["planned"] <= 0.6 * found["dense"] * (1 + 1e-9)
    # Times are proportional to parameters, and so is what is said of them.
    assert found["planned"] / found["dense"] == pytest.approx(result["keep_linears"])
    assert min(found["measured"], found["measured_dense"]) > 0
    card = (out / "README.md").read_text()
    for said in ("time of the linears per token, decoding, by the table", "the same, measured map by map"):
        assert said in card
    assert "latency 0.6" in card
    assert eckart.load(out) is not None


@pytest.mark.usefixtures("quick")
def test_a_table_is_measured_where_there_is_none(llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    command = [
        "compress", str(llama_folder), "--keep", "0.9", "--objective", "latency", "--workload", "4",
        "--device", "cpu", "--times", str(file), "--dry-run",
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "4 tokens at once, by the table" in done.output
    written = json.loads(file.read_text())
    assert {row["tokens"] for row in written["rows"]} == {4}
    other = written | {"where": written["where"] | {"dtype": "float16"}}
    file.write_text(json.dumps(other))
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "dtype 'float16', here 'float32'" in " ".join(refused.output.split())


@pytest.mark.usefixtures("quick")
def test_one_preparation_serves_sizes_and_times(text_file: Path, tokenizer: Any, tmp_path: Path) -> None:
    model, file = tiny.build("llama"), tmp_path / "times.json"
    synthetic(file, model)
    options: dict[str, Any] = {
        "text": str(text_file), "tokens": 512, "gradient_tokens": 256, "seq_len": 32, "form": "pivoted",
        "tokenizer": tokenizer, "of": "linears", "device": "cpu",
    }  # fmt: skip
    _, result = eckart.compress(model, latency=0.7, times=file, **options)
    assert result.timing is not None
    assert result.timing.planned <= 0.7 * result.timing.dense * (1 + 1e-9)
    _, sized = eckart.compress(tiny.build("llama"), keep=result.keep_linears + 1e-9, **options)
    assert sized.timing is None
    assert [(m.name, m.form, m.rank) for m in sized.modules] == [
        (m.name, m.form, m.rank) for m in result.modules
    ]


def test_within_memory_the_table_must_be_in_a_file(llama_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(model=str(llama_folder), latency=0.6, text=TEXT, times=str(tmp_path / "none.json"))
    with pytest.raises(
        ConfigError, match="needs its table of times in a file, .* there is none at .*none.json"
    ):
        eckart.compress_to(recipe, tmp_path / "out", memory="1GB")
    assert hub.dtype("float32") is torch.float32
