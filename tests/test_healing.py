"""The settings of healing: what is legal, and what is said of what is not."""

from dataclasses import asdict
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from eckart import ConfigError, Recipe, healing, recipe
from eckart.cli import app
from eckart.healing import REFINEMENTS, Healing

WHOLE = (
    "tokens",
    "hold_tokens",
    "fit_tokens",
    "batch",
    "micro",
    "evaluations",
    "patience",
    "block_epochs",
    "adapter_rank",
    "largest",
)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -3, 1.5, True, "many"])
def test_counts_are_whole_numbers_from_one_on(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} {value!r}: must be a whole number of at least 1"):
        Healing(**{name: value})


@pytest.mark.parametrize("name", ["rate", "block_rate", "temperature", "clip"])
@pytest.mark.parametrize("value", [0, 0.0, -1e-3, float("nan"), "1e-4", True])
def test_rates_are_above_zero(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} {value!r}: must be a number above 0"):
        Healing(**{name: value})


@pytest.mark.parametrize("name", ["warmup", "text_loss", "mixtures"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "half"])
def test_shares_are_in_the_unit_interval(name: str, value: Any) -> None:
    given: dict[str, Any] = {name: (0.5, value) if name == "mixtures" else value}
    with pytest.raises(ConfigError, match=rf"{name} {value!r}: must be a number in \[0, 1\]"):
        Healing(**given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": ("closed", "magic")}, "refinement 'magic': legal are ranks, closed, block, logits"),
        ({"steps": ()}, "refinement None: legal are ranks, closed, block, logits"),
        ({"train": "some"}, "train 'some': legal are factors, blocks, all, adapter"),
        ({"precision": "int8"}, "precision 'int8': legal are auto, float32, bfloat16"),
        ({"seq_len": 1}, "seq_len 1: must be a whole number of at least 2"),
        ({"seed": -1}, "seed -1: must be a whole number of at least 0"),
        ({"checkpointing": "no"}, "checkpointing 'no': must be true or false"),
        ({"mixtures": ()}, r"mixtures: give at least one number in \[0, 1\]"),
        ({"batch": 4, "micro": 3}, "batch 4: must be a multiple of micro = 3"),
    ],
)
def test_what_is_not_legal_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Healing(**values)


def test_unknown_keys_get_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="heal: unknown key 'temprature': did you mean 'temperature'?"):
        healing.from_mapping({"temprature": 2})
    with pytest.raises(ConfigError, match="here: unknown key 'xyzzy': legal are text, steps, tokens"):
        healing.from_mapping({"xyzzy": 2}, "here")


@pytest.mark.parametrize("step", REFINEMENTS)
def test_one_value_stands_for_a_list_of_one(step: str) -> None:
    made = healing.from_mapping({"text": "a.txt", "steps": step, "mixtures": 1})
    assert (made.text, made.steps, made.mixtures) == (("a.txt",), (step,), (1,))
    assert healing.from_mapping({"steps": [step], "mixtures": [0, 1]}).mixtures == (0, 1)


def test_steps_are_what_the_tokens_are_good_for_and_at_least_one() -> None:
    assert Healing(tokens=1000, seq_len=10, batch=4).total_steps() == 25
    assert Healing(tokens=1, seq_len=10).total_steps() == 1


def test_settings_survive_a_yaml_recipe() -> None:
    wanted = Healing(text=("a=2", "self"), steps=("block", "logits"), mixtures=(0.25,), largest=7)
    made = Recipe(keep=0.5, text=("x",), heal=wanted)
    again = recipe.from_mapping(yaml.safe_load(recipe.to_yaml(made)))
    assert again.heal == wanted
    assert again == made
    assert recipe.from_mapping({"keep": 0.5, "heal": {}}).heal == Healing()


def test_a_heal_section_is_as_strict_as_the_recipe(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="recipe: heal: unknown key 'rat': did you mean 'rate'"):
        recipe.from_mapping({"keep": 0.5, "heal": {"rat": 1}})
    with pytest.raises(ConfigError, match="recipe: heal must be a mapping of settings, got True"):
        recipe.from_mapping({"keep": 0.5, "heal": True})
    with pytest.raises(ConfigError, match="heal learns from text: give text"):
        Recipe(keep=0.5, method="svd", heal=Healing()).check_text()
    Recipe(keep=0.5, method="svd", heal=Healing(text=("x",))).check_text()
    file = tmp_path / "recipe.yaml"
    file.write_text("heal: true\n")
    arguments = ["heal", "x", "--teacher", "y", "--text", "z", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, [*arguments, "--recipe", str(file)])
    assert found.exit_code == 2
    assert "heal must be a mapping of settings, got True" in found.output


def test_defaults_are_legal_and_plain_values() -> None:
    assert Healing(**asdict(Healing())) == Healing()


def test_the_rate_is_in_proportion_to_the_distance_within_bounds() -> None:
    settings = Healing()
    assert settings.starting_rate(0.4) == pytest.approx(2 * settings.starting_rate(0.2))
    assert settings.starting_rate(1e-9) == 5e-6
    assert settings.starting_rate(5.0) == 1.4e-4
    assert Healing(rate=0.01).starting_rate(0.2) == 0.01
