"""Data in: arrays, pictures and labelled texts, as the arguments that a model is called with."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import text
from .batches import IGNORED, takes
from .errors import ConfigError

LEGAL = (
    "a .safetensors of the model's arguments (samples first), a .npy of its main one, or a folder of pictures"
)
Arguments = dict[str, Tensor]
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_CAPTIONS = "metadata.jsonl"


def read(sources: Sequence[str], model: Any, processor: Any) -> Arguments:
    """Return the arguments of the model in `sources`, one after another, each (samples, ...).

    Args:
        sources: .safetensors files whose tensors are arguments by name; .npy files of the main argument;
            folders of pictures, in subfolders by their label where these are the model's labels, or with a
            metadata.jsonl of file_name and text.
        model: whose arguments they are.
        processor: makes tensors of pictures, and of texts with them.

    Raises:
        ConfigError: a source cannot be read, or does not go with the others.
    """
    parts = [_read(source, model, processor) for source in sources]
    names = set(parts[0])
    for source, part in zip(sources, parts, strict=True):
        if set(part) != names:
            raise ConfigError(
                f"{source} holds {', '.join(sorted(part))}, and {sources[0]} {', '.join(sorted(names))}"
            )
        lengths = {len(tensor) for tensor in part.values()}
        if len(lengths) != 1:
            raise ConfigError(f"{source} holds tensors of {sorted(lengths)} samples: all must have as many")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def batches(found: Mapping[str, Tensor], at_once: int) -> list[Arguments]:
    """Cut the arguments `found` into batches of `at_once` samples; padding at the end is cut off."""
    count = len(next(iter(found.values())))
    cut = [
        {name: tensor[at : at + at_once] for name, tensor in found.items()} for at in range(0, count, at_once)
    ]
    return [_trimmed(batch) for batch in cut]


def _trimmed(batch: Arguments) -> Arguments:
    """Cut off the positions that are padding in all samples."""
    real = batch.get("attention_mask")
    if real is None or real.ndim != 2 or "input_ids" not in batch:
        return batch
    width = int(real.flip(1).cumsum(1).flip(1).ne(0).any(0).sum())
    same = [name for name, tensor in batch.items() if tensor.shape[:2] == real.shape and tensor.ndim == 2]
    return {name: tensor[:, :width] if name in same else tensor for name, tensor in batch.items()}


def one_by_one(found: Mapping[str, Tensor], config: Any, transduced: bool) -> list[Arguments]:
    """Cut the arguments `found` into samples, without the padding of their sound and of their labels.

    What the prediction network of a transducer reads, where it is not given, are the labels after a blank.

    Args:
        found: the arguments, each (samples, ...); labels are -100 where there are none.
        config: of the model.
        transduced: whether it is a transducer.

    Raises:
        ConfigError: a transducer gets neither labels nor inputs of its prediction network.
    """
    if transduced and not {"labels", "decoder_input_ids"} & set(found):
        raise ConfigError(
            f"got {', '.join(sorted(found))}: a transducer needs what is said, labels (samples, tokens), "
            f"{IGNORED} at the end of shorter ones, or decoder_input_ids, which begin with the blank"
        )
    cut = [_without_padding(batch) for batch in batches(found, 1)]
    return [_with_prefix(batch, config) for batch in cut] if transduced and "labels" in found else cut


def _without_padding(batch: Arguments) -> Arguments:
    cut = dict(batch)
    mask = cut.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        same = [name for name, tensor in cut.items() if tensor.shape[:2] == mask.shape]
        cut |= {name: cut[name][:, : int(mask.sum())] for name in same}
    if "labels" in cut:
        cut["labels"] = cut["labels"][:, : int((cut["labels"] != IGNORED).sum())]
    return cut


def _with_prefix(batch: Arguments, config: Any) -> Arguments:
    labels, sound = batch["labels"], batch.get("input_features")
    blank = torch.full_like(labels[:, :1], config.blank_token_id)
    made = {"decoder_input_ids": torch.cat([blank, labels], dim=1)}
    if sound is not None:
        made["attention_mask"] = torch.ones(sound.shape[:2], dtype=torch.int64)
    return made | batch


def _read(source: str, model: Any, processor: Any) -> Arguments:
    path = Path(source)
    if path.is_dir():
        return _pictures(path, model, processor)
    if not path.is_file():
        raise ConfigError(f"no data at {source}: give {LEGAL}")
    if path.suffix == ".safetensors":
        try:
            held: Arguments = load_file(path)
            return held
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{source} is not a readable safetensors file: {error}") from error
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source} is not a readable .npy file: {error}") from error
        return {model.main_input_name: torch.from_numpy(array)}
    raise ConfigError(f"{source}: give {LEGAL}")


def _pictures(folder: Path, model: Any, processor: Any) -> Arguments:
    captions = folder / _CAPTIONS
    if captions.is_file():
        return _captioned(folder, captions, processor)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES)
    if not files:
        raise ConfigError(f"{folder} holds no pictures ({', '.join(_PICTURES)})")
    found = {"pixel_values": _processed(files, processor)["pixel_values"]}
    labels = [label_of(path.parent.name, model) for path in files]
    known = [label for label in labels if label is not None]
    return found | {"labels": torch.tensor(known)} if len(known) == len(files) else found


def label_of(name: object, model: Any) -> int | None:
    """Return the number of the label `name` of the model, None where it has no such label."""
    known: dict[str, int] = getattr(model.config, "label2id", None) or {}
    if isinstance(name, int) and not isinstance(name, bool):
        return name if 0 <= name < model.config.num_labels else None
    return known.get(str(name))


def _processed(files: Sequence[Path], processor: Any, **texts: Any) -> Arguments:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConfigError("pictures need pillow: pip install pillow, or give pixel_values as .npy") from error
    if processor is None or not hasattr(processor, "save_pretrained"):
        raise ConfigError(
            "the model comes without an image processor: give pixel_values as .npy or .safetensors"
        )
    try:
        opened = [Image.open(file).convert("RGB") for file in files]
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"a picture cannot be read: {error}") from error
    return dict(processor(images=opened, return_tensors="pt", **texts))


def _captioned(folder: Path, captions: Path, processor: Any) -> Arguments:
    rows = list(text.rows(captions))
    lacking = [row for row in rows if not {"file_name", "text"} <= set(row)]
    if lacking:
        raise ConfigError(f"{captions} has a row {json.dumps(lacking[0])}: file_name and text are needed")
    files = [folder / str(row["file_name"]) for row in rows]
    return _processed(
        files, processor, text=[str(row["text"]) for row in rows], padding=True, truncation=True
    )


def labelled(sources: Sequence[str], model: Any, tokenizer: Any, seq_len: int) -> Arguments:
    """Return the arguments for the rows of `.jsonl` files: text, text_pair, and label where there are some.

    Raises:
        ConfigError: a row has no text, some rows have a label and some not, or one is not the model's.
    """
    rows = [row for source in sources for row in _texts(source)]
    if not rows:
        return {}
    if tokenizer.pad_token_id is None:
        raise ConfigError("rows of text are padded, and the tokenizer has no padding token: set one")
    pairs = [str(row["text_pair"]) for row in rows if "text_pair" in row]
    if pairs and len(pairs) != len(rows):
        raise ConfigError(f"{', '.join(sources)}: some rows have a text_pair and some not")
    first = [str(row["text"]) for row in rows]
    encoded = tokenizer(
        first,
        *([pairs] if pairs else []),
        padding=True,
        truncation=True,
        max_length=seq_len,
        return_tensors="pt",
    )
    names = ("input_ids", "attention_mask", "token_type_ids")
    found = {name: encoded[name] for name in names if name in encoded and takes(model, name)}
    given = [row["label"] for row in rows if "label" in row]
    if not given:
        return found
    labels = [label_of(label, model) for label in given]
    if len(given) != len(rows) or None in labels:
        wrong = next((label for label, number in zip(given, labels, strict=True) if number is None), "none")
        raise ConfigError(
            f"{', '.join(sources)}: label {wrong!r} in a row: all rows need one of the model's, "
            f"{', '.join(getattr(model.config, 'label2id', None) or {}) or '0 and up'}"
        )
    return found | {"labels": torch.tensor(labels)}


def _texts(source: str) -> Iterator[Mapping[str, Any]]:
    for row in text.rows(source):
        if not isinstance(row.get("text"), str):
            raise ConfigError(f"{source} has a row with {', '.join(map(str, row))}: a column text is needed")
        yield row
