"""Any model on batches: padding counts nowhere, whichever sequence a module reads; losses are sums."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import eckart
from eckart import ConfigError, ModelError, batches, kinds, losses, models, objectives, running
from eckart.calibrate import Calibrated, calibrate_batches
from eckart.losses import Batches
from eckart.stats import STATISTICS, Statistic

from . import others, tiny

PADDED = ("bert", "bert-classes", "bert-tags", "roberta", "distilbert", "modernbert", "t5", "bart")
ALL: tuple[Statistic, ...] = tuple(STATISTICS)


def feed(model: nn.Module, calls: list[Any], **options: Any) -> Batches:
    found = running.of_batches(model, calls, calls, **options).calibration
    assert isinstance(found, Batches)
    return found


def calibrated(model: Any, found: Batches, labels: Any = "text") -> Calibrated:
    names = [target.name for target in models.targets(model)]
    return calibrate_batches(
        model, found, names, ALL, labels=labels, generator=torch.Generator().manual_seed(0)
    )


def same(one: Calibrated, other: Calibrated, names: list[str]) -> bool:
    for name in names:
        for statistic in ALL:
            own, wanted = one.stats.moment(statistic, name), other.stats.moment(statistic, name)
            if own.count != wanted.count:
                return False
            error = float((own.mean() - wanted.mean()).norm())
            # Fisher's are fourth powers, which float32 knows less well.
            if error > 1e-3 * float(wanted.mean().norm()):
                return False
    return True


@pytest.mark.parametrize("name", PADDED)
def test_a_padded_batch_is_its_samples_one_by_one(name: str) -> None:
    """Statistics, counts and losses; without the masks all of it is something else."""
    model = others.build(name)
    whole = feed(model, [others.batch(name)])
    one_by_one = feed(model, others.singles(others.batch(name)))
    padded, unpadded = calibrated(model, whole), calibrated(model, one_by_one)
    names = [target.name for target in models.targets(model)]
    assert (padded.tokens, padded.terms) == (unpadded.tokens, unpadded.terms)
    assert same(padded, unpadded, names)
    losses_of = [losses.measured(model, found).loss for found in (whole, one_by_one)]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-4)
    wrong = calibrated(model, Batches(whole.calls, whole.objective, sides=()))
    assert wrong.stats.moment("gram", names[0]).count > padded.stats.moment("gram", names[0]).count
    assert not same(wrong, unpadded, names)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_belong_to_the_sequence_that_they_are_made_of(name: str) -> None:
    """Also where both sequences are equally long, and no shape tells them apart."""
    model, batch = others.build(name), others.batch(name)
    targets = [row[: len(row)] for row in others.ids(others.LENGTHS[::-1], seed=7)]
    for labels in (batch["labels"], others.padded(targets, others.IGNORED)):
        found = feed(model, [batch | {"labels": labels}])
        names = [target.name for target in models.targets(model)]
        moments = calibrated(model, found).stats
        encoder, decoder = int(batch["attention_mask"].sum()), int((labels != others.IGNORED).sum())
        for key in names:
            own = moments.moment("gradient", key).count
            crosses = "EncDecAttention.k" in key or "encoder_attn.k" in key
            assert own == (encoder if "encoder." in key or crosses or _is_value(key) else decoder), key


def _is_value(key: str) -> bool:
    return "EncDecAttention.v" in key or "encoder_attn.v" in key


def test_the_masks_may_be_swapped_and_then_it_is_wrong() -> None:
    """A module whose rows are given to the other sequence's mask has other statistics."""
    model, batch = others.build("t5"), others.batch("t5")
    targets = others.padded(others.ids(others.LENGTHS[::-1], seed=7), others.IGNORED)
    found = feed(model, [batch | {"labels": targets}])
    right = calibrated(model, found)
    swapped = tuple(
        batches.Side(side.contents, other.mask, other.labels)
        for side, other in zip(found.sides, found.sides[::-1], strict=True)
    )
    wrong = calibrated(model, Batches(found.calls, found.objective, swapped))
    names = [target.name for target in models.targets(model)]
    assert not same(right, wrong, names)


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_a_language_model_on_batches_is_what_it_is_on_windows(name: str) -> None:
    from eckart.calibrate import calibrate

    model = tiny.build(name)
    rows = torch.randint(2, 258, (3, 12), generator=torch.Generator().manual_seed(5))
    names = [target.name for target in models.targets(model)]
    windows = calibrate(model, rows, names, ALL, gradient_windows=3, generator=torch.Generator())
    found = feed(model, [{"input_ids": row[None], "labels": row[None]} for row in rows])
    assert isinstance(found.objective, objectives.Own)
    assert found.objective.shifted
    batched = calibrated(model, found)
    assert (batched.tokens, batched.terms) == (36, 33)
    assert same(batched, windows, names)


