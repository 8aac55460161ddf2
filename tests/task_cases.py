"""Tiny random models of the tasks that run on the model's own arguments, and those arguments."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    ResNetConfig,
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
    SamVisionConfig,
    VitDetConfig,
    VitPoseBackboneConfig,
)

from .others import _TEXT, _VISION, VOCABULARY

SAMPLES, IMAGE = 10, VOCABULARY - 1
_SOUND = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 32, "num_labels": 3,
}  # fmt: skip
GENERATOR = torch.Generator().manual_seed(0)


def ids(*shape: int) -> Tensor:
    return torch.randint(3, IMAGE, (SAMPLES, *shape), generator=GENERATOR)


def noise(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=GENERATOR)


def classes(count: int) -> Tensor:
    return torch.randint(count, (SAMPLES,), generator=GENERATOR)


def padded(tokens: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(tokens)
    mask[1::2, -2:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def with_picture() -> dict[str, Tensor]:
    text = ids(8)
    places = torch.full((SAMPLES, 16), IMAGE)
    labels = torch.cat([torch.full((SAMPLES, 16), -100), text], dim=1)
    whole = torch.cat([places, text], dim=1)
    return {
        "input_ids": whole, "attention_mask": torch.ones_like(whole), "pixel_values": noise(3, 16, 16),
        "labels": labels,
    }  # fmt: skip


def page() -> dict[str, Tensor]:
    boxes = torch.randint(9, (SAMPLES, 8, 4), generator=GENERATOR).sort(-1).values
    ends = torch.ones(SAMPLES, dtype=torch.int64)
    return padded(ids(8)) | {"bbox": boxes, "start_positions": ends, "end_positions": ends + 2}


CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {
    "multiple-choice": (
        "BertForMultipleChoice", "BertConfig", _TEXT, {"input_ids": ids(3, 8), "labels": classes(3)},
    ),
    "next-sentence-prediction": (
        "BertForNextSentencePrediction", "BertConfig", _TEXT, padded(ids(8)) | {"labels": classes(2)},
    ),
    "visual-question-answering": (
        "ViltForQuestionAnswering", "ViltConfig", _TEXT | _VISION | {"num_labels": 5},
        {"input_ids": ids(8), "pixel_values": noise(3, 16, 16)},
    ),
    "document-question-answering": (
        "LayoutLMForQuestionAnswering", "LayoutLMConfig", _TEXT | {"max_2d_position_embeddings": 64}, page(),
    ),
    "video-classification": (
        "VideoMAEForVideoClassification", "VideoMAEConfig",
        _VISION | {"num_frames": 4, "tubelet_size": 2, "num_labels": 3},
        {"pixel_values": noise(4, 3, 16, 16), "labels": classes(3)},
    ),
    "masked-image-modeling": (
        "ViTForMaskedImageModeling", "ViTConfig", _VISION | {"encoder_stride": 4},
        {"pixel_values": noise(3, 16, 16)},
    ),
    "audio-frame-classification": (
        "Wav2Vec2ForAudioFrameClassification", "Wav2Vec2Config", _SOUND, {"input_values": noise(160)},
    ),
    "image-text-to-text": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"vision_config": CLIPVisionConfig(**_VISION, projection_dim=16),
         "text_config": LlamaConfig(**_TEXT), "image_token_index": IMAGE, "image_token_id": IMAGE,
         "vision_feature_layer": -1},
        with_picture(),
    ),
}  # fmt: skip

_DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5,
    "num_labels": 3,
}  # fmt: skip
_SPEECH = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "num_mel_bins": 8, "speech_decoder_prenet_units": 16, "speaker_embedding_dim": 8,
    "speech_decoder_postnet_units": 16, "speech_decoder_postnet_layers": 2, "reduction_factor": 2,
    "speech_decoder_prenet_dropout": 0.0,
}  # fmt: skip
_LAYERS = {key: _VISION[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size")}


def _cells() -> Tensor:
    """A question of four tokens and two rows of two cells, of two tokens each."""
    kinds = torch.zeros(SAMPLES, 12, 7, dtype=torch.int64)
    kinds[:, 4:, 0] = 1
    kinds[:, 4:, 1] = torch.tensor([1, 1, 2, 2, 1, 1, 2, 2])
    kinds[:, 4:, 2] = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2])
    return kinds


def _sam() -> dict[str, Any]:
    vision = SamVisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4, image_size=16,
        patch_size=4, mlp_dim=48, window_size=2, global_attn_indexes=[1], num_pos_feats=8,
        initializer_range=0.2,
    )  # fmt: skip
    prompt = SamPromptEncoderConfig(hidden_size=16, image_size=16, patch_size=4, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_hidden_layers=2, num_attention_heads=4, iou_head_hidden_dim=16
    )
    return {
        "vision_config": vision.to_dict(),
        "prompt_encoder_config": prompt.to_dict(),
        "mask_decoder_config": decoder.to_dict(),
    }


# Their loss is the distance of several outputs; the first named is compared in the tests.
CASES |= {
    "semantic-segmentation": (
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
         "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
         "decoder_hidden_size": 16, "num_labels": 4},
        {"pixel_values": noise(3, 16, 16)},
    ),
    "universal-segmentation": (
        "DetrForSegmentation", "DetrConfig",
        _DETR | {"backbone_config": ResNetConfig(
            embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )},
        {"pixel_values": noise(3, 64, 64)},
    ),
    "object-detection": (
        "YolosForObjectDetection", "YolosConfig",
        _VISION | {"image_size": [16, 16], "num_detection_tokens": 5, "num_labels": 3},
        {"pixel_values": noise(3, 16, 16)},
    ),
    "zero-shot-object-detection": (
        "OwlViTForObjectDetection", "OwlViTConfig",
        {"text_config": {**_TEXT, "max_position_embeddings": 16}, "vision_config": _VISION,
         "projection_dim": 32},
        padded(ids(6)) | {"pixel_values": noise(3, 16, 16)},
    ),
    "depth-estimation": (
        "DPTForDepthEstimation", "DPTConfig",
        _VISION | {"num_hidden_layers": 4, "is_hybrid": False, "backbone_out_indices": [0, 1, 2, 3],
                   "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "readout_type": "ignore"},
        {"pixel_values": noise(3, 16, 16)},
    ),
    "pose-estimation": (
        "VitPoseForPoseEstimation", "VitPoseConfig",
        {"backbone_config": VitPoseBackboneConfig(
            **_LAYERS, num_hidden_layers=2, image_size=[32, 32], patch_size=[8, 8], num_labels=5,
            out_features=["stage2"]), "num_labels": 5},
        {"pixel_values": noise(3, 32, 32)},
    ),
    "image-matting": (
        "VitMatteForImageMatting", "VitMatteConfig",
        {"backbone_config": VitDetConfig(
            **_LAYERS, num_hidden_layers=2, image_size=32, patch_size=16, num_channels=4,
            out_features=["stage2"]),
         "initializer_range": 0.2, "hidden_size": 32, "fusion_hidden_sizes": [16, 8, 4, 4],
         "convstream_hidden_sizes": [4, 8, 16]},
        {"pixel_values": noise(4, 32, 32)},
    ),
    "image-to-image": (
        "Swin2SRForImageSuperResolution", "Swin2SRConfig",
        {"image_size": 16, "patch_size": 1, "embed_dim": 16, "depths": [2], "num_heads": [2],
         "window_size": 4, "upscale": 2, "mlp_ratio": 2.0},
        {"pixel_values": noise(3, 16, 16)},
    ),
    "mask-generation": (
        "SamModel", "SamConfig", _sam(),
        {"pixel_values": noise(3, 16, 16), "input_points": noise(1, 2, 2).abs()},
    ),
    "audio-xvector": (
        "Wav2Vec2ForXVector", "Wav2Vec2Config",
        _SOUND | {"tdnn_dim": (16, 16, 24), "tdnn_kernel": (3, 2, 1), "tdnn_dilation": (1, 1, 1),
                  "xvector_output_dim": 16},
        {"input_values": noise(320)},
    ),
    "time-series-prediction": (
        "TimesFmModelForPrediction", "TimesFmConfig",
        _LAYERS | {"num_hidden_layers": 2, "patch_length": 8, "context_length": 32, "horizon_length": 8,
                   "head_dim": 8, "quantiles": [0.1, 0.5]},
        {"past_values": noise(32)},
    ),
    "text-to-spectrogram": (
        "SpeechT5ForTextToSpeech", "SpeechT5Config", _SPEECH,
        {"input_ids": ids(6), "decoder_input_values": noise(8, 8), "speaker_embeddings": noise(8)},
    ),
    "pre-training": ("BertForPreTraining", "BertConfig", _TEXT, padded(ids(8))),
    "table-question-answering": (
        "TapasForQuestionAnswering", "TapasConfig",
        _TEXT | {"type_vocab_sizes": [3, 8, 8, 2, 8, 8, 2], "max_num_rows": 8, "max_num_columns": 8},
        padded(ids(12)) | {"token_type_ids": _cells()},
    ),
}  # fmt: skip
