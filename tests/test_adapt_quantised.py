"""NF4 bases: what is multiplied by, what is stored, and what a QLoRA layer computes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor, nn

import eckart
from eckart import hub
from eckart.adapt import attach, quantised, store
from eckart.errors import ModelError
from eckart.linalg import Metric, to_float64, weighted_error

from . import adapters, tiny, tuning

pytestmark = adapters.QUIET
# Dettmers et al. 2023, appendix E: quantiles of a normal distribution, scaled to [-1, 1].
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def wide() -> Any:
    """A tiny Llama whose widths are multiples of 64."""
    return tiny.build("llama", **WIDE)


@pytest.fixture
def wide_folder(tmp_path: Path, tokenizer: Any, wide: Any) -> Path:
    wide.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def nearest(values: Tensor, codes: Tensor) -> Tensor:
    """Return for each of `values` the nearest code."""
    return codes.take((values[..., None] - codes).abs().argmin(-1))


def reference(weight: Tensor, double: bool) -> Tensor:
    """Return NF4(weight), its constants quantised too if `double`, by the definition."""
    blocks = weight.flatten().view(-1, 64)
    largest = blocks.abs().amax(1)
    codes = nearest(blocks / largest[:, None], NF4)
    if double:
        codebook = torch.as_tensor(create_dynamic_map())
        offset = largest.mean()
        rest = largest - offset
        padded = torch.cat([rest, rest.new_zeros(-len(rest) % 256)]).view(-1, 256)
        scale = padded.abs().amax(1, keepdim=True)
        again = nearest(padded / scale, codebook) * scale
        largest = again.flatten()[: len(rest)] + offset
    return (codes * largest[:, None]).view_as(weight)


def holder(rows: int = 48, columns: int = 64, bias: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    linear = nn.Linear(columns, rows, bias=bias)
    return nn.Sequential(linear), linear.weight.detach().clone()


@pytest.mark.parametrize("double", [False, True])
def test_it_multiplies_by_what_the_definition_says(double: bool) -> None:
    model, weight = holder()
    returned = quantised.quantise(model, "0", double=double, compute=torch.float32)
    assert torch.equal(returned, weight)
    expected = reference(weight, double)
    assert torch.allclose(quantised.dequantised(model.get_submodule("0")), expected, atol=1e-6)
    inputs = torch.randn(5, 64)
    bias = model.state_dict()["0.bias"]
    for mode in (True, False):
        found = model.train(mode)(inputs)
        assert torch.allclose(found, inputs @ expected.T + bias, atol=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_what_it_stores_is_counted(double: bool) -> None:
    model, weight = holder(512, 1024, bias=False)
    quantised.quantise(model, "0", double=double, compute=torch.float32)
    size = weight.numel()
    if double:
        # 4 bits, a byte for 64, a float for 64 * 256; both codebooks and the offset.
        expected = 4 + 8 / 64 + 32 / (64 * 256) + 32 * (16 + 256 + 1) / size
    else:
        expected = 4 + 32 / 64 + 32 * 16 / size
    assert quantised.bits_per_parameter(model.get_submodule("0")) == pytest.approx(expected, rel=1e-12)


def test_errors_of_quantising() -> None:
    model, _ = holder()
    with pytest.raises(ModelError, match="nothing"):
        quantised.quantise(model, "nothing", double=True, compute=torch.float32)
    with pytest.raises(ModelError, match="Linear holds no quantised weight"):
        quantised.dequantised(model.get_submodule("0"))
    narrow, _ = holder(columns=32)
    with pytest.raises(ModelError, match="0 has 32 inputs: NF4 takes multiples of 64"):
        quantised.quantise(narrow, "0", double=True, compute=torch.float32)


def test_what_is_no_multiple_of_a_block_stays_as_it_is(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny.build("llama", **WIDE | {"intermediate_size": 96})
    chosen = tuning.settings(tuning.data(tmp_path), method="qlora")
    attached, done = tuning.run(model, tokenizer, chosen, tmp_path / "work")
    assert attached.storage is not None
    assert not any("down_proj" in name for name in attached.storage.targets)
    assert len(attached.storage.targets) == 12
    assert (
        "2 linear maps stay as they are, not in NF4: their inputs are no multiple of 64"
        in done.prospect.notes
    )
    assert done.end.loss < done.prospect.start.loss
    with pytest.raises(ModelError, match="no linear map has a multiple of 64 inputs, as NF4 needs"):
        tuning.run(tiny.build("llama"), tokenizer, chosen, tmp_path / "other")


@pytest.mark.parametrize("init", quantised.CORRECTIONS)
def test_the_start_is_the_best_of_its_rank_in_its_metric(init: Any) -> None:
    model, weight = holder()
    quantised.quantise(model, "0", double=True, compute=torch.float32)
    torch.manual_seed(2)
    seen = torch.randn(400, 64) @ torch.randn(64, 64) * torch.linspace(0.1, 3, 64)
    moments: dict[Any, Tensor] = {"gram": seen.T @ seen / 400, "absolute": seen.abs().mean(0)}
    metric = {"residual": moments["gram"], "lqer": moments["absolute"].double().square(), "loftq": None}
    inputs = Metric(64, metric[init], quantised.DAMP)
    error = to_float64(weight) - to_float64(quantised.dequantised(model.get_submodule("0")))
    values = torch.linalg.svdvals(inputs.root_times(error.T).T)
    for rank in (1, 4, 16, 48):
        method = quantised.CORRECTIONS[init]
        found = quantised.residual(weight, model.get_submodule("0"), moments, rank, method)
        assert found.left.shape == (48, rank)
        left = weighted_error(error - found.dense(), inputs, Metric(48))
        assert float(left) == pytest.approx(float(values[rank:].square().sum()), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("init", ["default", "residual"])
@pytest.mark.parametrize("double", [False, True])
def test_a_qlora_layer_is_the_dequantised_base_plus_the_update(
    init: Any, double: bool, wide: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """X doubleDequant(c1, c2, W) + s X L1 L2: the base is quantised, the update is not."""
    chosen = tuning.settings(tuning.data(tmp_path), method="qlora", init=init, double=double, rank=3)
    attached, done = tuning.run(wide, tokenizer, chosen, tmp_path / "work")
    assert (done.error is None) == (init == "default")
    name = "model.layers.1.mlp.up_proj"
    layer = attached.model.base_model.model.get_submodule(name)
    weight = wide.get_submodule(name).weight.detach()
    base = reference(weight, double)
    first, second = (part[attach.ADAPTER].weight.detach() for part in (layer.lora_A, layer.lora_B))
    assert first.dtype == second.dtype == torch.float32
    scale = layer.scaling[attach.ADAPTER]
    assert scale == 2
    inputs = torch.randn(7, 64)
    expected = inputs @ base.T + scale * (inputs @ first.T) @ second.T
    with torch.no_grad():
        assert torch.allclose(layer.eval()(inputs), expected, atol=1e-5)
    assert done.end.loss < done.prospect.start.loss
    assert not layer.base_layer.weight.requires_grad


def test_corrected_starts_are_nearer_to_the_model_than_none(
    wide: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = tuning.data(tmp_path)
    ids, found = tiny.tokens(), {}
    errors: dict[Any, float] = {}
    for init in ("default", *quantised.CORRECTIONS):
        chosen = tuning.settings(path, method="qlora", init=init, rank=8, steps=1, rate=1e-12, evaluations=1)
        attached, done = tuning.run(wide, tokenizer, chosen, tmp_path / init)
        found[init] = float((tuning.logits(attached.model, ids) - tuning.logits(wide, ids)).norm())
        if done.error is not None:
            errors[init] = done.error
    assert set(errors) == set(quantised.CORRECTIONS)
    assert max(errors.values()) < 0.95
    assert min(errors, key=errors.__getitem__) == "residual"
    assert all(found[init] < 0.95 * found["default"] for init in errors)


def test_an_adapter_on_nf4_loads_on_the_base_that_it_was_trained_on(
    wide_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    chosen = tuning.settings(tuning.data(tmp_path), method="qlora")
    out = tmp_path / "adapter"
    model, _ = eckart.tune(wide_folder, chosen, out=out)
    ids = tiny.tokens()
    expected = tuning.logits(model, ids)
    assert torch.allclose(tuning.logits(eckart.load(out), ids), expected, atol=1e-5)
    held = store.read(out)
    assert held.storage is not None
    assert held.storage.double
    assert len(held.storage.targets) == 14
    # In plain PEFT, on the same base made by hand.
    base = hub.load(str(wide_folder), compute=torch.float32).model
    for name in held.storage.targets:
        quantised.quantise(base, name, double=True, compute=torch.float32)
    assert torch.allclose(tuning.logits(adapters.load(base, out), ids), expected, atol=1e-5)
    merged, report = eckart.merge(str(wide_folder), out, dtype="float32")
    assert torch.allclose(tuning.logits(merged, ids), expected, atol=1e-4)
    assert report.warnings


def test_bits_agree_with_the_limit() -> None:
    model, _ = holder(2048, 2048, bias=False)
    quantised.quantise(model, "0", double=True, compute=torch.float32)
    limit = 4 + 8 / 64 + 32 / (64 * 256)
    assert limit == pytest.approx(4.127, abs=1e-3)
    assert math.isclose(quantised.bits_per_parameter(model.get_submodule("0")), limit, rel_tol=1e-3)
