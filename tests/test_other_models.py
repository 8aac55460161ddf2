"""Encoders, encoder-decoders, vision, sound, pairs: compressed, saved, loaded, equal to those in memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import eckart
from eckart import ConfigError, ModelError, batches, hub, models, objectives, tasks
from eckart.factors import FORMS, Form, LowRank, build
from eckart.linalg import truncated_svd
from eckart.losses import MeasuredLoss

from . import others

NAMES = list(others.MODELS)
TASK_OF = {
    "bert": "masked-lm", "bert-encoder": "feature-extraction", "bert-classes": "sequence-classification",
    "bert-tags": "token-classification", "bert-answers": "question-answering", "roberta": "masked-lm",
    "distilbert": "masked-lm", "modernbert": "masked-lm", "t5": "seq2seq-lm", "bart": "seq2seq-lm",
    "whisper": "speech-seq2seq", "vit": "image-classification", "clip": "zero-shot-image-classification",
}  # fmt: skip


@torch.no_grad()
def outputs(model: Any, batch: Any) -> Tensor:
    """Return everything that `model` says about the real positions of `batch`, in one row."""
    sides = batches.sides_of(model)
    batch = batches.cast(batch, model.dtype)
    rows = objectives.real_rows(batches.call(model, batch), batch, sides)
    return torch.cat([row.double().flatten() for row in rows])


def aligned(model: Any) -> Any:
    """Return `model` with weights of its own: where a file puts them, kernels may round otherwise."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def compress(name: str, **options: Any) -> tuple[Any, Any]:
    defaults: dict[str, Any] = {"keep": 0.6, "of": "linears", "batches": others.batches(name)}
    return eckart.compress(others.build(name), **defaults | options)


@pytest.mark.parametrize("name", NAMES)
def test_compresses_saves_and_loads_bit_equal(name: str, tmp_path: Path) -> None:
    model, result = compress(name)
    assert result.keep_linears <= 0.6
    assert result.task == TASK_OF[name]
    batch = others.batch(name, 9)
    before = outputs(model, batch)
    eckart.save(model, None, tmp_path / "out", result)
    assert hub.weight_bytes(tmp_path / "out") == result.after.bytes
    auto = getattr(transformers, tasks.get(TASK_OF[name]).auto)
    loaded = aligned(auto.from_pretrained(tmp_path / "out", dtype="auto"))
    assert torch.equal(outputs(loaded, batch), before)
    assert type(loaded) is type(others.build(name))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"model = {auto.__name__}.from_pretrained" in card
    assert f"pipeline_tag: {tasks.get(TASK_OF[name]).tag}" in card
    stock = eckart.densify(loaded)
    assert torch.allclose(outputs(stock, batch), before, atol=2e-4 * float(before.abs().max()))
    stock.save_pretrained(tmp_path / "stock")
    again = aligned(auto.from_pretrained(tmp_path / "stock"))
    assert torch.equal(outputs(again, batch), outputs(stock, batch))


@pytest.mark.parametrize("name", ["bert", "bert-encoder", "t5", "whisper", "vit", "clip"])
def test_eckart_load_finds_the_class_that_it_was_stored_for(name: str, tmp_path: Path) -> None:
    model, result = compress(name, method="svd")
    others_tokenizer(tmp_path / "tokens", name)
    eckart.save(model, others_tokenizer(tmp_path / "tokens", name), tmp_path / "out", result)
    loaded = aligned(eckart.load(tmp_path / "out"))
    batch = others.batch(name, 9)
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))
    assert type(loaded) is type(model)


