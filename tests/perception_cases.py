"""Tiny random models that perceive or speak: keypoints, surfaces, print, tables, speech, sound, choices."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    DetrConfig,
    FastSpeech2ConformerConfig,
    FastSpeech2ConformerHifiGanConfig,
    ParakeetEncoderConfig,
    PPLCNetV3Config,
    Qwen2Config,
    ResNetConfig,
    SuperPointConfig,
    SwinConfig,
    Wav2Vec2BertConfig,
)

from .others import _TEXT, _VISION, VOCABULARY
from .task_cases import _DETR, SAMPLES, ids, noise, padded, with_picture

_POINTS = SuperPointConfig(
    encoder_hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=16, descriptor_decoder_dim=32, max_keypoints=12,
    keypoint_threshold=0.0, initializer_range=0.3,
)  # fmt: skip
_EYE = ResNetConfig(
    embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4,
    out_features=["stage1", "stage2", "stage3", "stage4"],
)  # fmt: skip
_SURFACE = _VISION | {
    "image_size": [16, 16], "num_key_value_attention_heads": 2, "num_labels": 3, "initializer_range": 0.2,
    "head_config": {"upsample_out_channels": [8], "conv_out_channels": [8]},
}  # fmt: skip
_BLOCKS = [
    [[3, 8, 8, 1, False]], [[3, 8, 8, 2, False]], [[3, 8, 8, 2, False]], [[3, 8, 8, 2, False]],
    [[3, 8, 32, 2, False]],
]  # fmt: skip
_EAR = ParakeetEncoderConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, num_mel_bins=16,
    subsampling_conv_channels=8, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
_TRANSDUCER = {
    "vocab_size": VOCABULARY, "decoder_hidden_size": 24, "num_decoder_layers": 1, "encoder_config": _EAR,
    "blank_token_id": VOCABULARY - 1,
}  # fmt: skip
_VOCODER = {"upsample_initial_channel": 8, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]}
_RESIDUAL = {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 2]]}


def said() -> dict[str, Tensor]:
    """Sound of two lengths, and what is said in it, of two lengths."""
    mask = torch.ones(SAMPLES, 64, dtype=torch.int64)
    mask[1::2, 48:] = 0
    labels = ids(4)
    labels[1::2, 2:] = -100
    return {"input_features": noise(64, 16), "attention_mask": mask, "labels": labels}


def heard() -> dict[str, Tensor]:
    return {"input_features": noise(64, 16), "decoder_input_ids": ids(4)}


def questions() -> dict[str, Tensor]:
    """Two questions a sample, of two and of three options."""
    marks, counts = torch.tensor([[5, 11]]), torch.tensor([[2, 3]])
    kinds = torch.tensor([[0, 2]])
    both = {"marks": marks, "num_options": counts, "question_type_ids": kinds}
    return {"input_ids": ids(12)} | {name: value.repeat(SAMPLES, 1) for name, value in both.items()}


def few(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Four of the samples: they are run one at a time."""
    return {name: tensor[:4].clone() for name, tensor in data.items()}


