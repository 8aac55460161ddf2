"""What the pages of the documentation take as given: the words MODEL, BASE, ADAPTER, rows.jsonl and so on.

Each is made in the folder of the page when a block first names it and nothing of that name is there. MODEL,
calibration.txt and held-out.txt are links to what the caller gave; what is derived (TUNED, DIR, ADAPTER) is
derived from MODEL in the cheapest way; models of other kinds and data are tiny and random.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import eckart

_WIDTHS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 1024,
}  # fmt: skip
_TWO_STACKS = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
_SENTENCES = ("a river runs low", "the matrix has a rank", "nothing is left of it", "values fall off quickly")


@dataclass(frozen=True, slots=True)
class Inputs:
    """A dense causal language model with its tokenizer, text to calibrate on, and text to measure on."""

    model: Path
    text: Path
    eval_text: Path

    def make(self, name: str, folder: Path) -> None:
        """Make the input `name` in `folder`, unless something of that name is there.

        Raises:
            KeyError: where there is no such input.
        """
        target = folder / name
        if not target.exists():
            PLACEHOLDERS[name](self, target)


def _link(source: Path, target: Path) -> None:
    target.symlink_to(source.resolve(), target_is_directory=source.is_dir())


def _copy(inputs: Inputs, target: Path) -> None:
    shutil.copytree(inputs.model, target)


def _tuned(inputs: Inputs, target: Path) -> None:
    """MODEL with a difference of rank two in every matrix."""
    shutil.copytree(inputs.model, target)
    generator = torch.Generator().manual_seed(5)
    for file in target.glob("*.safetensors"):
        weights = load_file(file)
        for key, weight in weights.items():
            if weight.ndim == 2 and "proj" in key:
                left, right = (torch.randn(size, 2, generator=generator) for size in weight.shape)
                weights[key] = (weight + 0.01 * (left @ right.T)).to(weight.dtype)
        save_file(weights, file, {"format": "pt"})


def _smaller(inputs: Inputs, target: Path, **options: Any) -> None:
    model, result = eckart.compress(inputs.model, method="svd", keep=0.8, of="linears", **options)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    eckart.save(model, tokenizer, target, result)


def _adapter(inputs: Inputs, target: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(inputs.model)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(target)
    AutoTokenizer.from_pretrained(inputs.model).save_pretrained(target)


def _config(inputs: Inputs, target: Path) -> None:
    AutoConfig.from_pretrained(inputs.model).save_pretrained(target)
    AutoTokenizer.from_pretrained(inputs.model).save_pretrained(target)


def _other(kind: str, config: str, **options: Any) -> Callable[[Inputs, Path], None]:
    """A tiny random model of another kind, with MODEL's tokenizer where it reads text."""

    def make(inputs: Inputs, target: Path) -> None:
        words: dict[str, Any] = {}
        if "image_size" not in options and "num_mel_bins" not in options:
            tokenizer = AutoTokenizer.from_pretrained(inputs.model)
            tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
            tokenizer.save_pretrained(target)
            words = {"vocab_size": len(tokenizer)}
        torch.manual_seed(0)
        settings = getattr(transformers, config)(**options | words)
        getattr(transformers, kind)(settings).eval().save_pretrained(target)

    return make


def _rows(row: Callable[[int, str], Mapping[str, Any]]) -> Callable[[Inputs, Path], None]:
    def make(_: Inputs, target: Path) -> None:
        lines = (json.dumps(row(index, _SENTENCES[index % 4])) for index in range(48))
        target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    return make


def _table(_: Inputs, target: Path) -> None:
    rows = (f"{_SENTENCES[index % 4]} {index}\t{index % 2}" for index in range(48))
    target.write_text("sentence\tlabel\n" + "".join(row + "\n" for row in rows), encoding="utf-8")


def _pictures(_: Inputs, target: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(6)
    for index in range(24):
        folder = target / ("river" if index % 2 else "bank")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")


def _sound(_: Inputs, target: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(12, 8, 40, generator=generator)
    labels = torch.randint(3, 60, (12, 9), generator=generator)
    save_file({"input_features": features, "labels": labels}, target)


def _vit(inputs: Inputs, target: Path) -> None:
    _other("ViTForImageClassification", "ViTConfig", **_WIDTHS, image_size=16, patch_size=4)(inputs, target)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(target)


PLACEHOLDERS: dict[str, Callable[[Inputs, Path], None]] = {
    "MODEL": lambda inputs, target: _link(inputs.model, target),
    "calibration.txt": lambda inputs, target: _link(inputs.text, target),
    "held-out.txt": lambda inputs, target: _link(inputs.eval_text, target),
    "text.txt": lambda inputs, target: _link(inputs.text, target),
    "train.txt": lambda inputs, target: _link(inputs.text, target),
    "BASE": _copy,
    "A": _copy,
    "B": _tuned,
    "TUNED": _tuned,
    "DIR": _smaller,
    "SMALLER": lambda inputs, target: _smaller(inputs, target, storage="int8"),
    "ADAPTER": _adapter,
    "CONFIG": _config,
    "BERT": _other("BertForMaskedLM", "BertConfig", **_WIDTHS),
    "CLASSIFIER": _other("BertForSequenceClassification", "BertConfig", **_WIDTHS),
    "ENCODER": _other("BertModel", "BertConfig", **_WIDTHS),
    "T5": _other(
        "T5ForConditionalGeneration", "T5Config", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    ),
    "WHISPER": _other(
        "WhisperForConditionalGeneration", "WhisperConfig", **_TWO_STACKS, vocab_size=64, num_mel_bins=8,
        max_source_positions=20, max_target_positions=24,
    ),
    "VIT": _vit,
    "rows.jsonl": _rows(lambda index, words: {"prompt": f"{words} {index}:", "completion": f" {index % 7}"}),
    "labelled.jsonl": _rows(lambda index, words: {"text": f"{words} {index}", "label": index % 2}),
    "chats.jsonl": _rows(
        lambda index, words: {
            "messages": [
                {"role": "user", "content": f"{words} {index}"},
                {"role": "assistant", "content": f"yes, {index % 7}"},
            ]
        }
    ),
    "train.tsv": _table,
    "pictures": _pictures,
    "sound.safetensors": _sound,
}  # fmt: skip