def others_tokenizer(folder: Path, name: str) -> Any:
    """Return a tokenizer with the special tokens of `others`, by words w3 to w63."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as token_models

    words = {"<s>": 0, "<pad>": 1, "</s>": 2} | {f"w{place}": place for place in range(3, 62)}
    words |= {"<mask>": 62, "<unk>": 63}
    inner = Tokenizer(token_models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>",
        unk_token="<unk>", cls_token="<s>", sep_token="</s>",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "t5", "whisper", "vit", "clip", "bart", "modernbert"])
def test_the_default_targets_are_all_linears_of_all_stacks(name: str) -> None:
    model = others.build(name)
    found = [target.name for target in models.targets(model)]
    stacks = models.all_blocks(model)
    inside = [key for key in models.linear_names(model) if models.owner(key, stacks)]
    assert found == inside
    tops = {block.rsplit(".", 1)[0] for block in stacks}
    assert len(tops) == (2 if name in ("t5", "whisper", "clip", "bart") else 1)
    assert len(stacks) == 2 * len(tops)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_full_rank_equals_the_original_to_rounding(name: str, form: Form) -> None:
    model, cut = (others.build(name, torch.float64) for _ in range(2))
    batch = others.batch(name, 9)
    before = outputs(model, batch)
    for target in models.targets(model):
        linear = models.find(model, target.name)
        svd = truncated_svd(linear.weight.detach(), min(target.shape))
        low_rank = LowRank(svd.left * svd.values, svd.right)
        models.replace(model, target.name, build(low_rank, form, linear.bias))
        less = LowRank(low_rank.left[:, :-1], low_rank.right[:-1])
        models.replace(cut, target.name, build(less, form, linear.bias))
    tolerance = 1e-9 * float(before.abs().max())
    assert torch.allclose(outputs(model, batch), before, atol=tolerance)
    assert not torch.allclose(outputs(cut, batch), before, atol=tolerance)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_what_is_measured_is_the_models_loss_on_what_was_held_out(name: str) -> None:
    calls = others.batches(name, 5)
    dense = others.build(name)
    model, result = compress(name, batches=calls, dtype="float32")
    ready = batches.without_padded_labels(calls[-1], batches.sides_of(dense))
    assert isinstance(ready, dict)
    with torch.no_grad():
        assert result.dense.loss == pytest.approx(float(dense(**ready).loss), rel=1e-4)
        assert result.compressed.loss == pytest.approx(float(model(**ready).loss), rel=1e-4)
    assert (result.dense.unit, result.held_out, result.dense.batches) == ("label", True, 1)
    wanted, found = outputs(dense, calls[-1]), outputs(model, calls[-1])
    assert result.compressed.error == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-4)
    shown = str(result)
    assert "loss, nats per label" in shown
    assert "outputs, relative error" in shown
    assert "perplexity" not in shown


def test_the_prediction_is_in_the_unit_of_the_measurement() -> None:
    """A change that is small enough costs what the curvature says, within what leaves out terms."""
    calls = [{k: v for k, v in b.items() if k != "labels"} for b in others.batches("vit", 24)]
    _, result = compress("vit", batches=calls, eval_batches=calls, keep=0.97, method="io-svd", form="pivoted")
    increase = result.compressed.loss - result.dense.loss
    assert result.predicted_increase is not None
    assert 0 < increase < 4 * result.predicted_increase
    assert increase > result.predicted_increase / 4


def test_padding_changes_no_factor() -> None:
    """The compressed models of a padded batch, and of its samples one by one, are the same."""
    whole = others.batch("bert")
    for options in ({"method": "svd-llm"}, {"method": "io-svd"}, {"method": "eckart"}):
        found = []
        for calls in ([whole], others.singles(whole)):
            model, _ = compress("bert", batches=calls, eval_batches=calls, **options)
            found.append(outputs(model, others.batch("bert", 9)))
        assert torch.allclose(found[0], found[1], atol=1e-3 * float(found[0].abs().max()))
    unmasked, _ = compress("bert", batches=[whole], eval_batches=[whole], masks={}, method="svd-llm")
    masked, _ = compress("bert", batches=[whole], eval_batches=[whole], method="svd-llm")
    before, after = (outputs(model, others.batch("bert", 9)) for model in (masked, unmasked))
    assert not torch.allclose(before, after, atol=1e-2 * float(before.abs().max()))


class Mixer(nn.Module):
    """No model of transformers: images of sequences, two stacks, a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList([nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))] * 1)
        self.columns = nn.ModuleList([nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))])
        self.head = nn.Linear(16, 3)

    def forward(self, image: Tensor) -> Tensor:
        for block in self.rows:
            image = image + block(image)
        for block in self.columns:
            image = image + block(image.mT).mT
        found: Tensor = self.head(image.mean(1))
        return found


