"""Corrections in models: they lower the error, keep to their bytes, and come back from folders bit by bit."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import eckart
from eckart import ConfigError, ModelError, StoreError, correcting, hub, models, stores
from eckart.measure import Comparison
from eckart.quant.corrected import CorrectedLinear
from eckart.quant.correction import METHODS
from eckart.quant.stored import StoredLinear

from . import conftest, tiny
from .conftest import Compress, reload

Quantise = Callable[..., tuple[Any, Any]]


@pytest.fixture
def quantise(tokenizer: Any, text_file: Path) -> Quantise:
    """Store a tiny model with little text; keyword arguments go over these defaults."""

    def run(model: Any, storage: str = "nf4", **options: Any) -> tuple[Any, Any]:
        defaults: dict[str, Any] = {"tokens": 1024, "gradient_tokens": 512, "seq_len": 64}
        defaults |= {"text": text_file, "tokenizer": tokenizer, "correction_rank": 4}
        defaults |= {"correction": "eckart", "embeddings": "float"}
        return eckart.quantise(model, storage, **defaults | options)

    return run


def logits(model: Any) -> torch.Tensor:
    return conftest.logits(model, tiny.tokens())


def corrected(model: Any) -> dict[str, CorrectedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, CorrectedLinear)}


def divergence(model: Any, dense: Any, text_file: Path, tokenizer: Any) -> float:
    found = eckart.evaluate(model, text_file, against=dense, tokens=2048, seq_len=64, tokenizer=tokenizer)
    assert isinstance(found, Comparison)
    return found.kl


@pytest.mark.parametrize("stored", ["int8", "float"])
def test_with_a_correction_a_model_is_nearer_to_the_dense_one(
    stored: str, quantise: Quantise, text_file: Path, tokenizer: Any
) -> None:
    dense = tiny.build("llama")
    without = quantise(copy.deepcopy(dense), "int3", correction=None, correction_rank=None)[0]
    last = divergence(without, dense, text_file, tokenizer)
    for rank in (4, 16):
        options = {"correction_rank": rank, "correction_storage": stored}
        found = quantise(copy.deepcopy(dense), "int3", **options)[0]
        assert corrected(found)
        kl = divergence(found, dense, text_file, tokenizer)
        assert kl < 0.9 * last
        last = kl


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_from_its_folder(method: str, quantise: Quantise, tmp_path: Path) -> None:
    model, result = quantise(tiny.build("llama"), "nf4-dq", correction=method)
    assert corrected(model)
    eckart.save(model, None, tmp_path / "out", result)
    assert hub.weight_bytes(tmp_path / "out") == result.after.bytes
    assert torch.equal(logits(reload(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "opt", "gpt-neox"])
@pytest.mark.parametrize("stored", ["int8", "nf4-dq", "float"])
def test_folders_are_written_again_bit_by_bit(
    name: str, stored: str, quantise: Quantise, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"correction_storage": stored, "embeddings": "int8", "dtype": "bfloat16"}
    model, result = quantise(tiny.build(name), "nf4-dq", **options)
    assert corrected(model)
    eckart.save(model, None, tmp_path / "one", result)
    eckart.save(reload(tmp_path / "one"), None, tmp_path / "two")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("one", "two")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("stored", ["int8", "nf4", "float"])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_ranks_take_at_most_the_bytes_of_the_uniform_rank(rank: int, stored: str, quantise: Quantise) -> None:
    model, _ = quantise(tiny.build("llama"), correction_rank=rank, correction_storage=stored)
    ranks = {name: module.rank for name, module in corrected(model).items()}
    assert len(set(ranks.values())) > 1 or rank == 40

    def spent(ranks: dict[str, int]) -> int:
        return sum(correcting.factor_bytes(stored, shapes[name], rank) for name, rank in ranks.items())

    shapes = {target.name: target.shape for target in models.targets(tiny.build("llama"))}
    uniform = {name: min(rank, *shape) for name, shape in shapes.items()}
    assert 0 < spent(ranks) <= spent(uniform)
    if stored != "float":
        parts = [part for m in corrected(model).values() for part in (m.up, m.down)]
        held = sum(b.numel() * b.element_size() for part in parts for b in part.buffers())
        assert held == spent(ranks)


def test_shared_out_by_curvature_ranks_do_better_than_one_for_all(
    quantise: Quantise, text_file: Path, tokenizer: Any
) -> None:
    """Of two methods with the same metric for the correction; svd-llm's has no unit to share out by."""
    dense = tiny.build("llama", num_hidden_layers=4)
    for name, weight in dense.named_parameters():
        if ".3." in name and weight.ndim == 2:
            weight.data *= 0.1
    kl = {}
    for method in ("io-svd", "svd-llm"):
        model, _ = quantise(copy.deepcopy(dense), "int2", method=method, correction_rank=3)
        ranks = [module.rank for module in corrected(model).values()]
        assert (len(set(ranks)) == 1) == (method == "svd-llm")
        kl[method] = divergence(model, dense, text_file, tokenizer)
    assert kl["io-svd"] < kl["svd-llm"]