def test_experts_count_the_real_tokens_that_they_got() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=others.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = kinds.unfold(transformers.AutoModelForCausalLM.from_config(config).eval())
    text = others.batch("bert-encoder")
    whole = text | {"labels": text["input_ids"]}
    padded, unpadded = (calibrated(model, feed(model, calls)) for calls in ([whole], others.singles(whole)))
    names = [
        t.name for t in models.targets(model) if ("gram", padded.stats.leader(t.name)) in padded.stats.moments
    ]
    experts = [name for name in names if padded.stats.moment("gram", name).count != sum(others.LENGTHS)]
    assert len(experts) >= 4
    assert same(padded, unpadded, names)
    for layer in ("0", "1"):
        each = {key for key in experts if f"layers.{layer}." in key and key.endswith("down")}
        got = sum(padded.stats.moment("gram", key).count for key in each)
        assert got == 2 * sum(others.LENGTHS)  # each token goes to two


class Regression(nn.Module):
    """No config, no loss, sequences of its own: (samples, positions, width) and their mask."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))])
        self.last = nn.Linear(6, 2)

    def forward(self, series: Tensor, real: Tensor) -> Tensor:
        hidden = series
        for block in self.blocks:
            hidden = hidden + block(hidden)
        pooled = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        found: Tensor = self.last(pooled)
        return found


def series(lengths: tuple[int, ...] = (4, 7, 2)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(length, 6, generator=generator) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=9.0)
    return [(padded, others.mask(rows))] + [(row[None], torch.ones(1, len(row))) for row in rows]


@pytest.mark.parametrize("summed", [False, True])
def test_any_module_any_loss_any_masks(summed: bool) -> None:
    torch.manual_seed(0)
    model = Regression().eval()
    whole, *rows = series()

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        found = (outputs - 1).square().sum(-1) / 2
        return found.sum() if summed else found

    padded, unpadded = (feed(model, calls, loss=loss, masks={0: 1}) for calls in ([whole], rows))
    one, other = calibrated(model, padded), calibrated(model, unpadded)
    names = [target.name for target in models.targets(model)]
    assert names == ["blocks.0.0", "blocks.0.2"]
    assert same(one, other, names)
    assert one.tokens == 13
    assert one.terms == (13 if summed else 3)
    assert not same(calibrated(model, feed(model, [whole], loss=loss)), other, names)


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    model = Regression().eval().double()
    _, *rows = series()
    found = feed(model, rows, loss=lambda y, batch: y.square().sum(), masks={0: 1})
    moment = calibrated(model, found).stats.moment("fisher", "blocks.0.2").mean()
    expected = []
    for batch in rows:
        model.zero_grad()
        model(*(part.double() for part in batch)).square().sum().backward()
        gradient = model.get_submodule("blocks.0.2").weight.grad
        assert isinstance(gradient, Tensor)
        expected.append(gradient.square().sum(0))
    assert torch.allclose(moment.double(), torch.stack(expected).mean(0), rtol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rows_that_no_mask_fits_are_refused() -> None:
    class Halved(Regression):
        def forward(self, series: Tensor, real: Tensor) -> Tensor:
            hidden = self.blocks[0](series[:, ::2])
            found: Tensor = self.last(hidden.mean(1))
            return found

    whole, *_ = series()
    found = feed(Halved(), [whole], loss=lambda y, batch: y.sum(-1), masks={0: 1})
    with pytest.raises(ModelError, match=r"blocks.0.0 reads 12 rows, and the mask has 3 x 7 positions"):
        calibrated(Halved(), found)


@pytest.mark.parametrize(
    "name", ["bert", "bert-classes", "bert-tags", "bert-answers", "t5", "whisper", "vit", "clip"]
)
def test_the_default_loss_is_the_models_own_times_its_terms(name: str) -> None:
    model, batch = others.build(name), others.batch(name)
    found = feed(model, [batch])
    assert isinstance(found.objective, objectives.Own)
    ready = batches.without_padded_labels(batch, found.sides)
    assert isinstance(ready, dict)
    with torch.no_grad():
        outputs = model(**ready)
    summed = found.objective.summed(outputs, ready, None)
    assert float(summed.total) == pytest.approx(float(outputs.loss) * summed.terms)
    labels = ready.get("labels")
    wanted = 2 * len(others.LENGTHS) if labels is None else int((labels != others.IGNORED).sum())
    assert summed.terms == wanted


def test_labels_at_padding_do_not_count() -> None:
    model, batch = others.build("bert-tags"), others.batch("bert-tags")
    found = feed(model, [batch])
    assert losses.measured(model, found).terms == sum(others.LENGTHS) < batch["labels"].numel()


def test_a_loss_that_is_no_mean_over_labels_is_refused() -> None:
    class Weighted(type(others.build("bert-classes"))):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            outputs = super().forward(**inputs)
            outputs.loss = 2 * outputs.loss
            return outputs

    model = Weighted(others.build("bert-classes").config).eval()
    with pytest.raises(ConfigError, match=r"own loss is .*, and the mean over its labels is .*: pass loss="):
        feed(model, [others.batch("bert-classes")])


def test_without_a_loss_it_is_the_distance_from_the_dense_model() -> None:
    """Of scores the cross entropy, of states half the squared distance; both least at the dense model."""
    for name, scores in (("bert-classes", True), ("bert-encoder", False)):
        model = others.build(name)
        calls = [{k: v for k, v in b.items() if k != "labels"} for b in others.batches(name, 2)]
        found = losses.remember(model, feed(model, calls))
        assert isinstance(found.objective, objectives.Likeness)
        assert found.objective.scores is scores
        dense = losses.measured(model, found)
        with torch.no_grad():
            model.get_submodule(models.linear_names(model)[-2]).weight.mul_(1.05)
        changed = losses.measured(model, found)
        assert changed.loss > dense.loss
        assert changed.error is not None
        assert changed.error > 0
        assert dense.error == pytest.approx(0, abs=1e-6)


def test_the_curvature_without_labels_is_that_of_the_distance() -> None:
    """E[g g^T] on drawn labels is the Hessian of half the squared distance: exact for a linear map."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).eval()
    found = feed(model, [torch.randn(400, 4, generator=torch.Generator().manual_seed(1)) for _ in range(20)])
    moment = calibrated(model, found).stats.moment("gradient", "0").mean()
    second = models.find(model, "1").weight.detach()
    expected = second.T @ second
    assert float((moment - expected).norm()) < 0.1 * float(expected.norm())
    assert float((moment - torch.eye(5)).norm()) > 0.2 * float(expected.norm())


