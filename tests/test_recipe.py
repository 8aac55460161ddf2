from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from eckart import ConfigError, Override, RankError, Recipe, construct, recipe
from eckart.methods import METHODS, SHAPES
from eckart.ranks import Energy, Fixed, Keep
from eckart.yaml_files import read_yaml

TEXT = ("t.txt",)


def test_yaml_gives_the_recipe_back(tmp_path: Path) -> None:
    made = Recipe(
        model="m", keep=0.7, text=TEXT, exclude=("q_proj",), overrides=(Override("*.v_proj", dense=True),)
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(made))
    assert recipe.from_mapping(read_yaml(path)) == made
    assert set(yaml.safe_load(path.read_text())) == set(asdict(made))


def test_options_go_over_the_file_and_one_budget_replaces_another() -> None:
    base = {"keep": 0.5, "text": ["a"], "seed": 3}
    merged = recipe.override(base, {"rank": 8, "seed": None, "text": (), "method": "svd"})
    assert merged == {"rank": 8, "text": ["a"], "seed": 3, "method": "svd"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kep": 0.5}, "unknown key 'kep': did you mean 'keep'"),
        ({"keep": 0.5, "overrides": [{"match": "*", "rnk": 3}]}, "overrides: unknown key 'rnk'"),
        ({"keep": 0.5, "overrides": [{"match": "*"}]}, "exactly one of rank, keep, energy, dense"),
        ({"keep": 0.5, "overrides": [{"rank": 3}]}, "overrides: .*match"),
        ({}, "got no budget: give exactly one of keep, size, rank, energy"),
        ({"keep": 0.5, "rank": 3}, "got keep and rank"),
        ({"keep": 0}, r"keep 0: must lie in \(0, 1\]"),
        ({"keep": 1.5}, r"keep 1.5: must lie in \(0, 1\]"),
        ({"energy": 2.0}, r"energy 2.0: must lie in \(0, 1\]"),
        ({"rank": 0}, "rank 0: must be a whole number of at least 1"),
        ({"rank": 2.5}, "rank 2.5: must be a whole number"),
        ({"keep": 0.5, "of": "all"}, "of 'all': legal are model, linears"),
        ({"keep": 0.5, "method": "magic"}, "method 'magic': legal are svd, fwsvd"),
        ({"keep": 0.5, "form": "odd"}, "form 'odd': legal are factored, pivoted"),
        ({"keep": 0.5, "dtype": "int3"}, "dtype 'int3': legal are float32"),
        ({"keep": 0.5, "damp": -1.0}, "damp -1.0: must be >= 0"),
        ({"keep": 0.5, "tokens": 1}, "tokens 1: must be a whole number of at least 2"),
        ({"size": "12 parsecs"}, "write for example 200MB"),
        ({"size": -5}, "write for example 200MB"),
        ({"keep": "0.5"}, "keep '0.5': must be a number"),
        ({"keep": 0.5, "damp": "much"}, "damp 'much': must be a number"),
        ({"keep": 0.5, "overrides": [{"match": "*", "dense": "maybe"}]}, "dense 'maybe': must be true or"),
        ({"keep": 0.5, "overrides": [{"match": "*", "keep": "1"}]}, "keep '1': must be a number"),
        ({"keep": 0.5, "method": "pifa", "allocation": "curvature"}, "needs gradients to have one unit"),
    ],
)
def test_what_is_illegal_is_refused_with_the_way_out(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, RankError), match=message):
        recipe.from_mapping({"text": TEXT} | values)


def test_a_method_that_looks_at_data_needs_text_to_run() -> None:
    with pytest.raises(ConfigError, match="method 'eckart' looks at data: give text"):
        Recipe(keep=0.5).check_text()
    Recipe(keep=0.5, method="svd").check_text()


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe at"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping of keys to values, got list"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_yaml(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (1000, 1000),
        ("200MB", 200_000_000),
        ("1.5 GB", 1_500_000_000),
        ("2KiB", 2048),
        ("7", 7),
        ("3kb", 3000),
    ],
)
def test_sizes(size: int | str, count: int) -> None:
    assert construct.parse_size(size) == count


def test_budgets_become_rules_and_fixed_ranks_are_uniform() -> None:
    assert Recipe(rank=4, text=TEXT).rule() == Fixed(4)
    assert Recipe(keep=0.4, text=TEXT).rule() == Keep(0.4)
    assert Recipe(energy=0.4, text=TEXT).rule() == Energy(0.4)
    assert Recipe(size="1MB", text=TEXT).rule() is None
    assert Recipe(rank=4, text=TEXT).resolved_method().allocation == "uniform"
    assert Recipe(keep=0.4, text=TEXT).resolved_method().allocation == "curvature"
    assert Recipe(keep=0.4, method="svd", form="pivoted").resolved_method().form == "pivoted"


def test_every_preset_is_a_recipe() -> None:
    for name in METHODS:
        assert Recipe(keep=0.5, method=name, text=TEXT).resolved_method() == METHODS[name]


