"""The settings of tuning: what is refused, and what is chosen where nothing is said."""

import math
import re
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eckart import ConfigError
from eckart.adapt import tuning
from eckart.adapt.tuning import INITS, METHODS, MUTATING, Tuning

WHOLE = "must be a whole number of at least"
SIZES = ("batch", "micro", "evaluations", "patience", "eval_limit", "first_batches")
ANYWHERE: set[tuning.Init] = {"default", "gaussian"}
CLASSES: dict[str, Any] = {"task": "classification"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lorra"}, "method 'lorra': legal are lora, dora, qlora, adalora, full"),
        (
            {"init": "zeros"},
            "init 'zeros': legal are default, gaussian, pissa, olora, eva, corda, residual, lqer, loftq",
        ),
        ({"task": "chat"}, "task 'chat': legal are generation, classification"),
        ({"precision": "int8"}, "precision 'int8': legal are auto, float32, bfloat16"),
        ({"rank": "many"}, f"rank 'many': {WHOLE} 1, or 'auto'"),
        ({"rank": 0}, f"rank 0: {WHOLE} 1"),
        ({"rank": 2.5}, f"rank 2.5: {WHOLE} 1"),
        ({"rank": True}, f"rank True: {WHOLE} 1"),
        *[
            ({name: 0}, f"{name} 0: {WHOLE} 1")
            for name in (*SIZES, "auto_rank", "budget", "steps", "start_rank")
        ],
        ({"seq_len": 1}, f"seq_len 1: {WHOLE} 2"),
        ({"seed": -1}, f"seed -1: {WHOLE} 0"),
        *[
            ({name: value}, f"{name} {value}: must be a number above 0")
            for name in ("epochs", "clip", "alpha", "rate")
            for value in (0, -1.0, math.nan)
        ],
        *[
            ({name: math.inf}, f"{name} inf: must be a number above 0")
            for name in ("epochs", "alpha", "rate")
        ],
        ({"epochs": None}, "epochs None: must be a number above 0"),
        *[
            ({name: value}, rf"{name} {value}: must be a number in [0, 1]")
            for name in ("dropout", "warmup", "hold")
            for value in (-0.1, 1.5)
        ],
        ({"dropout": 1.0}, "dropout 1: must be below 1, or nothing is learned"),
        ({"weight_decay": -1}, "weight_decay -1: must be a number of at least 0"),
        *[
            ({name: "yes"}, f"{name} 'yes': must be true or false")
            for name in ("rslora", "double", "packing", "checkpointing")
        ],
        *[
            ({name: "abc"}, f"{name} 'abc': must be a tuple of strings")
            for name in ("data", "eval_data", "targets", "exclude", "labels")
        ],
        ({"targets": (1,)}, "targets (1,): must be a tuple of strings"),
        (
            {"columns": {"promt": "question"}},
            "columns: unknown column 'promt': legal are messages, prompt, completion, text, label",
        ),
    ],
)
def test_an_illegal_value_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Tuning(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 6, "micro": 4}, "batch 6: must be a multiple of micro = 4"),
        *[
            ({"init": init}, f"init '{init}' is for method qlora, which quantises, not for lora")
            for init in ("residual", "lqer", "loftq")
        ],
        *[
            (
                {"method": method, "init": init},
                f"init '{init}' is for methods lora and qlora, not for {method}",
            )
            for method in ("full", "adalora", "dora")
            for init in ("pissa", "olora", "eva", "corda")
        ],
        *[
            (
                {"method": "qlora", "init": init},
                f"init '{init}' is for method lora: PEFT has it for float bases",
            )
            for init in ("eva", "corda")
        ],
        *[
            (
                {"method": method, "rank": "auto"},
                f"rank 'auto' is for methods lora, dora and qlora, not for {method}",
            )
            for method in ("adalora", "full")
        ],
        ({"rank": "auto", "init": "eva"}, "init 'eva' chooses the ranks itself: give it a rank"),
        ({"budget": 1000}, "budget is for rank 'auto', not for rank 8"),
        ({"start_rank": 12}, "start_rank is for method adalora, not for lora"),
        (
            {"method": "adalora", "rank": 8, "start_rank": 4},
            "start_rank 4: must be at least rank = 8",
        ),
        ({"labels": ("no", "yes")}, "labels are for task classification, not for generation"),
        (CLASSES | {"template": "Label:"}, "template 'Label:': must contain {text}"),
        (CLASSES | {"packing": True}, "packing is for generation: a label is scored after its own text"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Tuning(**values)


def test_what_is_left_of_methods_and_initialisations_is_legal() -> None:
    taken: dict[tuning.Method, set[tuning.Init]] = {
        "lora": {"pissa", "olora", "eva", "corda"},
        "qlora": {"pissa", "olora", "residual", "lqer", "loftq"},
    }
    for method in METHODS:
        assert Tuning(method=method).starting == ("residual" if method == "qlora" else "default")
        legal: set[tuning.Init] = ANYWHERE | taken.get(method, set())
        for init in legal:
            assert Tuning(method=method, init=init).starting == init
        for init in set(INITS) - legal:
            with pytest.raises(ConfigError, match=f"init '{init}' is for method"):
                Tuning(method=method, init=init)
    assert set(MUTATING) < set(INITS)


@pytest.mark.parametrize(
    ("method", "rate", "start"),
    [("lora", 5e-4, 8), ("dora", 5e-4, 8), ("qlora", 5e-4, 8), ("adalora", 2e-3, 12), ("full", 3e-5, 8)],
)
def test_what_a_method_chooses_itself(method: tuning.Method, rate: float, start: int) -> None:
    made = Tuning(method=method)
    assert made.starting_rate == rate
    assert made.rank_at_start == start
    assert Tuning(method=method, rate=0.25).starting_rate == 0.25


@given(st.integers(1, 64), st.integers(0, 64))
def test_ranks_at_the_start(rank: int, more: int) -> None:
    """AdaLoRA's: half as much again rounded up, or what is said; `auto` begins at `auto_rank`."""
    assert Tuning(rank=rank).rank_at_start == rank
    assert Tuning(rank="auto", auto_rank=rank, budget=7).rank_at_start == rank
    assert Tuning(method="adalora", rank=rank).rank_at_start == (3 * rank + 1) // 2
    assert Tuning(method="adalora", rank=rank, start_rank=rank + more).rank_at_start == rank + more


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 8))
def test_the_steps_are_the_fewest_that_see_everything(examples: int, batch: int, epochs: int) -> None:
    found = Tuning(batch=batch, micro=1, epochs=epochs).total_steps(examples)
    assert (found - 1) * batch < epochs * examples <= found * batch


