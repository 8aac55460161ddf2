"""The tasks that models are loaded for: which Auto class, what goes in, what the model card says."""

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from transformers.models.auto import modeling_auto

from .errors import ConfigError, ModelError
from .several import Parts

AUTO = "auto"
CAUSAL = "causal-lm"
Input = Literal[
    "windows", "masked", "continued", "texts", "images", "sound", "pairs", "either", "data", "transduced"
]
_BACKBONE = "AutoBackbone"
_MAPPING = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModelForZeroShotImageClassification": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "AutoModelForNextSentencePrediction": "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
    "AutoModelForVisualQuestionAnswering": "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForDocumentQuestionAnswering": "MODEL_FOR_DOCUMENT_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForVideoClassification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForMaskedImageModeling": "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES",
    "AutoModelForAudioFrameClassification": "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForUniversalSegmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForInstanceSegmentation": "MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForImageSegmentation": "MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForObjectDetection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "AutoModelForZeroShotObjectDetection": "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES",
    "AutoModelForDepthEstimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "AutoModelForPoseEstimation": "MODEL_FOR_POSE_ESTIMATION_MAPPING_NAMES",
    "AutoModelForImageMatting": "MODEL_FOR_IMAGE_MATTING_MAPPING_NAMES",
    "AutoModelForImageToImage": "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES",
    "AutoModelForMaskGeneration": "MODEL_FOR_MASK_GENERATION_MAPPING_NAMES",
    "AutoModelForAudioXVector": "MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES",
    "AutoModelForTimeSeriesPrediction": "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES",
    "AutoModelForTextToSpectrogram": "MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES",
    "AutoModelForTableQuestionAnswering": "MODEL_FOR_TABLE_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForTextEncoding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "AutoModelForPreTraining": "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "AutoModelForKeypointDetection": "MODEL_FOR_KEYPOINT_DETECTION_MAPPING_NAMES",
    "AutoModelForKeypointMatching": "MODEL_FOR_KEYPOINT_MATCHING_MAPPING_NAMES",
    "AutoModelForNormalEstimation": "MODEL_FOR_NORMAL_ESTIMATION_MAPPING_NAMES",
    "AutoModelForPointmapEstimation": "MODEL_FOR_POINTMAP_ESTIMATION_MAPPING_NAMES",
    "AutoModelForTextRecognition": "MODEL_FOR_TEXT_RECOGNITION_MAPPING_NAMES",
    "AutoModelForTableRecognition": "MODEL_FOR_TABLE_RECOGNITION_MAPPING_NAMES",
    "AutoModelForRNNT": "MODEL_FOR_RNNT_MAPPING_NAMES",
    "AutoModelForTDT": "MODEL_FOR_TDT_MAPPING_NAMES",
    "AutoModelForAudioTokenization": "MODEL_FOR_AUDIO_TOKENIZATION_NAMES",
    "AutoModelForTextToWaveform": "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "AutoModelForDecision": "MODEL_FOR_DECISION_MAPPING_NAMES",
    _BACKBONE: "MODEL_FOR_BACKBONE_MAPPING_NAMES",
}


