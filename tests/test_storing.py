"""Models in few bits: budgets hold in bytes, folders load to the same logits, chains stay equal."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import eckart
from eckart import ConfigError, ModelError, StoreError, hub, models, stores
from eckart.factors import FactoredLinear, PivotedLinear
from eckart.measure import Comparison
from eckart.quant.storage import STORAGES
from eckart.quant.stored import StoredEmbedding, StoredHead, StoredLinear

from . import conftest, tiny
from .conftest import Compress, reload


def logits(model: Any) -> torch.Tensor:
    return conftest.logits(model, tiny.tokens())


def wide() -> Any:
    """A model whose matrices are large against the entries of a file's header."""
    return tiny.build("llama", hidden_size=128, intermediate_size=192)


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_saves_and_loads_to_the_same_logits(
    storage: str, compress: Compress, tmp_path: Path
) -> None:
    model, result = compress(tiny.build("llama"), keep=0.7, of="linears", storage=storage)
    assert {part.storage.name for part in stores.stored(model).values()} == {storage}
    eckart.save(model, None, tmp_path / "out", result)
    assert result.after.bytes == hub.weight_bytes(tmp_path / "out")
    again = reload(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "opt", "gpt-neox"])
def test_folders_are_written_again_bit_by_bit(name: str, compress: Compress, tmp_path: Path) -> None:
    model, _ = compress(tiny.build(name), keep=0.75, of="linears", storage="nf4-dq", embeddings="int8")
    eckart.save(model, None, tmp_path / "one")
    eckart.save(reload(tmp_path / "one"), None, tmp_path / "two")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_casts_leave_what_is_stored_alone(compress: Compress) -> None:
    model, _ = compress(tiny.build("llama"), keep=1.0, storage="nf4")
    before = {name: part.dequantised() for name, part in stores.stored(model).items()}
    cast = copy.deepcopy(model).to(torch.bfloat16)
    after = {name: part.dequantised() for name, part in stores.stored(cast).items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tied_head_reads_the_stored_table(compress: Compress, tmp_path: Path) -> None:
    model, result = compress(tiny.build("llama"), keep=1.0, storage="float", embeddings="int4")
    assert isinstance(model.lm_head, StoredHead)
    assert model.lm_head.table is model.model.embed_tokens
    eckart.save(model, None, tmp_path / "out", result)
    keys = load_file(tmp_path / "out" / "model.safetensors")
    assert not [key for key in keys if key.startswith("lm_head.") and keys[key].numel()]
    assert torch.equal(logits(reload(tmp_path / "out")), logits(model))
    moved = copy.deepcopy(model)
    assert moved.lm_head.table is moved.model.embed_tokens


def test_the_form_follows_the_storage(compress: Compress) -> None:
    few, _ = compress(tiny.build("llama"), keep=0.6, of="linears", form="pivoted", storage="nf4")
    many, _ = compress(tiny.build("llama"), keep=0.6, of="linears", form="pivoted", storage="int8")
    assert {type(m) for m in models.low_rank_modules(few).values()} == {FactoredLinear}
    assert {type(m) for m in models.low_rank_modules(many).values()} == {PivotedLinear}


@pytest.mark.parametrize("form", ["factored", "mixed"])
@pytest.mark.parametrize("share", [0.3, 0.15])
def test_a_size_holds_for_ranks_and_bits_together(
    form: Any, share: float, compress: Compress, tmp_path: Path
) -> None:
    dense = hub.accounted_bytes(models.state_tensors(wide()), torch.bfloat16)
    size = int(share * dense)
    model, result = compress(wide(), size=size, form=form, dtype="bfloat16")
    eckart.save(model, None, tmp_path / "out", result)
    written = hub.weight_bytes(tmp_path / "out")
    assert written == result.after.bytes
    assert 0.8 * size < written <= size
    assert {module.storage for module in result.modules} - {"float"}
    assert torch.equal(logits(reload(tmp_path / "out")), logits(model))


def test_more_bytes_are_never_predicted_to_be_worse(compress: Compress) -> None:
    dense = hub.accounted_bytes(models.state_tensors(wide()), torch.bfloat16)
    predicted = [
        compress(wide(), size=int(share * dense), dtype="bfloat16")[1].predicted_increase
        for share in (0.15, 0.25, 0.4, 1.0)
    ]
    assert predicted == sorted(predicted, reverse=True)


def test_rounding_in_the_metric_beats_rounding_to_nearest(
    compress: Compress, text_file: Path, tokenizer: Any
) -> None:
    """On the text that it was calibrated on, against method svd, whose metric is the identity."""
    model, kl = wide(), {}
    for method in ("svd", "eckart"):
        own, _ = compress(copy.deepcopy(model), keep=1.0, storage="int3", embeddings="float", method=method)
        found = eckart.evaluate(own, text_file, against=model, tokens=2048, seq_len=64, tokenizer=tokenizer)
        assert isinstance(found, Comparison)
        kl[method] = found.kl
    assert kl["eckart"] < 0.8 * kl["svd"]


def test_what_is_compressed_can_be_stored_later(
    compress: Compress, tmp_path: Path, text_file: Path, tokenizer: Any
) -> None:
    model, result = compress(tiny.build("llama"), keep=0.7, of="linears")
    eckart.save(model, None, tmp_path / "float", result)
    options: dict[str, Any] = {"tokens": 1024, "gradient_tokens": 512, "seq_len": 64}
    again = reload(tmp_path / "float")
    small, after = eckart.quantise(again, "int8", text=text_file, tokenizer=tokenizer, **options)
    assert after.after.linears == after.before.linears == result.after.linears
    eckart.save(small, None, tmp_path / "stored", after)
    assert hub.weight_bytes(tmp_path / "stored") == after.after.bytes < hub.weight_bytes(tmp_path / "float")
    found = reload(tmp_path / "stored")
    assert torch.equal(logits(found), logits(small))
    change = (logits(found) - logits(model)).norm() / logits(model).norm()
    assert 0 < change < 0.05
    with pytest.raises(ModelError, match="stored in few bits already"):
        eckart.quantise(found, "int8", method="svd")


def test_densified_it_computes_the_same(compress: Compress, tmp_path: Path) -> None:
    model, _ = compress(tiny.build("llama"), keep=0.7, of="linears", storage="nf4")
    expected = logits(model)
    dense = eckart.densify(copy.deepcopy(model))
    assert not stores.stored(dense)
    assert torch.allclose(logits(dense), expected, atol=1e-4 * float(expected.abs().max()))
    dense.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config


def test_parameters_are_those_that_are_stood_for(compress: Compress) -> None:
    model = tiny.build("llama")
    count, flops = models.parameter_count(model), models.flops_per_token(model)
    small, result = compress(model, keep=1.0, storage="nf4-dq")
    assert models.parameter_count(small) == count == result.after.model
    assert models.flops_per_token(small) == flops
    assert {type(part) for part in stores.stored(small).values()} == {
        StoredLinear, StoredEmbedding, StoredHead,
    }  # fmt: skip


def test_a_damaged_scale_is_refused(compress: Compress, tmp_path: Path) -> None:
    model, _ = compress(tiny.build("llama"), keep=1.0, storage="int8")
    eckart.save(model, None, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("absmax"))
    tensors[key].view(torch.float32)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StoreError, match="NaN or infinite: the file is damaged"):
        reload(tmp_path / "out")