def test_densified_it_computes_the_same_and_is_a_stock_model(quantise: Quantise, tmp_path: Path) -> None:
    model, _ = quantise(tiny.build("llama-bias-untied"), correction_storage="nf4")
    expected, count = logits(model), models.parameter_count(tiny.build("llama-bias-untied"))
    dense = eckart.densify(copy.deepcopy(model))
    assert not stores.stored(dense)
    assert not models.low_rank_modules(dense)
    assert models.parameter_count(dense) == count
    assert torch.allclose(logits(dense), expected, atol=1e-4 * float(expected.abs().max()))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_what_it_holds_and_costs(quantise: Quantise) -> None:
    model = tiny.build("llama")
    count, flops = models.parameter_count(model), models.flops_per_token(model)
    small, result = quantise(model, "nf4")
    added = sum(m.rank * (m.in_features + m.out_features) for m in corrected(small).values())
    assert models.parameter_count(small) == count + added == result.after.model
    assert models.flops_per_token(small) == flops + 2 * added
    rows = {row.name: row for row in result.modules if row.form == "corrected"}
    assert {name: row.rank for name, row in rows.items()} == {n: m.rank for n, m in corrected(small).items()}
    assert sum(row.after - row.before for row in rows.values()) == added


def test_casts_leave_a_stored_correction_alone(quantise: Quantise) -> None:
    model, _ = quantise(tiny.build("llama"))
    before = {name: module.dense_weight() for name, module in corrected(model).items()}
    after = corrected(copy.deepcopy(model).to(torch.bfloat16))
    assert all(torch.equal(before[name], after[name].dense_weight()) for name in before)


def test_compress_corrects_what_stays_whole(compress: Compress, tmp_path: Path) -> None:
    recipe = eckart.Recipe(
        keep=1.0, correction="eckart", correction_rank=3, storage="int4", embeddings="float",
        overrides=(eckart.Override("q_proj", rank=4), eckart.Override("o_proj", dense=True)),
        text=("none",),
    )  # fmt: skip
    model, result = compress(tiny.build("llama"), recipe=recipe, keep=1.0)
    forms = {row.name.rsplit(".", 1)[-1]: row.form for row in result.modules}
    assert forms["q_proj"] in ("factored", "pivoted")
    names = {name.rsplit(".", 1)[-1] for name in corrected(model)}
    assert {"o_proj", "down_proj"} & names
    assert "q_proj" not in names
    eckart.save(model, None, tmp_path / "out", result)
    assert hub.weight_bytes(tmp_path / "out") == result.after.bytes
    assert torch.equal(logits(reload(tmp_path / "out")), logits(model))


def test_a_compressed_model_has_corrections_where_it_is_whole(
    compress: Compress, quantise: Quantise, tmp_path: Path
) -> None:
    model, _ = compress(tiny.build("llama"), include="mlp.*", keep=0.7, of="linears", form="factored")
    small, _ = quantise(model, "int4")
    assert {name.split(".")[3] for name in corrected(small)} == {"self_attn"}
    eckart.save(small, None, tmp_path / "out")
    assert torch.equal(logits(reload(tmp_path / "out")), logits(small))
    every, _ = compress(tiny.build("llama"), keep=0.6, of="linears", method="io-svd")
    with pytest.raises(ModelError, match=r"for matrices that are whole and stored .* the model has none"):
        quantise(every)


def test_an_old_transformers_finds_a_guard_in_place_of_the_weight(quantise: Quantise, tmp_path: Path) -> None:
    model, result = quantise(tiny.build("llama"))
    eckart.save(model, None, tmp_path / "out", result)
    first = next(iter(corrected(model)))
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{first}.weight"].numel() == 0


def test_what_is_declared_must_fit(quantise: Quantise, tmp_path: Path) -> None:
    model, _ = quantise(tiny.build("llama"))
    eckart.save(model, None, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    name = next(iter(corrected(model)))
    for rank, message in ((99, "declares rank 99 for"), (0, "legal is a kind"), (5, "should have shape")):
        if corrected(model)[name].rank == rank:
            continue
        config["quantization_config"]["modules"][name]["rank"] = rank
        path.write_text(json.dumps(config))
        with pytest.raises(StoreError, match=message):
            reload(tmp_path / "out")


def test_the_base_and_its_factors_are_stored(quantise: Quantise) -> None:
    model, _ = quantise(tiny.build("llama"), "nf4-dq", correction_storage="int4")
    for module in corrected(model).values():
        parts = (module.base, module.up, module.down)
        kinds = [part.storage.name for part in parts if isinstance(part, StoredLinear)]
        assert kinds == ["nf4-dq", "int4", "int4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "float"}, "stored in float: name a storage: int8"),
        ({"storage": None}, "stored in float: name a storage"),
        (
            {"correction": "lora"},
            "correction 'lora': legal are lorc, lqer, qera, eora, loftq, caldera, eckart",
        ),
        ({"correction_rank": 0}, "correction_rank 0: must be a whole number of at least 1"),
        ({"correction_storage": "int9"}, "correction_storage 'int9': legal are float, int8"),
        ({"correction": None}, "there is no correction: name one of lorc"),
        ({"keep": 0.8}, "for matrices that keep their rank, .*: give keep 1 with it"),
        ({"keep": None, "size": "1MB"}, "its bytes are in no other budget: give keep 1"),
        ({"stock": True, "storage": None}, "stock needs no eckart to load, and correction 'qera' does"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"keep": 1.0, "storage": "nf4", "correction": "qera", "correction_rank": 8}
    with pytest.raises(ConfigError, match=message):
        eckart.Recipe(**given | options)


def test_a_correction_that_looks_at_data_wants_text() -> None:
    with pytest.raises(ConfigError, match="correction 'qera' looks at data: give text, or use loftq or lorc"):
        eckart.quantise(tiny.build("llama"), "nf4", method="svd", correction="qera")
    model, _ = eckart.quantise(
        tiny.build("llama"), "nf4", embeddings="float", method="svd", correction="loftq", correction_rank=4
    )
    assert {module.rank for module in corrected(model).values()} == {4}