@pytest.mark.parametrize("own_loss", [False, True])
def test_any_module_is_compressed(own_loss: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixer()
    calls = [torch.randn(4, 16, 16) for _ in range(8)]
    loss = (lambda y, batch: y.square().sum(-1) / 2) if own_loss else None
    small, result = eckart.compress(model, batches=iter(calls), loss=loss, keep=0.7)
    assert isinstance(result.compressed, MeasuredLoss)
    assert small is model
    assert len(result.modules) == 4
    assert result.keep_model <= 0.7
    assert result.calibration_unit == "samples"
    assert result.compressed.unit == "sample"
    assert result.after.model == sum(parameter.numel() for parameter in small.parameters())
    meaning = "the one that was given" if own_loss else "half the squared distance of the outputs"
    assert meaning in str(result)
    with pytest.raises(ModelError, match="Mixer is no model of transformers"):
        eckart.save(small, None, tmp_path / "out", result)


def test_targets_may_be_for_the_loss_alone() -> None:
    """A pair of which the model gets the first; by name or by position, it is one loss."""
    torch.manual_seed(0)
    dense = Mixer()
    pairs = [(torch.randn(4, 16, 16), torch.randn(4, 3)) for _ in range(6)]
    named = [{"image": image, "wanted": wanted} for image, wanted in pairs]
    found = []
    for calls, inputs in ((pairs, [0]), (named, ["image"])):
        target: Any = "wanted" if inputs == ["image"] else 1

        def loss(outputs: Tensor, batch: Any, key: Any = target) -> Tensor:
            found: Tensor = (outputs - batch[key]).square().sum(-1) / 2
            return found

        model = copy.deepcopy(dense)
        _, result = eckart.compress(model, batches=calls, inputs=inputs, keep=0.7, loss=loss)
        assert isinstance(result.dense, MeasuredLoss)
        found.append((result.dense.loss, result.predicted_increase))
    assert found[0] == found[1]
    with torch.no_grad():
        expected = (dense.eval()(pairs[-1][0]) - pairs[-1][1]).square().sum(-1).mean() / 2
    assert found[0][0] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ConfigError, match="batch 0 has no 2, which inputs names: it has 0, 1"):
        eckart.compress(dense, batches=pairs, inputs=[0, 2], keep=0.7)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_other_models_in_few_bits(storage: str, tmp_path: Path) -> None:
    model, result = compress("bert", keep=0.8, storage=storage, embeddings="int8")
    assert {row.storage for row in result.modules} == {storage, "int8"}
    before = outputs(model, others.batch("bert", 9))
    eckart.save(model, None, tmp_path / "out", result)
    loaded = aligned(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", dtype="auto"))
    assert torch.equal(outputs(loaded, others.batch("bert", 9)), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stock": True, "keep": 0.9}, "stock: only for causal language models on text"),
        ({"depth": True}, "depth: only for causal language models on text"),
        ({"method": "aa-svd"}, "method aa-svd: only for causal language models on text"),
        ({"heal": eckart.Healing()}, "heal: only for causal language models"),
        ({"text": "a.txt"}, "got text and batches"),
        ({"batches": None, "masks": {0: 1}}, "go with batches"),
    ],
)
def test_what_is_for_language_models_only_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compress("bert", **options)
