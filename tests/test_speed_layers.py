"""Speed of single linear maps: shapes, shares and order, by a clock that ticks when it is read."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, ModelError, factors, kinds, models
from eckart.cli import app
from eckart.factors import FactoredLinear, PivotedLinear
from eckart.speed import layers, shapes
from eckart.speed.options import LayerOptions, Rounds
from eckart.speed.result import LayerSpeeds, Machine

from . import tiny

CPU = torch.device("cpu")
QUICK = LayerOptions(0.6, (1, 4), Rounds(runs=3, warmup=1))


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers.copies, "__defaults__", (20_000,))


def measured(shape: tuple[int, int], options: LayerOptions = QUICK) -> list[layers.LayerTime]:
    times = itertools.count()
    return layers.measure({shape: 2}, options, CPU, torch.float32, clock=lambda: float(next(times)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "deepseek-v3"])
def test_shapes_are_those_of_the_matrices_that_would_be_treated(name: str) -> None:
    model = tiny.build(name)
    found = shapes.of_model(model)
    assert not any(type(part).__module__.startswith("eckart") for part in model.modules())
    expected = Counter(target.shape for target in models.targets(kinds.unfold(model)))
    assert found == expected
    assert len(found) > 1


def test_a_compressed_model_has_the_shapes_of_its_architecture(
    llama_folder: Path, compressed_folder: Path
) -> None:
    dense = shapes.of_model(llama_folder)
    assert dense == {(32, 32): 4, (16, 32): 4, (48, 32): 4, (32, 48): 2}
    assert shapes.of_model(compressed_folder) == dense
    assert shapes.of_model(eckart.load(compressed_folder)) == dense
    assert {(m, n) for m, n in dense} != {
        tuple(weight.shape) for weight in eckart.load(compressed_folder).parameters() if weight.ndim == 2
    }


@pytest.mark.parametrize(
    ("text", "shape"),
    [("4096x14336", (4096, 14336)), ("8 X 9", (8, 9)), ("8", None), ("8x1", None), ("axb", None)],
)
def test_shapes_are_written_as_outputs_by_inputs(text: str, shape: tuple[int, int] | None) -> None:
    if shape is not None:
        assert shapes.parse(text) == shape
        return
    with pytest.raises(ConfigError, match="give outputs x inputs, as 4096x14336"):
        shapes.parse(text)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_shares_are_those_of_the_largest_rank_within_keep(shape: tuple[int, int]) -> None:
    one, several = measured(shape)
    assert (one.tokens, several.tokens) == (1, 4)
    dense = shape[0] * shape[1]
    for name, found in one.forms.items():
        form = found.form
        assert factors.parameters(form, shape, found.rank) <= 0.6 * dense
        assert factors.parameters(form, shape, found.rank + 1) > 0.6 * dense
        assert found.flops == factors.parameters(form, shape, found.rank) / dense
        assert found.bytes == pytest.approx(found.flops + factors.index_bytes(form, shape) / (4 * dense))
        assert one.share(name) == found.bytes
        assert several.share(name) == several.forms[name].flops
        assert one.excess(name) == pytest.approx(found.ratio.value / found.bytes)
    assert one.forms["pivoted"].rank > one.forms["factored"].rank


def test_a_block_is_so_many_calls_between_two_readings_of_the_clock() -> None:
    for layer in measured((24, 32)):
        assert layer.calls == 1  # a tick is longer than a block has to be
        assert layer.dense.values == (1.0,) * 3
        assert all(found.seconds.values == (1.0,) * 3 for found in layer.forms.values())
        assert all(found.ratio.value == 1 for found in layer.forms.values())
    clock = itertools.count(step=1 / 1024).__next__
    fast = layers.measure({(24, 32): 1}, QUICK, CPU, torch.float32, clock=clock)[0]
    assert fast.calls == 21  # a block takes 0.02 s or more
    assert fast.dense.median == pytest.approx(1 / 1024 / 21)


def test_forms_run_in_turn_and_copies_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []
    original = torch.nn.Module.__call__

    def heard(self: Any, inputs: Tensor) -> Tensor:
        if isinstance(self, (FactoredLinear, PivotedLinear)):
            ran.append((self.kind, id(self)))
        return original(self, inputs)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.nn.Module, "__call__", heard)
    measured((24, 32), LayerOptions(0.6, (1,), Rounds(runs=3, warmup=1)))
    there, back = ["factored", "pivoted"], ["pivoted", "factored"]
    assert [kind for kind, _ in ran] == there + back + there + back + there  # a check, and four rounds
    own = [module for kind, module in ran[2:] if kind == "pivoted"]
    assert len(set(own)) == len(own) == 4


def test_copies_fill_what_a_cache_would_hold() -> None:
    forms = layers.made((40, 24), 0.6, CPU, torch.float32, torch.Generator().manual_seed(0))
    banks = layers.copies(forms, 50_000)
    assert len({len(bank) for bank in banks.values()}) == 1
    sizes = {name: sum(layers._bytes(module) for module in bank) for name, bank in banks.items()}
    assert 50_000 <= min(sizes.values()) < 54_000
    stores = [
        parameter.data_ptr() for bank in banks.values() for one in bank for parameter in one.parameters()
    ]
    assert len(set(stores)) == len(stores)
    assert len(layers.copies(forms, 1)["dense"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_form_that_computes_something_else_has_no_time(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    forms = layers.made((40, 24), 0.6, CPU, dtype, torch.Generator().manual_seed(0))
    inputs = torch.randn(5, 24, dtype=dtype)
    layers.check(forms, inputs)
    # Without the order of the outputs:
    unordered = lambda self, x: torch.cat([self.pivot(x), self.rest(self.pivot(x))], -1)  # noqa: E731
    monkeypatch.setattr(PivotedLinear, "forward", unordered)
    with pytest.raises(ModelError, match=r"pivoted of \(40, 24\) on cpu in .*try another dtype"):
        layers.check(forms, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 1.0}, r"keep 1.0: must lie in \(0, 1\)"),
        ({"tokens": 0}, "tokens 0: give an integer of at least 1"),
        ({"runs": 2}, "runs 2: give an integer of at least 3"),
        ({"shape": ["5"]}, "shape '5': give outputs x inputs"),
        ({}, "no map to time: give a model, or a shape"),
    ],
)
def test_what_cannot_be_timed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        eckart.bench_layers(**change)


def test_the_command_times_the_shapes_of_a_model_and_others(llama_folder: Path) -> None:
    options = ["--layers", "--layer-tokens", 2, "--runs", 3, "--warmup", 1, "--shape", "20x24", "--json"]
    done = CliRunner().invoke(app, ["bench", str(llama_folder), *map(str, options)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {"command", "model", "layers", "options", "threads", "environment"} <= set(found)
    assert {tuple(one["shape"]): one["count"] for one in found["layers"]} == {
        (20, 24): 0, (32, 32): 4, (16, 32): 4, (48, 32): 4, (32, 48): 2,
    }  # fmt: skip
    for one in found["layers"]:
        for form in one["forms"].values():
            allowed = form["flops"] * one["dense_seconds"]["median"]
            assert form["allowed_seconds"] == pytest.approx(allowed)
            assert form["excess"] == pytest.approx(form["seconds"]["median"] / allowed)


def test_the_table_says_where_a_form_is_not_faster(llama_folder: Path) -> None:
    text = str(LayerSpeeds("M", tuple(measured((24, 32))), QUICK, _machine()))
    for words in (
        "24 x 32",
        "pivoted",
        "factored",
        "time / share",
        "not faster than dense: pivoted 24 x 32 at 1",
    ):
        assert words in text


def _machine() -> Machine:
    return Machine("cpu", "float32", 1, None, {"machine": {"cpus": 4}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "--against", "x"], "--against: for whole models, which --layers does not run"),
        (["--keep", "0.5", "--layer-tokens", "4"], "--keep, --layer-tokens: for single linear maps: give --"),
    ],
)
def test_options_of_the_other_measurement_are_refused(
    llama_folder: Path, options: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["bench", str(llama_folder), *options])
    assert done.exit_code == 2
    assert message in done.output


def test_fused_forms_are_timed_beside_the_others() -> None:
    options = LayerOptions(0.6, (1, 4), Rounds(runs=3, warmup=1), fused=True)
    for layer in measured((24, 32), options):
        assert list(layer.forms) == ["factored", "pivoted", *layers.FUSED]
        for name, (form, _) in layers.FUSED.items():
            assert layer.forms[name].form == form
            assert layer.forms[name].rank == layer.forms[form].rank
            assert layer.share(name) == layer.share(form)
    forms = layers.made((24, 32), 0.6, CPU, torch.float32, torch.Generator().manual_seed(0), fused=True)
    assert forms["pivoted, folded"].straight
    assert not forms["pivoted, fused"].straight
    layers.check(forms, torch.randn(3, 32))