def test_tensors_of_another_storage_are_refused(compress: Compress, tmp_path: Path) -> None:
    model, _ = compress(tiny.build("llama"), keep=1.0, storage="int8")
    eckart.save(model, None, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    stored = config["quantization_config"]["storage"]
    for name in stored:
        stored[name] = "nf4" if stored[name] == "int8" else stored[name]
    path.write_text(json.dumps(config))
    with pytest.raises(StoreError, match=r"should have shape .* in the weight files: the folder is damaged"):
        reload(tmp_path / "out")
    for name in stored:
        stored[name] = "int9"
    path.write_text(json.dumps(config))
    with pytest.raises(StoreError, match="stored in 'int9': legal are"):
        reload(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5, "storage": "auto"}, "spends bytes where the curvature says"),
        ({"size": "1MB", "storage": "auto", "method": "svd"}, "give a size, and method eckart"),
        ({"keep": 0.5, "storage": "int9"}, "storage 'int9': legal are auto, float, int8"),
        ({"keep": 0.5, "embeddings": "int9"}, "embeddings 'int9': legal are"),
        ({"keep": 0.5, "stock": True, "storage": "nf4"}, "stock needs no eckart to load"),
        ({"keep": 0.5, "method": "basis-sharing", "storage": "nf4"}, "form 'shared' is stored in the output"),
        ({"size": "1MB", "method": "svd", "storage": "nf4"}, "shared out over ranks and bits by curvature"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        eckart.Recipe(**options)


def test_quantise_wants_a_storage() -> None:
    with pytest.raises(ConfigError, match="name a storage for the matrices or the embeddings"):
        eckart.quantise(tiny.build("llama"))
    with pytest.raises(ConfigError, match="looks at data: give text"):
        eckart.quantise(tiny.build("llama"), "nf4")


@pytest.mark.parametrize("method", ["eckart", "svd-llm"])
def test_heads_that_were_made_narrower_are_stored(method: str, compress: Compress, tmp_path: Path) -> None:
    model, result = compress(
        tiny.build("llama"), keep=0.6, of="linears", form="width", method=method, storage="int4"
    )
    assert result.keep_linears <= 0.6
    if method == "eckart":
        assert "partial" in {module.form for module in result.modules}
    eckart.save(model, None, tmp_path / "out", result)
    assert torch.equal(logits(reload(tmp_path / "out")), logits(model))
