"""The folder: round trips, guards against a transformers without eckart, damage, the golden folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import eckart
from eckart import StoreError, declaration, hub, models, plugin, skeleton
from eckart.factors import NarrowLinear

from . import tiny
from .conftest import Compress, logits, reload

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_loads_bit_equal_in_every_dtype(
    dtype: str, form: str, compress: Compress, tmp_path: Path, tokenizer: Any
) -> None:
    model, result = compress(tiny.build("llama"), dtype=dtype, form=form)
    before = logits(model, tiny.tokens())
    eckart.save(model, tokenizer, tmp_path / "a", result)
    for again in (reload(tmp_path / "a"), eckart.load(tmp_path / "a")):
        assert again.dtype is hub.dtype(dtype)
        assert torch.equal(logits(again, tiny.tokens()), before)


def test_a_second_save_is_byte_equal_and_generates(compressed_folder: Path, tmp_path: Path) -> None:
    model = reload(compressed_folder)
    model.save_pretrained(tmp_path)
    first, second = (load_file(f / "model.safetensors") for f in (compressed_folder, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(reload(tmp_path), tiny.tokens()), logits(model, tiny.tokens()))
    made = model.generate(tiny.tokens(4), max_new_tokens=4, do_sample=False)
    assert made.shape == (2, 8)


def test_shards(compress: Compress, tmp_path: Path) -> None:
    model, _ = compress(tiny.build("llama"))
    hub.write(tmp_path, model, None, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(reload(tmp_path), tiny.tokens()), logits(model, tiny.tokens()))


@pytest.mark.parametrize("saved_by", ["eckart", "transformers"])
@pytest.mark.parametrize("options", ["", ', attn_implementation="eager"'])
def test_without_eckart_loading_stops(
    saved_by: str, options: str, compressed_folder: Path, tmp_path: Path
) -> None:
    folder = compressed_folder
    if saved_by == "transformers":
        reload(folder).save_pretrained(tmp_path)
        folder = tmp_path
    code = (
        "import transformers, torch\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}{options})\n"
        "print('LOADED')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "LOADED" not in run.stdout
    if options and saved_by == "transformers":
        assert "MISMATCH" in run.stderr
        assert "eckart" in run.stderr
    else:
        assert "eckart: this model needs the eckart package" in run.stderr.splitlines()[-1]
        assert "Error" in run.stderr.splitlines()[-1]


def test_config_only_reconstruction_stops_too(compressed_folder: Path) -> None:
    """A dense model is not built in silence from the config of a compressed one."""
    config = reload(compressed_folder).config
    assert config.attn_implementation == plugin.GUARD


def test_casts_and_dequantize(compressed_folder: Path) -> None:
    model = reload(compressed_folder)
    before = logits(model, tiny.tokens())
    assert logits(model.to(torch.float64), tiny.tokens()).dtype is torch.float64
    dense = model.float().dequantize()
    assert not models.low_rank_modules(dense)
    assert torch.allclose(logits(dense, tiny.tokens()), before, atol=1e-3 * float(before.abs().max()))


def test_trainer_fine_tunes_saves_and_resumes(compressed_folder: Path, tmp_path: Path) -> None:
    model = reload(compressed_folder)
    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(16)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=2, dataloader_pin_memory=False,
    )  # fmt: skip
    before = logits(model, tiny.tokens())
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    after = logits(model.eval(), tiny.tokens())
    assert not torch.equal(after, before)
    assert torch.equal(logits(reload(tmp_path / "checkpoint-2"), tiny.tokens()), after)


def _edit(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    out = tmp_path / "edited"
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format 99, this eckart reads formats 1 to 6"),
        ({"surprise": 1}, "unknown keys"),
        ({"modules": {"../../etc": {"kind": "factored", "rank": 2}}}, "not a dotted module name"),
        ({"modules": {"model.nothing": {"kind": "factored", "rank": 2}}}, "is no nn.Linear of Llama"),
        ({"modules": {"model.layers.0.mlp.up_proj": {"kind": "odd", "rank": 2}}}, "legal is a kind of"),
        ({"modules": {"model.layers.0.mlp.up_proj": {"kind": "factored", "rank": 0}}}, "rank of at least"),
        ({"modules": {"model.layers.0.mlp.up_proj": {"kind": "factored", "rank": 33}}}, "declares rank 33"),
        ({"modules": {"model.layers.0.mlp.up_proj": {"kind": "factored", "rank": 31}}}, "should have shape"),
    ],
)
def test_a_wrong_declaration_is_refused(
    changes: dict[str, Any], message: str, compressed_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=message):
        reload(_edit(compressed_folder, tmp_path, **changes))


def test_a_missing_tensor_is_refused(compressed_folder: Path, tmp_path: Path) -> None:
    out = _edit(compressed_folder, tmp_path)
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".pivot.weight"))
    del tensors[name]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match=f"{name} should have shape .* and has no tensor"):
        reload(out)


def test_an_index_cannot_leave_the_folder(compress: Compress, tmp_path: Path) -> None:
    model, _ = compress(tiny.build("llama"))
    inside = tmp_path / "inside"
    hub.write(inside, model, None, max_shard_size="20KB")
    index = json.loads((inside / "model.safetensors.index.json").read_text())
    victim = next(iter(index["weight_map"].values()))
    shutil.move(inside / victim, tmp_path / victim)
    text = (inside / "model.safetensors.index.json").read_text().replace(victim, f"../{victim}")
    (inside / "model.safetensors.index.json").write_text(text)
    with pytest.raises((StoreError, ValueError), match="several folders|outside|inside"):
        reload(inside)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(StoreError, match="not a readable safetensors file"):
        skeleton.read_shapes(tmp_path / "model.safetensors")


@pytest.mark.parametrize("format", declaration.READS)
def test_the_golden_folders_of_all_formats_still_load(format: int) -> None:
    folder = GOLDEN / f"format-{format}"
    expected = load_file(folder / "expected" / "logits.safetensors")
    found = logits(reload(folder, dtype=torch.float32), expected["tokens"])
    assert torch.allclose(found, expected["logits"], atol=1e-4 * float(found.abs().max()))


def test_accounted_bytes_are_file_bytes(compress: Compress, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        for form in ("factored", "pivoted"):
            out = tmp_path / f"{dtype}-{form}"
            model, result = compress(tiny.build("opt"), dtype=dtype, form=form)
            eckart.save(model, None, out, result)
            assert result.after.bytes == hub.weight_bytes(out)
    dense = tiny.build("llama", torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    tensors = models.state_tensors(tiny.build("llama"))
    assert hub.accounted_bytes(tensors, torch.bfloat16) == hub.weight_bytes(tmp_path / "dense")


# narrow linears


@pytest.fixture(scope="module")
def narrow_folder(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, tokenizer: Any, text_file: Path
) -> Path:
    """A tiny Llama with other widths in every block, saved."""
    options: dict[str, Any] = {"text": text_file, "tokens": 1024, "gradient_tokens": 512, "seq_len": 64}
    model, result = eckart.compress(
        llama_folder, form="width", keep=0.75, of="linears", exclude=["self_attn.*"], **options
    )
    out = tmp_path_factory.mktemp("models") / "narrow"
    widths = {row.rank for row in result.modules if row.form == "narrow"}
    assert len(widths) > 1, "one width for all would be a stock model"
    return eckart.save(model, tokenizer, out, result)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "llama-bias-untied", "gpt-neox", "phi3", "gemma2"])
def test_narrow_linears_load_bit_equal_in_every_dtype(
    name: str, dtype: str, compress: Compress, tmp_path: Path, tokenizer: Any
) -> None:
    model, result = compress(tiny.build(name), form="width", keep=0.75, of="linears", dtype=dtype)
    before = logits(model, tiny.tokens())
    eckart.save(model, tokenizer, tmp_path / "a", result)
    for again in (reload(tmp_path / "a"), eckart.load(tmp_path / "a")):
        assert again.dtype is hub.dtype(dtype)
        stored, own = models.state_tensors(again), models.state_tensors(model)
        assert stored.keys() == own.keys()
        assert all(torch.equal(tensor, own[key]) for key, tensor in stored.items())
        # Kernels of float16 differ in the last bits with where a tensor lies in memory.
        tolerance = 1e-2 if dtype == "float16" else 0.0
        assert torch.allclose(logits(again, tiny.tokens()), before, rtol=tolerance, atol=tolerance)
        assert models.parameter_count(again) == result.after.model


@pytest.mark.parametrize("name", list(tiny.LINEAR))
def test_narrow_linears_densify_to_the_same_function(name: str, compress: Compress, tmp_path: Path) -> None:
    dense = tiny.build(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in dense.state_dict().items()}
    whole = logits(dense, tiny.tokens())
    model, _ = compress(dense, form="width", keep=0.75, of="linears")
    assert any(isinstance(module, NarrowLinear) for module in model.modules())
    before = logits(model, tiny.tokens())
    again = eckart.densify(model)
    assert not models.low_rank_modules(again)
    assert {key: tuple(tensor.shape) for key, tensor in again.state_dict().items()} == shapes
    tolerance = 1e-5 * float(before.abs().max())
    assert torch.allclose(logits(again, tiny.tokens()), before, atol=tolerance)
    assert not torch.allclose(whole, before, atol=tolerance)
    again.save_pretrained(tmp_path)
    assert "eckart" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain, tiny.tokens()), logits(again, tiny.tokens()))


def test_a_narrow_model_saves_again_byte_equal_and_generates(narrow_folder: Path, tmp_path: Path) -> None:
    model = reload(narrow_folder)
    model.save_pretrained(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (narrow_folder, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(reload(tmp_path), tiny.tokens()), logits(model, tiny.tokens()))
    assert model.generate(tiny.tokens(4), max_new_tokens=4, do_sample=False).shape == (2, 8)


def test_without_eckart_a_narrow_model_does_not_load(narrow_folder: Path, tmp_path: Path) -> None:
    reload(narrow_folder).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['eckart'] = None\n"
        "import transformers\n"
        "for folder, options in ((sys.argv[1], {}), (sys.argv[1], {'attn_implementation': 'eager'}),\n"
        "                        (sys.argv[2], {}), (sys.argv[2], {'attn_implementation': 'eager'})):\n"
        "    try:\n"
        "        transformers.AutoModelForCausalLM.from_pretrained(folder, **options)\n"
        "        print('LOADED', folder, options)\n"
        "    except Exception as error:\n"
        "        print('STOPPED', type(error).__name__, 'eckart' in str(error))\n"
    )
    command = [sys.executable, "-c", code, str(narrow_folder), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["STOPPED"] * 4
    assert [line.split()[2] for line in lines[:3]] == ["True"] * 3
    assert "MISMATCH" in run.stderr


NARROW = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "narrow", "rank": 4}, "the kind narrow, a shape"),
        ({"kind": "narrow", "shape": [8, 32]}, "the kind narrow, a shape"),
        ({"kind": "narrow", "shape": [8, 32], "copies": 0}, "a shape .* and copies"),
        ({"kind": "narrow", "shape": [0, 32], "copies": 1}, "a shape .* and copies"),
        ({"kind": "narrow", "shape": [8, -1], "copies": 1}, "a shape .* and copies"),
        ({"kind": "narrow", "shape": [8, 3.5], "copies": 1}, "a shape .* and copies"),
        ({"kind": "narrow", "shape": [8, 32], "copies": 1, "rank": 2}, "a shape .* and copies"),
        (
            {"kind": "narrow", "shape": [49, 32], "copies": 1},
            "as 49 x 32 in 1 copies, and it is 48 x 32: the f",
        ),
        ({"kind": "narrow", "shape": [8, 33], "copies": 1}, "as 8 x 33 in 1 copies, and it is 48 x 32"),
        ({"kind": "narrow", "shape": [8, 32], "copies": 3}, "as 8 x 32 in 3 copies, and it is 48 x 32"),
        ({"kind": "narrow", "shape": [15, 32], "copies": 5}, "as 15 x 32 in 5 copies, and it is 48 x 32"),
        ({"kind": "narrow", "shape": [1, 32], "copies": 1}, "should have shape .* damaged or mixed"),
    ],
)
def test_a_wrong_narrow_declaration_is_refused(
    spec: dict[str, Any], message: str, narrow_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=message):
        reload(_edit(narrow_folder, tmp_path, modules={NARROW: spec}))


@pytest.mark.parametrize("shape", [8, [8], [8, 32, 1], [], None])
def test_a_shape_that_is_no_pair_is_refused(shape: Any, narrow_folder: Path, tmp_path: Path) -> None:
    spec = {"kind": "narrow", "shape": shape, "copies": 1}
    with pytest.raises(StoreError, match="config.json declares"):
        reload(_edit(narrow_folder, tmp_path, modules={NARROW: spec}))


def test_narrow_declarations_say_what_is_there(narrow_folder: Path) -> None:
    model = reload(narrow_folder)
    declared = json.loads((narrow_folder / "config.json").read_text())["quantization_config"]["modules"]
    assert declared == declaration.declare(model).modules
    for name, spec in declared.items():
        module = model.get_submodule(name)
        assert isinstance(module, NarrowLinear)
        assert spec == {"kind": "narrow", "shape": list(module.weight.shape), "copies": 1}
        assert module.whole in ((48, 32), (32, 48))
    assert plugin.guard_tensors(model) == {}, "their own weights fit no stock model"


def test_a_missing_narrow_tensor_is_refused(narrow_folder: Path, tmp_path: Path) -> None:
    out = _edit(narrow_folder, tmp_path)
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    del tensors[name]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match=f"{name} should have shape .* and has no tensor"):
        reload(out)


def test_accounted_bytes_of_narrow_models_are_file_bytes(compress: Compress, tmp_path: Path) -> None:
    for form in ("width", "mixed"):
        out = tmp_path / form
        model, result = compress(tiny.build("llama-bias-untied"), form=form, keep=0.6, of="linears")
        eckart.save(model, None, out, result)
        assert result.after.bytes == hub.weight_bytes(out)


def test_accounted_bytes_know_the_names_on_disk(compress: Compress, tmp_path: Path) -> None:
    model, result = compress(tiny.build("gpt-neox"), form="width", keep=0.75, of="linears")
    eckart.save(model, None, tmp_path / "out", result)
    assert result.after.bytes == hub.weight_bytes(tmp_path / "out")
