"""Tuning runs: what is learned, what is kept, what is written, and how a run goes on."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from eckart import models
from eckart.adapt import losses, tune
from eckart.adapt.attach import Attached
from eckart.errors import ConfigError, ModelError, NotFinite, StoreError

from . import adapters, tiny, tuning

pytestmark = adapters.QUIET
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"method": "dora"},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "corda": {"init": "corda"},
    "eva": {"init": "eva"},
    "auto": {"rank": "auto", "auto_rank": 3},
    "adalora": {"method": "adalora", "rank": 2, "steps": 12, "rate": 5e-2},
    "alpha": {"alpha": 3.0, "targets": ("q_proj", "down_proj")},
}


def written(attached: Attached, folder: Path, settings: Any) -> Path:
    folder.mkdir()
    tune.write_adapter(folder, attached, "tiny", settings)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_its_adapter_loads_in_plain_peft(
    name: str, llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    chosen = tuning.settings(tuning.data(tmp_path), **METHODS[name])
    attached, done = tuning.run(llama, tokenizer, chosen, tmp_path / "work")
    assert done.end.loss < done.prospect.start.loss
    ids = tiny.tokens()
    expected = tuning.logits(attached.model, ids)
    assert not torch.allclose(expected, tuning.logits(llama, ids))
    folder = written(attached, tmp_path / "adapter", chosen)
    assert adapters.differ(tuning.logits(adapters.load(llama, folder), ids), expected) < 1e-5
    merged = adapters.load(llama, folder).merge_and_unload()
    assert adapters.differ(tuning.logits(merged, ids), expected) < 1e-5


def test_full_trains_every_parameter(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    chosen = tuning.settings(tuning.data(tmp_path), method="full", rate=1e-3)
    attached, done = tuning.run(llama, tokenizer, chosen, tmp_path / "work")
    before = dict(llama.named_parameters())
    assert done.prospect.trainable == done.prospect.total == models.parameter_count(llama)
    assert all(not torch.equal(value, before[name]) for name, value in attached.model.named_parameters())
    assert done.end.loss < done.prospect.start.loss


@pytest.mark.parametrize("architecture", ["gpt-neox", "phi3", "opt", "gemma2", "qwen3"])
def test_adapters_on_other_architectures(architecture: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny.build(architecture)
    chosen = tuning.settings(tuning.data(tmp_path))
    attached, done = tuning.run(model, tokenizer, chosen, tmp_path / "work")
    assert done.end.loss < done.prospect.start.loss
    folder = written(attached, tmp_path / "adapter", chosen)
    ids = tiny.tokens()
    expected = tuning.logits(attached.model, ids)
    assert adapters.differ(tuning.logits(adapters.load(model, folder), ids), expected) < 1e-5


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_a_compressed_model_is_tuned_by_its_dense_names(
    form: Any, llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from . import wards

    model = wards.cut(llama, 8, form)
    chosen = tuning.settings(tuning.data(tmp_path), targets=("q_proj",))
    attached, done = tuning.run(model, tokenizer, chosen, tmp_path / "work")
    assert done.ranks
    assert all(".q_proj." in name for name in done.ranks)
    assert done.end.loss < done.prospect.start.loss
    folder = written(attached, tmp_path / "adapter", chosen)
    ids = tiny.tokens()
    again = adapters.load(model, folder)
    assert adapters.differ(tuning.logits(again, ids), tuning.logits(attached.model, ids)) < 1e-5


class Cut(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("method", ["lora", "adalora", "full"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    method: str, llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rank = 2 if method == "adalora" else 4
    path = tuning.data(tmp_path)
    chosen = tuning.settings(path, method=method, rank=rank, steps=12, dropout=0.1, evaluations=4, rate=1e-3)
    whole, done = tuning.run(llama, tokenizer, chosen, tmp_path / "whole")

    def cut(stage: str, at: int, of: int) -> None:
        if (stage, at) == ("train", 8):
            raise Cut

    with pytest.raises(Cut):
        tuning.run(llama, tokenizer, chosen, tmp_path / "cut", watch=cut)
    seen: list[int] = []
    again, other = tuning.run(
        llama, tokenizer, chosen, tmp_path / "cut",
        watch=lambda stage, at, of: seen.append(at) if stage == "train" else None,
    )  # fmt: skip
    assert min(seen) == 7
    expected = tuning.trained(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in tuning.trained(again.model).items())
    assert other.end == done.end
    assert other.curve == done.curve
    assert other.trajectory == done.trajectory
    assert other.ranks == done.ranks


def test_the_state_of_another_run_is_refused(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tuning.data(tmp_path)
    tuning.run(llama, tokenizer, tuning.settings(path), tmp_path / "work")
    with pytest.raises(StoreError, match=r"work holds the state of a run with other settings, data or model"):
        tuning.run(llama, tokenizer, tuning.settings(path, rank=2), tmp_path / "work")
    path.write_text("\n".join(map(json.dumps, tuning.rows(24))))
    with pytest.raises(StoreError, match="delete it to begin anew"):
        tuning.run(llama, tokenizer, tuning.settings(path), tmp_path / "work")


def test_micro_batches_make_no_difference(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tuning.data(tmp_path)
    found = []
    for micro in (8, 2):
        chosen = tuning.settings(path, micro=micro, steps=3, rate=1e-3)
        attached, _ = tuning.run(llama, tokenizer, chosen, tmp_path / str(micro))
        found.append(tuning.trained(attached.model))
    assert all(torch.allclose(value, found[1][name], atol=2e-5) for name, value in found[0].items())


def test_checkpointing_makes_no_difference(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tuning.data(tmp_path)
    found = []
    for again in (False, True):
        chosen = tuning.settings(path, checkpointing=again, steps=3, dropout=0.2, rate=1e-3)
        attached, _ = tuning.run(llama, tokenizer, chosen, tmp_path / str(again))
        found.append(tuning.trained(attached.model))
    assert all(torch.allclose(value, found[1][name], atol=1e-6) for name, value in found[0].items())


def test_the_best_state_is_kept_not_the_last(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    # So high a rate soon makes it worse than it was.
    chosen = tuning.settings(
        tuning.data(tmp_path), method="full", rate=0.5, warmup=0.9, steps=20, evaluations=20, patience=4
    )
    _, done = tuning.run(llama, tokenizer, chosen, tmp_path / "work")
    curve = dict(done.curve)
    losses_after = {step: loss for step, loss in curve.items() if step}
    assert done.best == min(losses_after, key=lambda step: losses_after[step])
    assert done.end.loss == pytest.approx(losses_after[done.best], rel=1e-6)
    assert done.done == done.best + 4 < 20
    assert done.ended == "no new best in 4 evaluations"


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_best(
    llama: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tuning.settings(tuning.data(tmp_path), steps=9, evaluations=3)
    calls = 0
    true = losses.learned_losses

    def broken(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return true(logits, labels) * (float("nan") if calls > 14 and torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(losses, "learned_losses", broken)
    attached, done = tuning.run(llama, tokenizer, chosen, tmp_path / "work")
    assert done.ended == (
        "stopped: the loss is nan at step 8; the best state before it is kept; lower --rate"
    )
    assert done.best == 6
    assert done.end.loss < done.prospect.start.loss
    assert all(bool(torch.isfinite(value).all()) for value in tuning.trained(attached.model).values())


def test_a_loss_that_is_no_number_at_once_is_an_error(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    chosen = tuning.settings(tuning.data(tmp_path), method="full", rate=1e30, warmup=0.0)
    with pytest.raises(NotFinite, match=r"lower (the rate|--rate), or train in float32"):
        tuning.run(llama, tokenizer, chosen, tmp_path / "work")


def test_what_is_known_before(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    seen: list[Any] = []
    chosen = tuning.settings(tuning.data(tmp_path), targets=("q_proj", "v_proj"), rank=3)
    tuning.run(llama, tokenizer, chosen, tmp_path / "work", before=seen.append)
    (prospect,) = seen
    # Two layers, d 32, two of four heads for keys and values: q 32 x 32, v 16 x 32.
    assert prospect.trainable == 2 * 3 * (32 + 32 + 16 + 32)
    assert prospect.base == models.parameter_count(llama)
    assert prospect.total == prospect.base + prospect.trainable
    wrapped = peft.get_peft_model(
        tuning.loaded(llama, tokenizer).model,
        peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    assert (prospect.trainable, prospect.total) == wrapped.get_nb_trainable_parameters()
    assert (prospect.steps, prospect.examples, prospect.held_out) == (6, 32, 8)


def test_packed_rows_are_trained_on(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    chosen = tuning.settings(tuning.data(tmp_path), packing=True, batch=2, micro=1)
    _, done = tuning.run(llama, tokenizer, chosen, tmp_path / "work")
    assert done.prospect.rows < done.prospect.examples
    assert done.end.loss < done.prospect.start.loss


def test_errors_of_a_run(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tuning.data(tmp_path)
    with pytest.raises(ModelError, match="data needs a tokenizer: pass tokenizer="):
        tuning.run(llama, None, tuning.settings(path), tmp_path / "work")
    with pytest.raises(ConfigError, match="3 steps are too few for adalora to allocate ranks"):
        tuning.run(llama, tokenizer, tuning.settings(path, method="adalora", steps=3), tmp_path / "work")
    with pytest.raises(ModelError, match=r"q_prj.*q_proj"):
        tuning.run(llama, tokenizer, tuning.settings(path, targets=("q_prj",)), tmp_path / "work")
    assert not (tmp_path / "work").exists()