# name: task, class, its config, the arguments, the output that is compared
CASES: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Tensor], str]] = {
    "instances": (
        "instance-segmentation", "MaskFormerForInstanceSegmentation", "MaskFormerConfig",
        {"backbone_config": SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2],
            window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"]),
         "decoder_config": DetrConfig(**{
            **_DETR, "backbone_config": _EYE, "d_model": 32, "decoder_layers": 1,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4}),
         "fpn_feature_size": 32, "mask_feature_size": 32, "num_labels": 3},
        {"pixel_values": noise(3, 32, 32)}, "class_queries_logits",
    ),
    "segments": (
        "image-segmentation", "DetrForSegmentation", "DetrConfig",
        _DETR | {"backbone_config": _EYE},
        {"pixel_values": noise(3, 64, 64)}, "logits",
    ),
    "multimodal": (
        "multimodal-lm", "LlavaForConditionalGeneration", "LlavaConfig", {}, with_picture(), "logits",
    ),
    "text": (
        "text-encoding", "T5EncoderModel", "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        padded(ids(8)), "last_hidden_state",
    ),
    "superglue": (
        "keypoint-matching", "SuperGlueForKeypointMatching", "SuperGlueConfig",
        {"keypoint_detector_config": _POINTS, "hidden_size": 32, "keypoint_encoder_sizes": [16, 32],
         "gnn_layers_types": ["self", "cross"], "initializer_range": 0.2, "sinkhorn_iterations": 5},
        {"pixel_values": noise(2, 3, 32, 32)}, "matching_scores",
    ),
    "lightglue": (
        "keypoint-matching", "LightGlueForKeypointMatching", "LightGlueConfig",
        {"keypoint_detector_config": _POINTS, "descriptor_dim": 32, "num_hidden_layers": 2,
         "initializer_range": 0.2},
        {"pixel_values": noise(2, 3, 32, 32)}, "matching_scores",
    ),
    "normals": (
        "normal-estimation", "Sapiens2ForNormalEstimation", "Sapiens2Config", _SURFACE,
        {"pixel_values": noise(3, 16, 16)}, "normals",
    ),
    "points": (
        "pointmap-estimation", "Sapiens2ForPointmapEstimation", "Sapiens2Config",
        _SURFACE | {"head_config": {
            "upsample_out_channels": [8], "conv_out_channels": [8], "scale_conv_out_channels": [4],
            "scale_final_hidden_sizes": [16, 8]}},
        {"pixel_values": noise(3, 16, 16)}, "pointmaps",
    ),
    "print": (
        "text-recognition", "PPOCRV5MobileRecForTextRecognition", "PPOCRV5MobileRecConfig",
        {"backbone_config": PPLCNetV3Config(
            block_configs=_BLOCKS, stem_channels=8, divisor=8, conv_symmetric_num=1,
            out_features=["stage2", "stage3", "stage4", "stage5"]),
         "hidden_size": 32, "num_attention_heads": 4, "head_out_channels": 11, "depth": 1,
         "initializer_range": 0.5},
        {"pixel_values": noise(3, 96, 192)}, "last_hidden_state",
    ),
    "tables": (
        "table-recognition", "SLANeXtForTableRecognition", "SLANeXtConfig",
        {"vision_config": {
            "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 4, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 48,
            "use_rel_pos": False,
            "initializer_range": 0.2},
         "post_conv_in_channels": 16, "post_conv_out_channels": 16, "out_channels": 7, "hidden_size": 16,
         "max_text_length": 6},
        {"pixel_values": noise(3, 32, 32)}, "last_hidden_state",
    ),
    "rnnt": ("rnnt", "ParakeetForRNNT", "ParakeetRNNTConfig", _TRANSDUCER, few(heard()), "logits"),
    "tdt": (
        "tdt", "ParakeetForTDT", "ParakeetTDTConfig", _TRANSDUCER | {"durations": [0, 1, 2]}, few(said()),
        "logits",
    ),
    "codec": (
        "audio-tokenization", "Xcodec2Model", "Xcodec2Config",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 4, "head_dim": 8, "encoder_hidden_size": 4, "downsampling_ratios": [2, 4],
         "quantization_dim": 64, "quantization_levels": [4, 4, 4], "initializer_range": 0.1,
         "semantic_model_config": Wav2Vec2BertConfig(
             hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
             feature_projection_input_dim=16, conv_depthwise_kernel_size=3, vocab_size=None)},
        {"input_values": noise(1, 64), "input_features": noise(8, 16)}, "audio_values",
    ),
    "speaking": (
        "text-to-waveform", "FastSpeech2ConformerWithHifiGan", "FastSpeech2ConformerWithHifiGanConfig",
        {"model_config": FastSpeech2ConformerConfig(
            hidden_size=32, vocab_size=VOCABULARY, num_mel_bins=8, encoder_layers=1, decoder_layers=1,
            encoder_linear_units=48, decoder_linear_units=48, speech_decoder_postnet_layers=1,
            speech_decoder_postnet_units=8, duration_predictor_channels=8, energy_predictor_channels=8,
            pitch_predictor_channels=8, pitch_predictor_layers=1, decoder_kernel_size=3).to_dict(),
         "vocoder_config": FastSpeech2ConformerHifiGanConfig(
             model_in_dim=8, **_VOCODER, **_RESIDUAL).to_dict()},
        {"input_ids": ids(8)}, "spectrogram",
    ),
    "drawing": (
        "text-to-waveform", "VitsModel", "VitsConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "ffn_dim": 48, "flow_size": 32, "spectrogram_bins": 16, **_VOCODER, **_RESIDUAL,
         "duration_predictor_filter_channels": 8, "duration_predictor_num_flows": 2,
         "prior_encoder_num_flows": 1, "prior_encoder_num_wavenet_layers": 1,
         "posterior_encoder_num_wavenet_layers": 1, "depth_separable_num_layers": 1},
        padded(ids(8)), "hidden_states",
    ),
    "choices": (
        "decision", "JevForDecision", "JevConfig",
        {"text_config": Qwen2Config(**_TEXT, num_key_value_heads=4).to_dict(), "hidden_size": 32},
        few(questions()), "scores",
    ),
    "features": (
        "backbone", "Dinov2Backbone", "Dinov2Config",
        _VISION | {"mlp_ratio": 2, "out_features": ["stage1", "stage2"]}, {"pixel_values": noise(3, 16, 16)},
        "feature_maps",
    ),
}  # fmt: skip
