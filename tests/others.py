"""Tiny random models that are no decoder-only language models, and what they are called with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 64
PAD, IGNORED = 1, -100
LENGTHS = (9, 5, 7)
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": PAD, "bos_token_id": 0,
    "eos_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "pad_token_id": PAD, "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
_BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 40, "pad_token_id": PAD, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip
_WHISPER = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 24,
    "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
_CLIP = {
    "text_config": _TEXT | {"projection_dim": 16}, "vision_config": _VISION | {"projection_dim": 16},
    "projection_dim": 16,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", _TEXT),
    "bert-encoder": ("BertModel", "BertConfig", _TEXT),
    "bert-classes": ("BertForSequenceClassification", "BertConfig", _TEXT | {"num_labels": 3}),
    "bert-tags": ("BertForTokenClassification", "BertConfig", _TEXT | {"num_labels": 3}),
    "bert-answers": ("BertForQuestionAnswering", "BertConfig", _TEXT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _TEXT),
    "distilbert": (
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
         "max_position_embeddings": 40, "pad_token_id": PAD},
    ),
    "modernbert": (
        "ModernBertForMaskedLM", "ModernBertConfig",
        _TEXT | {"cls_token_id": 0, "sep_token_id": 2, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION | {"num_labels": 3}),
    "clip": ("CLIPModel", "CLIPConfig", _CLIP),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random model in evaluation mode, with weights large enough that outputs differ."""
    kind, config, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options | changes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # T5's own initialisation is large already.
                parameter.mul_(1.5 if name == "t5" or "embed" in key else 4)
            elif parameter.numel() > 1 and parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """Return `rows` as one tensor, with `value` at the end of the shorter ones."""
    found: Tensor = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    return found


def mask(rows: Sequence[Tensor]) -> Tensor:
    """Return which positions of the padded `rows` are real."""
    return padded([torch.ones(len(row), dtype=torch.int64) for row in rows], 0)


def ids(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Return rows of token ids that end with the end token."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    for row in rows:
        row[-1] = 2
    return rows


def _text(rows: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    return {"input_ids": padded(rows, PAD), "attention_mask": mask(rows)}


def _masked(rows: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    labels = [torch.where(torch.arange(len(row)) % 3 == 1, row, IGNORED) for row in rows]
    return _text(rows, seed) | {"labels": padded(labels, IGNORED)}


def _tags(rows: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    # Labels at padding: nothing of them may count.
    return _text(rows, seed) | {"labels": padded([row % 3 for row in rows], 0)}


def _classes(rows: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    return _text(rows, seed) | {"labels": torch.stack([row[0] % 3 for row in rows])}


def _answers(rows: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    ends = torch.tensor([1 + len(row) % 2 for row in rows])
    return _text(rows, seed) | {"start_positions": ends - 1, "end_positions": ends}


def _translation(rows: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    targets = ids([len(row) // 2 + 1 + index for index, row in enumerate(rows)], seed + 50)
    return _text(rows, seed) | {"labels": padded(targets, IGNORED)}


def _speech(rows: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    sound = torch.randn(len(rows), 8, 40, generator=torch.Generator().manual_seed(seed))
    return {"input_features": sound, "labels": padded(rows, IGNORED)}


def _images(rows: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    pixels = torch.randn(len(rows), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "labels": torch.stack([row[0] % 3 for row in rows])}


def _pairs(rows: Sequence[Tensor], seed: int) -> dict[str, Any]:
    found = _text(rows, seed) | {"pixel_values": _images(rows, seed)["pixel_values"]}
    return {**found, "return_loss": True}


_INPUTS: dict[str, Callable[[Sequence[Tensor], int], dict[str, Any]]] = {
    "bert": _masked, "roberta": _masked, "distilbert": _masked, "modernbert": _masked,
    "bert-encoder": _text, "bert-classes": _classes, "bert-tags": _tags, "bert-answers": _answers,
    "t5": _translation, "bart": _translation, "whisper": _speech, "vit": _images, "clip": _pairs,
}  # fmt: skip


def batch(name: str, seed: int = 0, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """Return a batch with padding, where the model has sequences."""
    return _INPUTS[name](ids(lengths, seed), seed)


def batches(name: str, count: int = 5) -> list[dict[str, Any]]:
    """Return several of them."""
    return [batch(name, seed) for seed in range(count)]


def singles(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the samples of a batch one by one, without padding."""
    tensors = {key: value for key, value in whole.items() if isinstance(value, Tensor)}
    found = []
    for index in range(len(next(iter(tensors.values())))):
        one = {key: value[index : index + 1] for key, value in tensors.items()}
        labels, real = one.get("labels"), one.get("attention_mask")
        if labels is not None and labels.ndim == 2:
            same = real is not None and labels.shape == real.shape
            length = int(real.sum()) if same and real is not None else int((labels != IGNORED).sum())
            one["labels"] = labels[:, :length]
        if real is not None:
            one |= {key: one[key][:, : int(real.sum())] for key in ("input_ids", "attention_mask")}
        found.append(one)
    return found
