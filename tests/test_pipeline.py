"""The main job on tiny models: budgets hold, methods are what they claim, results say what happened."""

from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from eckart import ConfigError, ModelError, NotFinite, Override, RankError, Recipe, hub, models, pipeline
from eckart.methods import METHODS

from . import tiny
from .conftest import Compress, logits


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stays_within_every_budget(name: str, compress: Compress) -> None:
    budgets: list[dict[str, Any]] = [{"keep": 0.7, "of": "linears"}, {"keep": 0.85}]
    if METHODS[name].form not in ("width", "shared"):
        budgets += [{"rank": 8}, {"energy": 0.9}]
    for options in budgets:
        model, result = compress(tiny.build("llama"), method=name, **options)
        assert models.low_rank_modules(model)
        assert result.after.model == models.parameter_count(model)
        assert result.compressed.perplexity > 0
        if "keep" in options:
            kept = result.keep_linears if options.get("of") else result.keep_model
            assert kept <= options["keep"]
            # What a budget leaves unused is less than one more rank of every matrix.
            assert kept > options["keep"] - 0.12
        assert result.keep_linears < 1


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_a_size_is_never_exceeded_on_disk(form: str, compress: Compress, tmp_path: Path) -> None:
    dense = hub.accounted_bytes(models.state_tensors(tiny.build("llama")))
    size = int(dense * 0.9)
    model, result = compress(tiny.build("llama"), size=size, form=form)
    eckart.save(model, None, tmp_path / "out", result)
    assert size * 0.75 < hub.weight_bytes(tmp_path / "out") <= size


def test_an_unreachable_budget_says_what_can_be_reached(compress: Compress) -> None:
    with pytest.raises(RankError, match=r"keep 0.3 of the model cannot be reached: .* is keep 0.\d{3};"):
        compress(tiny.build("llama"), keep=0.3)
    with pytest.raises(RankError, match=r"size 10KB cannot be reached: .* the least is 0.0\d\dMB"):
        compress(tiny.build("llama"), size="10KB")


def test_what_an_error_offers_can_be_reached(compress: Compress) -> None:
    for unit, options in (
        ("keep", {"keep": 0.01}),
        ("keep", {"keep": 0.01, "of": "linears"}),
        ("size", {"size": 9}),
    ):
        with pytest.raises(RankError) as caught:
            compress(tiny.build("llama"), method="svd", **options)
        offer = str(caught.value).split("the least is ")[1].split(";")[0].removeprefix("keep ")
        value = {unit: float(offer) if unit == "keep" else offer}
        _, result = compress(tiny.build("llama"), method="svd", **options | value)
        assert result.keep_linears < 0.3


def test_the_measured_quality_follows_the_metric(compress: Compress) -> None:
    """On the calibration text the two-sided optimum must beat plain SVD."""
    losses = {}
    for method in ("svd", "io-svd"):
        model = tiny.build("llama")
        _, result = compress(model, method=method, keep=0.7, of="linears")
        losses[method] = result.compressed.loss - result.dense.loss
    assert losses["io-svd"] < losses["svd"]


def test_overrides_rule_single_modules_and_the_last_one_wins(compress: Compress) -> None:
    rules = [Override("self_attn.*", rank=3), Override("*.v_proj", dense=True)]
    model, result = compress(tiny.build("llama"), overrides=rules, form="factored")
    found = {m.name.rsplit(".", 1)[-1]: (m.form, m.rank) for m in result.modules}
    assert found["q_proj"] == ("factored", 3)
    assert found["v_proj"] == ("dense", 16)
    assert type(model.model.layers[0].self_attn.v_proj) is torch.nn.Linear
    assert result.keep_linears <= 0.6
    with pytest.raises(ModelError, match="'nothing' matches none"):
        compress(tiny.build("llama"), overrides=[Override("nothing", rank=2)])


def test_ranks_are_multiples(compress: Compress) -> None:
    recipe = Recipe(keep=0.6, of="linears", multiple=4, text=("x",))
    _, result = compress(tiny.build("llama"), recipe=recipe)
    assert all(m.rank % 4 == 0 for m in result.modules)
    assert result.keep_linears <= 0.6


def test_a_matrix_that_gains_nothing_stays_dense(compress: Compress) -> None:
    model, result = compress(tiny.build("llama"), rank=24, form="factored")
    assert {m.form for m in result.modules} == {"dense"}
    assert not models.low_rank_modules(model)
    assert result.keep_linears == 1
    assert result.compressed.loss == pytest.approx(result.dense.loss)


