"""The output folder, out of parts that were written one by one."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .. import models, plugin, stores


def shards(folder: Path, files: Sequence[Path]) -> None:
    """Put the weight files `files` into `folder`, numbered, with their index.

    They are linked where the file system can, so that the parts stay whole until the folder is finished.
    """
    index: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        try:
            os.link(file, folder / name)
        except OSError:
            shutil.copyfile(file, folder / name)
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
        index |= dict.fromkeys(keys, name)
        total += file.stat().st_size
    values = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def description(folder: Path, model: Any, dtype: torch.dtype, tokenizer: Any) -> None:
    """Write what stands beside the weights of `model` in `dtype`: config, generation config, tokenizer."""
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if models.low_rank_modules(model) or stores.stored(model):
        plugin.guard_file(folder / "config.json")
    tokenizer.save_pretrained(folder)