def test_a_module_without_a_list_of_blocks_is_compressed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)).eval()
    pairs = [(torch.randn(64, 32), torch.randn(64, 32)) for _ in range(3)]
    options: dict[str, Any] = {"batches": pairs, "inputs": [0], "keep": 0.6, "loss": distance}
    small, result = eckart.compress(net, **options)
    assert result.after.model <= 0.6 * result.before.model
    assert small(pairs[0][0]).shape == (64, 32)


def distance(output: Any, pair: Any) -> Any:
    return (output - pair[1]).square().sum(-1) / 2


def test_sampled_labels() -> None:
    model = others.build("bert")
    found = feed(model, others.batches("bert", 2))
    sampled, text = (calibrated(model, found, labels) for labels in ("sampled", "text"))
    names = [target.name for target in models.targets(model)]
    assert sampled.terms == text.terms
    assert not same(sampled, text, names)
    with pytest.raises(ConfigError, match="labels 'sampled' are drawn from logits"):
        calibrated(model, feed(model, others.batches("bert", 2), loss=lambda y, b: y.loss), "sampled")


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "there are no batches"),
        (["text"], "batch 0 is a str: give a mapping"),
        ([{"a": 1}], "batch 0 holds no tensor"),
        ([{"input_ids": torch.ones(1, 3)}], "got one batch: give two at least, or eval_batches"),
    ],
)
def test_batches_are_checked(calls: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        running.of_batches(nn.Linear(3, 3), calls)


def test_a_mask_that_is_no_mask_of_positions_is_refused() -> None:
    batch = others.batch("bert")
    mask = batch["attention_mask"]
    with pytest.raises(ConfigError, match=r"attention_mask has shape \[3, 1, 9, 9\]: only \(samples, pos"):
        feed(others.build("bert"), [batch | {"attention_mask": mask[:, None, None] * mask[:, None, :, None]}])
