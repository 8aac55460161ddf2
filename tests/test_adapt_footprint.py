"""The memory of a training step: exact where it is state, and the laws that activations obey."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eckart import hub, memory, models
from eckart.adapt import attach, footprint, quantised, targets
from eckart.adapt.tuning import Method, Tuning
from eckart.errors import ModelError

from . import tiny

CPU = torch.device("cpu")
TUNING = Tuning(rank=4, precision="float32", micro=2, batch=2)


def estimate(model: Any, tuning: Tuning = TUNING, rows: int = 2, tokens: int = 24, **options: Any) -> Any:
    ranks = {} if tuning.method == "full" else dict.fromkeys(targets.names(model), tuning.rank_at_start)
    return footprint.estimate(model, tuning, ranks, rows, tokens, **options)


def alone(model: Any, tuning: Tuning, **shape: Any) -> Any:
    return estimate(model, tuning, methods=(tuning.method,), **shape)[tuning.method]


def wide(**changes: Any) -> Any:
    """Return a tiny Llama whose rows hold whole blocks of NF4."""
    return tiny.build("llama", **{"hidden_size": 64, "intermediate_size": 128, **changes})


def of(method: Method, **options: Any) -> Any:
    shape = {name: options.pop(name) for name in ("rows", "tokens", "learned") if name in options}
    return alone(wide(), replace(TUNING, method=method, **options), **shape)


def trained(model: Any, tuning: Tuning) -> Any:
    """Take two real steps of AdamW; return the model and the optimizer."""
    ranks = {} if tuning.method == "full" else dict.fromkeys(targets.names(model), tuning.rank_at_start)
    made = attach.attach(
        model, replace(tuning, init="default"), ranks, (), steps=20, passes=1, compute=torch.float32,
        around=torch.no_grad, watch=lambda stage, done, total: None,
    ).model  # fmt: skip
    optimizer = torch.optim.AdamW([value for value in made.parameters() if value.requires_grad])
    for _ in range(2):
        optimizer.zero_grad()
        made.train()(input_ids=tiny.tokens(), use_cache=False).logits.logsumexp(-1).sum().backward()
        optimizer.step()
    return made, optimizer


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [("llama", "full"), ("llama", "lora"), ("llama", "dora"), ("gpt-neox", "full"), ("phi3", "lora")],
)
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(architecture: str, method: Method) -> None:
    tuning = replace(TUNING, method=method)
    found = alone(tiny.build(architecture), tuning)
    model, optimizer = trained(tiny.build(architecture), tuning)
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert found["weights"] == size(model.parameters()) + size(model.buffers())
    assert found["gradients"] == size(value.grad for value in model.parameters() if value.grad is not None)
    assert found["optimizer"] == size(state)


def test_adalora_keeps_three_averages_of_each_trained_value() -> None:
    tuning = replace(TUNING, method="adalora")
    found = alone(tiny.build("llama"), tuning)
    model, optimizer = trained(tiny.build("llama"), tuning)
    model.base_model.update_and_allocate(1)
    allocator = model.base_model.rankallocator
    sums = [*allocator.ipt.values(), *allocator.exp_avg_ipt.values(), *allocator.exp_avg_unc.values()]
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert found["optimizer"] == size(state) + size(sums)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 24), st.integers(1, 12), st.booleans())
def test_nf4_takes_what_bitsandbytes_stores(rows: int, blocks: int, double: bool) -> None:
    model = nn.ModuleDict({"one": nn.Linear(64 * blocks, rows, bias=False)})
    quantised.quantise(model, "one", double=double, compute=torch.float32)
    stored = quantised.bits_per_parameter(model["one"]) * rows * 64 * blocks / 8
    assert footprint.nf4_bytes(rows, 64 * blocks, double) == pytest.approx(stored, abs=1e-6)


@pytest.mark.parametrize("method", ["full", "qlora", "dora", "adalora"])
def test_activations_grow_with_rows_and_tokens(method: Method) -> None:
    few, more, longer = of(method), of(method, rows=4), of(method, tokens=48)
    assert few["activations"] < more["activations"]
    assert few["activations"] < longer["activations"]
    for other in (more, longer):
        assert all(few[part] == other[part] for part in ("weights", "gradients", "optimizer"))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_without_dropout_activations_are_proportional_to_rows(method: Method) -> None:
    one, two, three = (of(method, rows=rows, dropout=0.0)["activations"] for rows in (16, 32, 48))
    assert three - two == two - one


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_recomputing_takes_less(method: Method) -> None:
    model = wide(num_hidden_layers=4)
    tuning = replace(TUNING, method=method)
    kept, again = (alone(model, replace(tuning, checkpointing=again)) for again in (False, True))
    assert again["activations"] < kept["activations"]
    assert all(kept[part] == again[part] for part in ("weights", "gradients", "optimizer"))


def test_a_block_more_costs_the_same_each_time() -> None:
    found = [
        alone(tiny.build("llama", num_hidden_layers=blocks), TUNING)["activations"] for blocks in (1, 2, 3, 4)
    ]
    assert found[1] - found[0] == found[2] - found[1] == found[3] - found[2] > 0


def test_logits_are_made_where_something_is_learned_alone() -> None:
    model = tiny.build("llama", vocab_size=8192)
    few, all_of_them = (alone(model, TUNING, learned=learned)["activations"] for learned in (4, 46))
    # The logits, their softmax and the gradient of each, in float32: at least two of them live at once.
    assert all_of_them - few > 2 * 42 * 8192 * 4


def test_the_total_lies_between_its_parts_and_their_sum() -> None:
    for found in estimate(wide()).values():
        held = found["weights"] + found["optimizer"]
        assert found["total"] >= held + max(found["gradients"], found["activations"])
        largest = 64 * tiny.VOCABULARY * 4  # AdamW's temporaries are two tensors of its size
        assert found["total"] <= held + found["gradients"] + max(found["activations"], 2 * largest)


def test_gradients_that_stay_from_pass_to_pass_are_there_at_the_peak() -> None:
    model, tuning = tiny.build("llama"), replace(TUNING, method="full")
    once, twice = (alone(model, tuning, rows=16, passes=passes) for passes in (1, 2))
    assert twice["total"] >= once["total"]
    assert twice["total"] == sum(twice[part] for part in ("weights", "gradients", "optimizer", "activations"))


def test_lora_needs_less_state_than_full_and_qlora_fewer_weights() -> None:
    found = estimate(wide(hidden_size=128, intermediate_size=256))
    assert list(found) == ["full", "lora", "qlora"]
    assert found["lora"]["optimizer"] < found["full"]["optimizer"] / 4
    assert found["qlora"]["weights"] < found["lora"]["weights"] / 2


def test_bfloat16_keeps_smaller_activations() -> None:
    few, more = ({"rows": rows, "tokens": 64, "dropout": 0.0} for rows in (2, 10))
    grown = [
        of("lora", precision=precision, **more)["activations"]
        - of("lora", precision=precision, **few)["activations"]
        for precision in ("float32", "bfloat16")
    ]
    assert grown[1] < grown[0]


def test_the_model_is_left_alone(llama: Any) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    kinds = [type(module) for module in llama.modules()]
    estimate(llama, replace(TUNING, method="dora", checkpointing=True))
    assert kinds == [type(module) for module in llama.modules()]
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_meta_tensors_will_do(llama_folder: Path) -> None:
    source = str(llama_folder)
    assert estimate(hub.skeleton(source)) == estimate(hub.load(source).model)


def test_ranks_that_differ(llama: Any) -> None:
    names = targets.names(llama)
    ranks = {name: index % 3 for index, name in enumerate(names)}
    found = footprint.estimate(llama, replace(TUNING, rank="auto"), ranks, 2, 24)["lora"]
    shapes = targets.shapes(llama, names)
    assert found["gradients"] == 4 * sum(ranks[name] * sum(shapes[name]) for name in names)


def test_packed_rows_have_a_mask() -> None:
    plain, packed = of("lora", tokens=64), of("lora", tokens=64, packing=True)
    assert packed["activations"] >= plain["activations"]


def test_compressed_models_are_estimated_too(compressed_folder: Path) -> None:
    model = hub.load(str(compressed_folder)).model
    found = alone(model, replace(TUNING, method="full"))
    assert found["weights"] < alone(tiny.build("llama"), replace(TUNING, method="full"))["weights"]
    assert found["gradients"] == 4 * models.parameter_count(model)


def test_a_model_whose_work_depends_on_values() -> None:
    model = tiny.build("llama")

    def look(module: nn.Module, given: Any, states: Any) -> None:
        float(states.sum())

    model.model.norm.register_forward_hook(look)
    with pytest.raises(ModelError, match="no estimate of memory: what LlamaForCausalLM computes depends on"):
        estimate(model)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_watermark_sees_what_came_and_went() -> None:
    mark = memory.Watermark(CPU)
    block = torch.ones(50_000_000)
    del block
    again = memory.Watermark(CPU)
    if mark.exact and again.exact:
        assert again.peak() < again.resting + 100_000_000
    assert mark.peak() >= mark.resting


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_holds_after_the_block_has_gone() -> None:
    mark = memory.Watermark(CPU)
    block = torch.ones(50_000_000)
    del block
    assert mark.peak() - mark.resting >= 195_000_000


def test_a_peak_that_cannot_be_forgotten_is_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    mark = memory.Watermark(CPU)
    assert not mark.exact
    assert mark.peak() == memory.peak_bytes(CPU)["ram"]