def test_keep_one_changes_nothing(compress: Compress) -> None:
    model = tiny.build("llama")
    before = logits(model, tiny.tokens())
    small, _ = compress(model, keep=1.0)
    assert torch.equal(logits(small, tiny.tokens()), before)


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(compress: Compress) -> None:
    def weights(seed: int) -> torch.Tensor:
        model, _ = compress(tiny.build("llama"), seed=seed, tokens=256, gradient_tokens=256)
        return logits(model, tiny.tokens())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_too_few_tokens_are_a_warning_with_the_number(compress: Compress) -> None:
    _, result = compress(tiny.build("llama"), tokens=16, gradient_tokens=16, seq_len=16)
    assert any(
        "too few tokens for the rank of some gram moments: 48 are needed" in w for w in result.warnings
    )
    _, result = compress(tiny.build("llama"), tokens=10**6, gradient_tokens=64)
    assert any("fewer than tokens = 1,000,000" in w for w in result.warnings)


def test_svd_needs_no_text(tokenizer: Any) -> None:
    model, result = eckart.compress(tiny.build("llama"), keep=0.6, of="linears", method="svd")
    assert models.low_rank_modules(model)
    assert result.dense is None


def test_nan_weights_are_named_and_the_model_is_left_alone(compress: Compress) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"layers.1.mlp.up_proj \(48, 32\) has 1 NaN or infinite"):
        compress(model)
    assert not models.low_rank_modules(model)


def test_an_output_dtype_that_overflows_is_refused(compress: Compress) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e9)
    with pytest.raises(NotFinite, match="o_proj.* does not fit torch.float16: choose dtype bfloat16"):
        compress(model, dtype="float16")


def test_one_preparation_serves_every_budget(tokenizer: Any, text_file: Path) -> None:
    recipes = [
        Recipe(keep=keep, of="linears", text=(str(text_file),), tokens=512, gradient_tokens=512, seq_len=64)
        for keep in (0.9, 0.5)
    ]
    loaded = hub.Loaded(tiny.build("llama"), tokenizer, "x", torch.float32, None)
    prepared = pipeline.prepare(recipes[0], loaded)
    dense = {t.name: models.find(loaded.model, t.name) for t in prepared.found}
    _, first = pipeline.finish(recipes[0], prepared)
    for name, module in dense.items():
        models.replace(loaded.model, name, module)
    _, second = pipeline.finish(recipes[1], prepared)
    assert first.keep_linears <= 0.9
    assert second.keep_linears <= 0.5
    assert second.predicted_increase is not None
    assert first.predicted_increase is not None
    assert second.predicted_increase > first.predicted_increase > 0


def test_sampled_labels_and_bos(compress: Compress) -> None:
    recipe = Recipe(keep=0.6, of="linears", labels="sampled", bos=True, text=("x",))
    _, result = compress(tiny.build("llama"), recipe=recipe)
    assert result.recipe.labels == "sampled"
    assert result.compressed.seq_len == 64


def test_result_has_a_rich_repr_and_json(compress: Compress) -> None:
    model, result = compress(tiny.build("llama"))
    shown = str(result)
    for words in ("parameters of the linears", "perplexity on ", "peak memory", "predicted"):
        assert words in shown
    for words in ("bytes of the linears", "1,024 tokens, 512 of them with gradients", "damped by 0.0001"):
        assert words in shown
    modules = models.low_rank_modules(model).values()
    kept = [m for m in result.modules if m.form == "dense"]
    stored = sum(t.numel() * t.element_size() for m in modules for t in m.state_dict().values())
    assert result.after.linear_bytes == stored + sum(4 * m.after for m in kept)
    assert result.to_dict()["keep_linears"] == result.keep_linears


def test_arguments_are_checked(llama: Any, text_file: Path) -> None:
    with pytest.raises(ModelError, match="got a int: give a hub id"):
        eckart.compress(3, keep=0.5, text=text_file)
    with pytest.raises(ModelError, match="text needs a tokenizer: pass tokenizer="):
        eckart.compress(llama, keep=0.9, text=text_file)
    with pytest.raises(ConfigError, match="give exactly one of"):
        eckart.compress(llama, text=text_file)