# widths, stock and depth


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"stock": True, "form": "pivoted"},
            "stock is a matter of widths alone: form 'pivoted' needs eckart",
        ),
        ({"stock": True, "form": "factored"}, "form 'factored' needs eckart to load"),
        ({"stock": True, "form": "mixed"}, "form 'mixed' needs eckart to load"),
        (
            {"rank": 4, "form": "width"},
            "rank is a rule for ranks: give keep or size with stock, depth or wid",
        ),
        ({"rank": 4, "form": "mixed"}, "rank is a rule for ranks"),
        ({"rank": 4, "stock": True}, "rank is a rule for ranks"),
        ({"rank": 4, "depth": True}, "rank is a rule for ranks"),
        ({"energy": 0.9, "form": "width"}, "energy is a rule for ranks: give keep or size"),
        ({"energy": 0.9, "form": "mixed"}, "energy is a rule for ranks"),
        ({"energy": 0.9, "stock": True}, "energy is a rule for ranks"),
        ({"energy": 0.9, "depth": True}, "energy is a rule for ranks"),
        ({"depth": True, "method": "svd"}, "allocation 'uniform' does not; use method eckart"),
        (
            {"depth": True, "allocation": "uniform"},
            "depth weighs blocks against ranks and widths by the loss",
        ),
        ({"depth": True, "stock": True, "method": "pifa"}, "depth weighs blocks against ranks and widths"),
        ({"landmarks": "luck"}, "landmarks 'luck': legal are curvature, leverage, energy"),
        ({"form": "narrow"}, "form 'narrow': legal are factored, pivoted, shared, width, mixed"),
        ({"multiple": 0}, "multiple 0: must be a whole number of at least 1"),
        ({"multiple": 1.5}, "multiple 1.5: must be a whole number of at least 1"),
        ({"multiple": "32"}, "multiple '32': must be a whole number"),
        ({"stok": True}, "unknown key 'stok': did you mean 'stock'"),
        ({"dept": True}, "unknown key 'dept': did you mean 'depth'"),
        ({"landmark": "energy"}, "unknown key 'landmark': did you mean 'landmarks'"),
    ],
)
def test_what_does_not_go_with_widths_is_refused(values: dict[str, Any], message: str) -> None:
    budget = {} if {"rank", "energy"} & set(values) else {"keep": 0.5}
    with pytest.raises(ConfigError, match=message):
        recipe.from_mapping({"text": TEXT} | budget | values)


@pytest.mark.parametrize("values", [{"stock": "no"}, {"depth": "false"}, {"stock": 2}, {"depth": None}])
def test_true_or_false_is_nothing_else(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be true or false"):
        recipe.from_mapping({"keep": 0.5, "text": TEXT} | values)


def test_true_is_no_multiple() -> None:
    with pytest.raises(ConfigError, match="multiple True: must be a whole number"):
        Recipe(keep=0.5, multiple=True)


def test_forms_follow_from_stock_and_allocation() -> None:
    def form(**values: Any) -> str:
        return Recipe(**{"keep": 0.5} | values).resolved_method().form

    assert form() == "mixed"
    assert form(stock=True) == form(stock=True, form="width") == form(stock=True, method="svd") == "width"
    assert form(form="width") == "width"
    assert form(method="svd", form="mixed") == "mixed"
    # Without losses to weigh there is nothing to mix by, unless it is asked for.
    assert form(allocation="uniform") == form(keep=None, rank=4) == form(keep=None, energy=0.5) == "pivoted"
    assert form(allocation="uniform", form="mixed") == "mixed"
    assert form(depth=True) == "mixed"
    assert form(depth=True, form="factored") == "factored"


def test_steps() -> None:
    assert Recipe(keep=0.5).step() == Recipe(keep=0.5, form="width").step() == 1
    assert Recipe(keep=0.5, stock=True).step() == 32
    assert Recipe(keep=0.5, stock=True, multiple=1).step() == 1
    assert Recipe(keep=0.5, stock=True, multiple=64).step() == Recipe(keep=0.5, multiple=64).step() == 64


def test_what_gets_ranks_and_what_gets_narrower() -> None:
    uniform = {form: Recipe(keep=0.5, form=form, method="svd").resolved_method() for form in SHAPES}
    assert {form: method.low_rank for form, method in uniform.items()} == {
        "factored": "factored", "pivoted": "pivoted", "shared": "factored", "width": None, "mixed": "pivoted",
    }  # fmt: skip
    assert {form for form, method in uniform.items() if method.narrows} == {"width", "mixed"}
    assert Recipe(keep=0.5, landmarks="energy").landmarks == "energy"
    assert Recipe(keep=0.5, form="width", method="svd").resolved_method().needs_text is False


def test_yaml_keeps_stock_depth_and_landmarks(tmp_path: Path) -> None:
    made = Recipe(keep=0.7, stock=True, depth=True, landmarks="leverage", multiple=64, text=TEXT)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(made))
    assert recipe.from_mapping(read_yaml(path)) == made
    assert recipe.from_mapping(recipe.override(read_yaml(path), {"depth": False})).depth is False