def test_steps_that_are_given_stand_and_there_is_one_at_least() -> None:
    assert Tuning(steps=7, epochs=3).total_steps(10_000) == 7
    assert Tuning(epochs=1e-6).total_steps(3) == 1


def test_a_mapping_gives_the_same_settings() -> None:
    found = tuning.from_mapping({"data": "a.txt", "labels": ["no", 1], "task": "classification", "rank": 4})
    assert found == Tuning(data=("a.txt",), labels=("no", "1"), task="classification", rank=4)
    assert tuning.from_mapping({}) == Tuning()
    made = Tuning(method="adalora", rank=6, columns={"prompt": "question"}, targets=("q_proj",))
    assert tuning.from_mapping({field.name: getattr(made, field.name) for field in fields(made)}) == made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dropuot": 0.1}, "tune: unknown key 'dropuot': did you mean 'dropout'?"),
        ({"xyzzy": 1}, "tune: unknown key 'xyzzy': legal are method, data, eval_data, task"),
        ({"rank": 0}, f"rank 0: {WHOLE} 1"),
        ({"columns": 5}, "tune: 'int' object is not iterable"),
    ],
)
def test_a_bad_mapping_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        tuning.from_mapping(values)
    with pytest.raises(
        ConfigError, match=re.escape("recipe: tune: unknown key 'rnak': did you mean 'rank'?")
    ):
        tuning.from_mapping({"rnak": 4}, "recipe: tune")
