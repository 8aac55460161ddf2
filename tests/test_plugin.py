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
from transformers import Trainer, TrainingArguments

import eckart
from eckart import StoreError, hub, models, plugin

from . import tiny
from .conftest import Compress, logits, reload

GOLDEN = Path(__file__).parent / "golden" / "format-1"


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
        ({"format": 99}, "format 99, this eckart reads formats 1 to 2"),
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
        plugin.read_shapes(tmp_path / "model.safetensors")


def test_the_golden_folder_of_format_1_still_loads() -> None:
    expected = load_file(GOLDEN / "expected" / "logits.safetensors")
    found = logits(reload(GOLDEN, dtype=torch.float32), expected["tokens"])
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
