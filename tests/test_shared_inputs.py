"""Projections of one input with a common right factor: the optimum, its choice, running once, coming back."""

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import eckart
from eckart import ConfigError, ModelError, Recipe, StoreError, fusing, joint, kinds, models, readings
from eckart.declaration import EckartConfig
from eckart.factors import FactoredLinear, LowRank
from eckart.joint import JointLinear
from eckart.linalg import Metric, weighted_error, weighted_svd
from eckart.stacking import StackedMetric, stacked_svd

from . import tiny
from .conftest import Compress, logits, reload

HEIGHTS = st.lists(st.integers(1, 9), min_size=2, max_size=4)


def _moment(size: int, generator: torch.Generator) -> torch.Tensor:
    rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def _problem(heights: list[int], width: int, seed: int) -> tuple[list[torch.Tensor], Metric, list[Metric]]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(height, width, generator=generator, dtype=torch.float64) for height in heights]
    inputs = Metric(width, _moment(width, generator))
    return weights, inputs, [Metric(height, _moment(height, generator)) for height in heights]


def _loss(
    weights: list[torch.Tensor], lefts: list[torch.Tensor], right: torch.Tensor, inputs: Metric, outputs: Any
) -> float:
    return sum(
        weighted_error(weight - left @ right, inputs, output)
        for weight, left, output in zip(weights, lefts, outputs, strict=True)
    )


# the optimum


@settings(max_examples=25, deadline=None)
@given(HEIGHTS, st.integers(2, 9), st.integers(0, 99))
def test_the_loss_of_every_rank_is_the_sum_of_those_of_the_maps(
    heights: list[int], width: int, seed: int
) -> None:
    weights, inputs, outputs = _problem(heights, width, seed)
    found = stacked_svd(weights, inputs, outputs)
    whole = _loss(weights, [w.new_zeros(len(w), 1) for w in weights], inputs.dense()[:1], inputs, outputs)
    for rank in range(len(found.spectrum) + 1):
        lefts = list(torch.split(found.left[:, :rank], heights))
        spent = _loss(weights, lefts, found.right[:rank], inputs, outputs)
        assert spent == pytest.approx(float(found.tail()[rank]), abs=1e-8 * whole)
    assert float(found.tail()[0]) == pytest.approx(whole)


@settings(max_examples=10, deadline=None)
@given(HEIGHTS, st.integers(3, 7), st.integers(0, 99))
def test_no_other_common_right_factor_is_better(heights: list[int], width: int, seed: int) -> None:
    """Against descent from random right factors, each with the best left factors by least squares."""
    weights, inputs, outputs = _problem(heights, width, seed)
    rank = min(2, sum(heights) - 1)
    optimum = float(stacked_svd(weights, inputs, outputs).tail()[rank])
    gram, losses = inputs.dense(), []
    for start in range(3):
        generator = torch.Generator().manual_seed(start)
        right = torch.randn(rank, width, generator=generator, dtype=torch.float64)
        for _ in range(60):  # alternating: each step is an exact minimum
            lefts = [w @ gram @ right.T @ torch.linalg.inv(right @ gram @ right.T) for w in weights]
            mixed = sum(left.T @ c.dense() @ left for left, c in zip(lefts, outputs, strict=True))
            asked = sum(left.T @ c.dense() @ w for left, c, w in zip(lefts, outputs, weights, strict=True))
            right = torch.linalg.pinv(mixed) @ asked
        losses.append(_loss(weights, lefts, right, inputs, outputs))
    scale = float(stacked_svd(weights, inputs, outputs).tail()[0])
    assert min(losses) >= optimum - 1e-8 * scale
    assert min(losses) <= optimum + 0.05 * scale  # descent comes near: the optimum is attained