class _Backbones:
    """Loads backbones from folders, by the class that AutoBackbone has: itself it looks on the hub only."""

    @staticmethod
    def from_config(config: Any, **options: Any) -> Any:
        return transformers.AutoBackbone.from_config(config, **options)

    @staticmethod
    def from_pretrained(where: str, **options: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(where)
        name = TASKS["backbone"].classes()[config.model_type][0]
        return getattr(transformers, name).from_pretrained(where, **options)


@dataclass(frozen=True, slots=True)
class Task:
    """What a model is for.

    Args:
        name: on the command line.
        auto: the class of transformers that loads it.
        input: how its inputs are made of text or data (eckart.reading).
        tag: what the hub calls it.
        loss: what is measured, in words.
        parts: the outputs whose distance from the dense model's is the loss; None: the model's own loss,
            or what it says (eckart.objectives).
        at_once: how many samples of data are run at once.
    """

    name: str
    auto: str
    input: Input
    tag: str
    loss: str
    parts: Parts | None = None
    at_once: int = 8

    @property
    def reads_text(self) -> bool:
        """Whether text alone is what it is run on."""
        return self.input in ("windows", "masked", "continued", "texts")

    @property
    def needs_data(self) -> bool:
        """Whether it cannot be run on text."""
        return self.input in ("images", "sound", "pairs", "data", "transduced")

    @property
    def loader(self) -> Any:
        """The Auto class.

        Raises:
            ModelError: this version of transformers does not have it.
        """
        if not hasattr(transformers, self.auto):
            raise ModelError(
                f"task {self.name} needs {self.auto}, which transformers {transformers.__version__} does not "
                "have: install a newer one"
            )
        return _Backbones if self.auto == _BACKBONE else getattr(transformers, self.auto)

    def classes(self) -> dict[str, tuple[str, ...]]:
        """Return the classes of models that it has, by the model type of their config; none in a version of
        transformers that does not have the Auto class."""
        names: dict[str, Any] = getattr(modeling_auto, _MAPPING[self.auto], {})
        return {kind: (found,) if isinstance(found, str) else tuple(found) for kind, found in names.items()}


_DISTANCE = "without labels, the distance from the dense model's outputs"
_OUTPUTS = "the distance from the dense model's outputs; labels in the data are not read"
_LABELS = f"of the labels in the data; {_DISTANCE}"
_LOGITS, _QUERIES = (("logits", -1),), (("class_queries_logits", -1), ("logits", -1))
_MASKS = ("masks_queries_logits", "pred_masks", "pred_boxes")
# In the order in which an architecture that serves several is looked for.
_KNOWN = (
    Task(CAUSAL, "AutoModelForCausalLM", "windows", "text-generation", "of the next token"),
    Task("seq2seq-lm", "AutoModelForSeq2SeqLM", "continued", "text2text-generation",
         "of the second half of a window, the first half being read by the encoder"),
    Task("speech-seq2seq", "AutoModelForSpeechSeq2Seq", "sound", "automatic-speech-recognition", _LABELS),
    Task("masked-lm", "AutoModelForMaskedLM", "masked", "fill-mask",
         "of 15 % of the tokens: 80 % of them masked, 10 % exchanged, 10 % as they were"),
    Task("sequence-classification", "AutoModelForSequenceClassification", "texts", "text-classification",
         _LABELS),
    Task("token-classification", "AutoModelForTokenClassification", "texts", "token-classification", _LABELS),
    Task("question-answering", "AutoModelForQuestionAnswering", "texts", "question-answering", _LABELS),
    Task("image-classification", "AutoModelForImageClassification", "images", "image-classification",
         _LABELS),
    Task("audio-classification", "AutoModelForAudioClassification", "sound", "audio-classification", _LABELS),
    Task("ctc", "AutoModelForCTC", "sound", "automatic-speech-recognition", _LABELS),
    Task("zero-shot-image-classification", "AutoModelForZeroShotImageClassification", "pairs",
         "zero-shot-image-classification",
         "of finding the text of each picture in its batch, and the picture of each text"),
    Task("image-text-to-text", "AutoModelForImageTextToText", "data", "image-text-to-text", _LABELS),
    Task("multiple-choice", "AutoModelForMultipleChoice", "data", "multiple-choice", _LABELS),
    Task("next-sentence-prediction", "AutoModelForNextSentencePrediction", "data", "text-classification",
         _LABELS),
    Task("visual-question-answering", "AutoModelForVisualQuestionAnswering", "data",
         "visual-question-answering", _LABELS),
    Task("document-question-answering", "AutoModelForDocumentQuestionAnswering", "data",
         "document-question-answering", _LABELS),
    Task("video-classification", "AutoModelForVideoClassification", "data", "video-classification", _LABELS),
    Task("masked-image-modeling", "AutoModelForMaskedImageModeling", "data", "image-feature-extraction",
         _DISTANCE),
    Task("audio-frame-classification", "AutoModelForAudioFrameClassification", "data", "audio-classification",
         _LABELS),
    Task("multimodal-lm", "AutoModelForMultimodalLM", "data", "any-to-any", _LABELS),
    # Labels of these are not what a loss is a mean of (matched boxes, resized masks): outputs are compared.
    Task("semantic-segmentation", "AutoModelForSemanticSegmentation", "data", "image-segmentation", _OUTPUTS,
         Parts((("logits", 1),))),
    Task("universal-segmentation", "AutoModelForUniversalSegmentation", "data", "image-segmentation",
         _OUTPUTS, Parts(_QUERIES, _MASKS)),
    Task("instance-segmentation", "AutoModelForInstanceSegmentation", "data", "image-segmentation", _OUTPUTS,
         Parts(_QUERIES, _MASKS)),
    Task("image-segmentation", "AutoModelForImageSegmentation", "data", "image-segmentation", _OUTPUTS,
         Parts(_QUERIES, _MASKS)),
    Task("object-detection", "AutoModelForObjectDetection", "data", "object-detection", _OUTPUTS,
         Parts(_LOGITS, ("pred_boxes",))),
    Task("zero-shot-object-detection", "AutoModelForZeroShotObjectDetection", "data",
         "zero-shot-object-detection", _OUTPUTS, Parts((), ("logits", "pred_boxes"))),
    Task("depth-estimation", "AutoModelForDepthEstimation", "data", "depth-estimation", _OUTPUTS,
         Parts((), ("predicted_depth",))),
    Task("pose-estimation", "AutoModelForPoseEstimation", "data", "keypoint-detection", _OUTPUTS,
         Parts((), ("heatmaps",))),
    Task("image-matting", "AutoModelForImageMatting", "data", "image-segmentation", _OUTPUTS,
         Parts((), ("alphas",))),
    Task("image-to-image", "AutoModelForImageToImage", "data", "image-to-image", _OUTPUTS,
         Parts((), ("reconstruction",))),
    Task("mask-generation", "AutoModelForMaskGeneration", "data", "mask-generation", _OUTPUTS,
         Parts((), ("pred_masks", "iou_scores"))),
    Task("audio-xvector", "AutoModelForAudioXVector", "data", "audio-classification", _OUTPUTS,
         Parts(_LOGITS, ("embeddings",))),
    Task("time-series-prediction", "AutoModelForTimeSeriesPrediction", "data", "time-series-forecasting",
         _OUTPUTS, Parts((), ("mean_predictions", "full_predictions"))),
    Task("text-to-spectrogram", "AutoModelForTextToSpectrogram", "data", "text-to-speech", _OUTPUTS,
         Parts((), ("spectrogram",))),
    Task("table-question-answering", "AutoModelForTableQuestionAnswering", "data", "table-question-answering",
         _DISTANCE),
    Task("keypoint-detection", "AutoModelForKeypointDetection", "data", "keypoint-detection", _OUTPUTS,
         Parts((), ("scores", "descriptors"), ragged=True)),
    Task("keypoint-matching", "AutoModelForKeypointMatching", "data", "keypoint-matching", _OUTPUTS,
         Parts((), ("matching_scores",), ragged=True)),
    Task("normal-estimation", "AutoModelForNormalEstimation", "data", "image-to-image", _OUTPUTS,
         Parts((), ("normals",))),
    Task("pointmap-estimation", "AutoModelForPointmapEstimation", "data", "image-to-3d", _OUTPUTS,
         Parts((), ("pointmaps", "scales"))),
    # These give what is left of scores after a softmax, under the name of states.
    Task("text-recognition", "AutoModelForTextRecognition", "data", "image-to-text", _OUTPUTS,
         Parts(chances=(("last_hidden_state", -1),))),
    Task("table-recognition", "AutoModelForTableRecognition", "data", "image-to-text",
         f"{_OUTPUTS}; as many steps as both take", Parts(chances=(("last_hidden_state", -1),), ragged=True)),
    Task("rnnt", "AutoModelForRNNT", "transduced", "automatic-speech-recognition", _LABELS,
         Parts(_LOGITS, cut="vocab_size")),
    Task("tdt", "AutoModelForTDT", "transduced", "automatic-speech-recognition", _LABELS,
         Parts(_LOGITS, cut="vocab_size")),
    Task("audio-tokenization", "AutoModelForAudioTokenization", "data", "audio-to-audio", _OUTPUTS,
         Parts((), ("audio_values", "audio"))),
    Task("text-to-waveform", "AutoModelForTextToWaveform", "data", "text-to-speech",
         f"{_OUTPUTS}; as far as both sound, and of a model that draws them the states of its text",
         Parts(_LOGITS, ("spectrogram", "waveform"), ragged=True, drawn="hidden_states")),
    Task("decision", "AutoModelForDecision", "data", "text-classification", _OUTPUTS,
         Parts(options="num_options"), at_once=1),
    Task("backbone", _BACKBONE, "data", "image-feature-extraction", _OUTPUTS,
         Parts((), ("feature_maps",))),
    Task("feature-extraction", "AutoModel", "either", "feature-extraction", _DISTANCE),
    Task("text-encoding", "AutoModelForTextEncoding", "texts", "feature-extraction", _DISTANCE),
    Task("pre-training", "AutoModelForPreTraining", "data", "feature-extraction", _OUTPUTS,
         Parts((("prediction_logits", -1), ("seq_relationship_logits", -1), ("logits", -1)))),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _KNOWN}


def get(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"task {name!r}: legal are {AUTO}, {', '.join(TASKS)}{hint}")
    return TASKS[name]


def of_config(config: Any, source: str) -> Task:
    """Return the task that the model of `config` was stored for: the one that has its class.

    A config that names no class that is known is taken for the first task that its type has, an
    encoder-decoder never for a causal language model.

    Raises:
        ModelError: no task has its class, or its type.
    """
    names = tuple(getattr(config, "architectures", None) or ())
    kind = getattr(config, "model_type", "")
    for task in TASKS.values():
        known = {name for found in task.classes().values() for name in found}
        if known & set(names) or task.auto in (getattr(config, "auto_map", None) or {}):
            return task
    two = getattr(config, "is_encoder_decoder", False)
    for task in TASKS.values():
        if kind in task.classes() and not (two and task.name == CAUSAL):
            return task
    raise ModelError(
        f"{source} holds a {' or '.join(names) or kind or 'model'}, which none of the tasks "
        f"{', '.join(TASKS)} has: in Python, eckart.compress(model, batches=...) takes any model"
    )


def of_model(model: Any) -> Task:
    """Return the task that the class of `model` is for, that of causal language models where none has it."""
    names = {kind.__name__ for kind in type(model).__mro__}
    for task in TASKS.values():
        if names & {name for found in task.classes().values() for name in found}:
            return task
    return TASKS[CAUSAL]


def check(task: Task, config: Any, source: str) -> None:
    """Raise ModelError unless `task` has a class for `config`."""
    kind = getattr(config, "model_type", "")
    if kind not in task.classes() and task.auto not in (getattr(config, "auto_map", None) or {}):
        raise ModelError(
            f"{source} is of type {kind!r}, which transformers has no {task.auto} for: choose another --task"
        )