def test_the_metrics_of_the_outputs_decide() -> None:
    """Where only one map counts, the common factor is its own, which that of plain stacking is not."""
    weights, inputs, _ = _problem([6, 6], 8, 0)
    counts = [Metric(6, torch.full((6,), 1.0)), Metric(6, torch.full((6,), 1e-9))]
    own = float(weighted_svd(weights[0], inputs, Metric(6)).tail()[3])
    found = stacked_svd(weights, inputs, counts)
    plain = stacked_svd(weights, inputs, [Metric(6), Metric(6)])
    spent, other = (
        weighted_error(weights[0] - svd.left[:6, :3] @ svd.right[:3], inputs, Metric(6))
        for svd in (found, plain)
    )
    assert spent == pytest.approx(own, rel=1e-4)
    assert other > 1.05 * own


@settings(max_examples=20, deadline=None)
@given(HEIGHTS, st.integers(0, 99))
def test_a_stacked_metric_is_its_blocks(heights: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [Metric(height, _moment(height, generator)) for height in heights]
    metric = StackedMetric(parts)
    matrix = torch.randn(sum(heights), 3, generator=generator, dtype=torch.float64)
    whole = metric.dense()
    assert torch.allclose(metric.times(matrix), whole @ matrix)
    rooted = metric.factor_times(matrix)
    assert torch.allclose(rooted.T @ rooted, matrix.T @ whole @ matrix)
    assert torch.allclose(metric.factor_solve(rooted), matrix, atol=1e-6)
    assert torch.allclose(metric.root_times(metric.root_times(matrix)), whole @ matrix)
    assert torch.allclose(metric.inverse_root_times(metric.root_times(matrix)), matrix, atol=1e-6)
    places = torch.arange(0, sum(heights), 2)
    assert torch.equal(metric.part(places).dense(), whole[places][:, places])


def test_metrics_must_be_as_many_as_maps() -> None:
    weights, inputs, outputs = _problem([2, 3], 4, 0)
    with pytest.raises(ConfigError, match="2 maps and 1 output metrics: give one for each"):
        stacked_svd(weights, inputs, outputs[:1])
    with pytest.raises(ConfigError, match="no metric to stack"):
        StackedMetric([])


# the modules


class Gated(nn.Module):
    """Three maps of one input, of different heights."""

    def __init__(self, heights: list[int], width: int, bias: bool) -> None:
        super().__init__()
        for place, height in enumerate(heights):
            self.add_module(f"map_{place}", nn.Linear(width, height, bias))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., sum m_i)."""
        return torch.cat([module(inputs) for module in self.children()], -1)


@settings(max_examples=40, deadline=None)
@given(HEIGHTS, st.integers(2, 9), st.booleans(), st.sampled_from(["factored", "pivoted"]), st.data())
def test_what_is_built_computes_the_stack_at_its_cost(
    heights: list[int], width: int, bias: bool, form: str, data: Any
) -> None:
    rank = data.draw(st.integers(1, min(sum(heights), width)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    stack = LowRank(
        torch.randn(sum(heights), rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, width, generator=generator, dtype=torch.float64),
    )
    biases = [torch.randn(m, generator=generator, dtype=torch.float64) if bias else None for m in heights]
    made = joint.build(stack, list(zip(heights, biases, strict=True)), form)
    inputs = torch.randn(5, width, generator=generator, dtype=torch.float64)
    together = made[0].down(inputs)
    scale = float(stack.dense().norm()) + 1
    for module, rows, own in zip(made, torch.split(stack.dense(), heights), biases, strict=True):
        expected = nn.functional.linear(inputs, rows, own)
        assert torch.allclose(module(together), expected, atol=1e-9 * scale)
        assert torch.allclose(module.map().dense(), rows, atol=1e-9 * scale)
        assert (module.dense_bias() is None) == (own is None)
        if own is not None:
            assert torch.allclose(module.dense_bias(), own, atol=1e-9 * scale)  # type: ignore[arg-type]
        assert module.down is made[0].down
    holder = Gated(heights, width, bias)
    for place, module in enumerate(made):
        models.replace(holder, f"map_{place}", module)
    weights = sum(p.numel() for name, p in holder.named_parameters() if not name.endswith("bias"))
    saved = rank * rank if form == "pivoted" else 0
    assert weights == rank * (width + sum(heights)) - saved
    assert models.flops_per_token(holder) == 2 * weights


def _joined(form: str = "pivoted", bias: bool = True, seed: int = 0) -> tuple[Gated, Gated]:
    """Return a holder with a joint product, and the dense one of the same function."""
    heights, width, rank = [6, 3, 3], 8, 5
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    dense: Any = Gated(heights, width, bias)
    stack = LowRank(*(torch.randn(*s, generator=generator).double() for s in ((12, rank), (rank, width))))
    small = copy.deepcopy(dense)
    maps = [(linear.out_features, linear.bias) for linear in dense.children()]
    for place, module in enumerate(joint.build(stack, maps, form)):
        models.replace(small, f"map_{place}", module.float())
    with torch.no_grad():
        for linear, rows in zip(dense.children(), torch.split(stack.dense(), heights), strict=True):
            linear.weight.copy_(rows)
    return small, dense


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_the_joint_product_runs_once_and_gradients_reach_it(form: str) -> None:
    small, dense = _joined(form)
    down: Any = small.map_0.down  # type: ignore[union-attr]
    calls: list[int] = []
    down.register_forward_hook(lambda *_: calls.append(1))
    inputs = torch.randn(4, 8, requires_grad=True)
    found, expected = small(inputs), dense(inputs)
    assert torch.allclose(found, expected, atol=1e-4)
    assert calls == [1]
    small(inputs=inputs)  # by keyword as well
    assert calls == [1, 1]
    weights = torch.randn_like(found)
    (grad,) = torch.autograd.grad((found * weights).sum(), inputs, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), inputs)
    assert torch.allclose(grad, wanted, atol=1e-4)
    again = torch.utils.checkpoint.checkpoint(small, inputs, use_reentrant=False)
    grads = [torch.autograd.grad((out * weights).sum(), down.weight) for out in (found, again)]
    assert torch.equal(grads[0][0], grads[1][0])


def test_nothing_is_left_from_one_call_to_the_next() -> None:
    """Inputs changed in place between calls, and calls from threads: no result is another's."""
    small, dense = _joined()
    inputs = torch.randn(4, 8)
    with torch.no_grad():
        small(inputs)
        inputs.mul_(-3)
        assert torch.allclose(small(inputs), dense(inputs), atol=1e-4)
    given_ = [torch.randn(64, 8) for _ in range(8)]
    results: dict[int, torch.Tensor] = {}

    def run(place: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                results[place] = small(given_[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert all(torch.equal(results[place], small(one)) for place, one in enumerate(given_))


def test_copies_and_pickles_are_models_of_their_own() -> None:
    small, _ = _joined()
    inputs = torch.randn(2, 8)
    expected = small(inputs)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert joint.enters(other)
        assert torch.equal(other(inputs), expected)
        downs = {id(part.down) for part in other.children()}
        assert len(downs) == 1
        assert downs != {id(small.map_0.down)}  # type: ignore[union-attr]
        with torch.no_grad():
            next(other.parameters()).zero_()
    assert torch.equal(small(inputs), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_torch_compile_makes_one_graph(fused: bool) -> None:
    small, _ = _joined()
    if fused:
        eckart.fuse(small)
        assert fusing.is_fused(small)
    inputs = torch.randn(2, 8)
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(inputs), small(inputs))


def test_the_holder_is_what_it_was_when_its_projections_are() -> None:
    small, dense = _joined()
    assert joint.enters(small)
    assert isinstance(small, Gated)
    for name, linear in dense.named_children():
        models.replace(small, name, copy.deepcopy(linear))
    assert type(small) is Gated
    assert vars(small).keys() == vars(dense).keys()
    inputs = torch.randn(2, 8)
    assert torch.equal(small(inputs), dense(inputs))


def test_outputs_that_stand_in_the_product_are_at_most_its_rank() -> None:
    with pytest.raises(eckart.RankError, match="5 outputs of 6 stand in a joint product of rank 4: legal"):
        JointLinear(nn.Linear(8, 4), 6, own=5)


# who reads the same


def _found(model: Any) -> list[readings.Reading]:
    kinds.unfold(model)
    targets = models.targets(model)
    return readings.find(model, targets, lambda: models.probe_logits(model, models.probe(model)))


@pytest.mark.parametrize("name", tiny.LINEAR)
def test_readings_are_what_reads_one_tensor(name: str) -> None:
    model = tiny.build(name)
    found = _found(model)
    seen: dict[str, int] = {}
    kept: list[torch.Tensor] = []

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[names[module]] = id(args[0])
        kept.append(args[0])  # an id is one's own as long as it lives

    names: dict[nn.Module, str] = {
        models.find(model, linear): linear for linear in models.linear_names(model)
    }
    for module in names:
        module.register_forward_pre_hook(watch)
    logits(model, tiny.tokens())
    inside = [linear for linear in seen if models.owner(linear, models.block_names(model))]
    for reading in found:
        assert len({seen[member] for member in reading.members}) == 1
        assert reading.once
    grouped = {member for reading in found for member in reading.members}
    holders = [one.rpartition(".")[0] for one in inside]
    alone = [one for one in inside if one not in grouped]
    pairs = [(holder, seen[one]) for holder, one in zip(holders, inside, strict=True)]
    assert all(pairs.count((one.rpartition(".")[0], seen[one])) == 1 for one in alone)


def test_heights_need_not_be_equal() -> None:
    found = _found(tiny.build("llama"))
    shapes = [[models.find(tiny.build("llama"), name).out_features for name in r.members] for r in found]
    assert shapes == [[32, 16, 16], [48, 48]] * 2


def test_of_a_cross_attention_keys_and_values_share_storage_alone() -> None:
    """They read the encoder, which is not what the attention is handed first: each computes for itself."""
    import transformers

    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.arange(8)[None]
    run = lambda: model(input_ids=ids, decoder_input_ids=ids).logits  # noqa: E731
    found = readings.find(model, models.targets(model), run)
    crossed = [reading for reading in found if "EncDecAttention" in reading.name]
    assert [(len(reading.members), reading.once) for reading in crossed] == [(2, False)]
    assert all(reading.once and len(reading.members) == 3 for reading in found if reading not in crossed)


class Residual(Gated):
    """Adds its input: what it is handed is not for the maps alone."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., n)."""
        return super().forward(inputs) + inputs


def test_a_holder_that_uses_its_input_otherwise_is_not_handed_a_product() -> None:
    inputs = torch.randn(3, 8)
    for kind, once in ((Gated, True), (Residual, False)):
        torch.manual_seed(0)
        net = nn.Sequential(kind([5, 3], 8, True), nn.Linear(8, 8))
        found = readings.find(net, models.targets(net), lambda net=net: net(inputs).detach())  # type: ignore[misc]
        assert [(reading.members, reading.once) for reading in found] == [(("0.map_0", "0.map_1"), once)]
        assert found[0].forms == (("factored", "pivoted") if once else ("factored",))
        assert type(net[0]) is kind


# the whole job

HALF: dict[str, Any] = {"keep": 0.5, "of": "linears", "share_inputs": True, "dtype": "float32"}


def alike(model: Any, rank: int = 6) -> Any:
    """Give queries, keys and values (gate and up) of every block rows in one space of `rank` dimensions."""
    with torch.no_grad():
        for reading in _found(model):
            linears = [models.find(model, name) for name in reading.members]
            right = torch.randn(rank, linears[0].in_features, generator=torch.Generator().manual_seed(5))
            for linear in linears:
                left = torch.randn(linear.out_features, rank, generator=torch.Generator().manual_seed(6))
                linear.weight.copy_(left @ right / 4)
    return kinds.fold(model)


def _joint(model: Any) -> dict[str, JointLinear]:
    parts = models.low_rank_modules(model).items()
    return {name: part for name, part in parts if isinstance(part, JointLinear)}


@pytest.mark.parametrize("form", ["factored", "pivoted", "mixed"])
@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "opt", "deepseek-v3"])
def test_what_is_shared_is_stored_once_loaded_once_and_comes_back(
    name: str, form: str, compress: Compress, tmp_path: Path
) -> None:
    dense = alike(tiny.build(name))
    model, result = compress(copy.deepcopy(dense), form=form, **HALF)
    parts = _joint(model)
    assert parts
    shared = models.bases(model)
    assert shared.keys() < parts.keys()
    assert result.after.model == models.parameter_count(model)
    assert result.after.linears == sum(row.after for row in result.modules)
    assert {row.form for row in result.modules if row.name in parts} == {"joint"}
    eckart.save(model, None, tmp_path / "a", result)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert not any(f"{own}.down.weight" in stored for own in shared)
    assert (tmp_path / "a" / "model.safetensors").stat().st_size == result.after.bytes
    again = reload(tmp_path / "a")
    assert models.bases(again) == shared
    assert all(again.get_submodule(n).down is again.get_submodule(f).down for n, f in shared.items())
    tokens = tiny.tokens()
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    ids = again.generate(tokens[:1, :4], max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > 4
    again.save_pretrained(tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == stored.keys()
    plain = eckart.densify(again)
    assert not any(joint.enters(module) for module in plain.modules())
    plain.save_pretrained(tmp_path / "c")
    found = logits(reload(tmp_path / "c"), tokens)
    assert torch.allclose(found, logits(model, tokens), atol=1e-3 * float(found.abs().max()))


def test_a_common_space_is_found_and_costs_less(compress: Compress) -> None:
    """Where the rows lie in one space, a common factor is exact at a size at which factors apart are not."""
    dense = alike(tiny.build("llama"))
    kept: dict[str, Any] = {"keep": 0.4, "form": "factored", "include": ["q_proj", "k_proj", "v_proj"]}
    shared, own = (
        compress(copy.deepcopy(dense), dtype="float32", of="linears", share_inputs=choice, **kept)
        for choice in (True, False)
    )
    expected = logits(dense, tiny.tokens())
    errors = [float((logits(model, tiny.tokens()) - expected).norm()) for model, _ in (shared, own)]
    assert errors[0] < 1e-3 * float(expected.norm())
    assert errors[1] > 10 * errors[0]
    assert shared[1].predicted_increase < 1e-6
    assert own[1].predicted_increase > 10 * shared[1].predicted_increase


def test_it_is_never_estimated_to_lose_more_than_without(compress: Compress) -> None:
    """The choices without are among those with."""
    losses = [
        compress(tiny.build("qwen2"), form="pivoted", share_inputs=choice)[1].predicted_increase
        for choice in (True, False)
    ]
    assert losses[0] <= losses[1] * (1 + 0.02)


def test_healing_trains_what_is_shared_once(compress: Compress, text_file: Path, tokenizer: Any) -> None:
    dense = alike(tiny.build("llama"))
    model, _ = compress(copy.deepcopy(dense), form="pivoted", **HALF)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    options: dict[str, Any] = {"tokens": 128, "seq_len": 32, "rate": 1e-3, "hold_tokens": 64}
    options |= {"fit_tokens": 256, "evaluations": 1}
    healing = eckart.Healing(steps=("closed", "logits"), text=(str(text_file),), train="factors", **options)
    small, _ = compress(
        copy.deepcopy(dense),
        keep=0.5,
        of="linears",
        form="pivoted",
        share_inputs=True,
        dtype="float32",
        heal=healing,
    )
    assert _joint(small).keys() == _joint(model).keys()
    names = [name for name, _ in small.named_parameters()]
    assert names == list(before)
    pairs = models.bases(small).items()
    assert all(small.get_submodule(own).down is small.get_submodule(first).down for own, first in pairs)


def test_a_cache_tells_with_and_without_apart(compress: Compress, tmp_path: Path) -> None:
    """Decompositions from the cache make the same model, and those without stacks serve none with."""
    dense = alike(tiny.build("llama"))
    made = [
        compress(copy.deepcopy(dense), form="pivoted", cache=tmp_path, **{**HALF, "share_inputs": share})[0]
        for share in (False, True, True, False)
    ]
    found = [logits(model, tiny.tokens()) for model in made]
    assert [bool(_joint(model)) for model in made] == [False, True, True, False]
    assert torch.equal(found[1], found[2])
    assert torch.equal(found[0], found[3])
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_blocks_may_go_as_well(compress: Compress, tmp_path: Path) -> None:
    """What is shared keeps its name when the block before it is left out."""
    dense = alike(tiny.build("llama", num_hidden_layers=4))
    model, result = compress(dense, keep=0.3, share_inputs=True, depth=True, form="pivoted", dtype="float32")
    eckart.save(model, None, tmp_path / "a", result)
    assert torch.equal(logits(reload(tmp_path / "a"), tiny.tokens()), logits(model, tiny.tokens()))


# what is refused


@pytest.mark.parametrize(
    "values",
    [
        {"method": "svd-llm"},
        {"form": "width"},
        {"stock": True},
        {"storage": "int8"},
        {"allocation": "uniform"},
        {"method": "basis-sharing"},
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="share_inputs weighs common right factors.*use method eckart"):
        Recipe(keep=0.6, share_inputs=True, **values)


def test_plans_in_time_are_refused() -> None:
    with pytest.raises(ConfigError, match="share_inputs with objective 'latency'.*leave one of them out"):
        Recipe(latency=0.6, share_inputs=True)


def test_few_bits_are_refused_by_name(compress: Compress) -> None:
    model, _ = compress(alike(tiny.build("llama")), form="pivoted", **HALF)
    with pytest.raises(ModelError, match="right factor in common with other matrices.*--share-inputs"):
        eckart.quantise(model, storage="int8", method="svd")


@pytest.mark.parametrize(
    "spec",
    [{"rank": 0}, {"rank": 4, "own": -1}, {"rank": True}, {"rank": 4, "basis": 3}, {"rank": 4, "more": 1}],
)
def test_illegal_declarations_are_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="legal for the kind joint are a rank of at least 1"):
        EckartConfig({"model.q": {"kind": "joint", **spec}})


def test_a_damaged_folder_is_refused(compress: Compress, tmp_path: Path) -> None:
    model, result = compress(alike(tiny.build("llama")), form="factored", **HALF)
    eckart.save(model, None, tmp_path / "a", result)
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    modules = config["quantization_config"]["modules"]
    name, spec = next((n, s) for n, s in modules.items() if s["kind"] == "joint")
    for wrong, message in (({"rank": 99}, "a joint rank 99"), ({"own": 33}, "33 of them its own")):
        modules[name] = spec | wrong
        path.write_text(json.dumps(config))
        with pytest.raises(StoreError, match=message):
            reload(tmp_path / "a")
    modules[name] = {**spec, "basis": "lm_head"}
    path.write_text(json.dumps(config))
    with pytest.raises(StoreError, match="has the basis of lm_head, which does not fit"):
        reload(tmp_path / "a")
    assert config["quantization_config"]["format"] == 6


def test_without_anything_joint_folders_stay_as_they_were(compress: Compress) -> None:
    model, _ = compress(tiny.build("llama"), form="factored")
    assert model.config.quantization_config.format == 5
    assert any(isinstance(part, FactoredLinear) for part in model.modules())
