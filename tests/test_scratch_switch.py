"""Full-rank warm-up: what becomes of the optimizer when matrices become low-rank in the middle."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from eckart import models
from eckart.errors import ConfigError, ModelError, RankError
from eckart.factors import LowRank, build
from eckart.scratch import preset
from eckart.scratch.decay import FrobeniusDecay
from eckart.scratch.preset import Structure
from eckart.scratch.switch import Switch, Switched, pulled, switch

from . import tiny
from .conftest import reload

STRUCTURE = Structure(keep=0.5, of="linears")
LOW = LowRank(
    torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def modules(form: Any) -> tuple[nn.Linear, Any]:
    """Return a dense linear of low rank, and the low-rank module that is the same map."""
    bias = drawn(8, seed=2)
    dense = nn.Linear(5, 8).double()
    with torch.no_grad():
        dense.weight.copy_(LOW.dense())
        dense.bias.copy_(bias)
    return dense, build(LOW, form, bias)


def gradients(module: nn.Module, inputs: Tensor, target: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    (module(inputs) * target).sum().backward()
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_first_moments_are_those_that_the_factors_would_have_had(form: str) -> None:
    dense, low = modules(form)
    mean: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for seed in range(6):
        inputs, target = drawn(7, 5, seed=10 + seed), drawn(7, 8, seed=30 + seed)
        for found, module in ((mean, dense), (own, low)):
            for name, slope in gradients(module, inputs, target).items():
                found[name] = 0.9 * found.get(name, torch.zeros_like(slope)) + 0.1 * slope
    made = pulled(low, mean["weight"], mean["bias"])
    assert made.keys() == own.keys()
    for name, value in made.items():
        assert torch.allclose(value, own[name])


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_second_moments_are_exact_for_uncorrelated_entries(form: str) -> None:
    """One entry of the gradient at a time: nothing to be correlated with."""
    dense, low = modules(form)
    mean = {name: torch.zeros_like(value) for name, value in dense.named_parameters()}
    own = {name: torch.zeros_like(value) for name, value in low.named_parameters()}
    for seed in range(8):
        inputs, target = torch.zeros(1, 5).double(), torch.zeros(1, 8).double()
        inputs[0, seed % 5], target[0, (3 * seed) % 8] = 1.0 + seed, 0.5
        # Two samples of opposite sign cancel in the bias alone.
        inputs, target = torch.cat([inputs, -inputs]), torch.cat([target, -target])
        for found, module in ((mean, dense), (own, low)):
            for name, slope in gradients(module, inputs, target).items():
                found[name] += slope.square()
    made = pulled(low, mean["weight"], mean["bias"], squared=True)
    for name, value in made.items():
        assert torch.allclose(value, own[name])
        assert bool((value >= 0).all())
    assert not torch.allclose(
        pulled(low, mean["weight"], mean["bias"])[next(iter(made))], own[next(iter(made))]
    )


def trained(name: str, optimizer: Any, **options: Any) -> tuple[Any, Any]:
    """Return a tiny model after two steps, and its optimizer with Trainer's two groups."""
    model = tiny.build(name).train()
    decayed = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim == 1]
    made = optimizer([{"params": decayed, "weight_decay": 0.1}, {"params": others}], **options)
    for _ in range(2):
        model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
        made.step()
        made.zero_grad()
    return model, made


@pytest.mark.parametrize("name", ["llama-bias-untied", "gpt-neox"])
def test_what_can_be_kept_is_kept(name: str) -> None:
    model, optimizer = trained(name, torch.optim.AdamW, lr=1e-3)
    before = {key: copy.deepcopy(optimizer.state[value]) for key, value in model.named_parameters()}
    weights = {key: module.weight.detach().clone() for key, module in model.named_modules()
               if isinstance(module, nn.Linear)}  # fmt: skip
    done = switch(model, optimizer, STRUCTURE)
    after = dict(model.named_parameters())
    assert done.begun == ()
    assert set(done.kept) | set(done.projected) == set(after)
    for key in done.kept:
        for part, value in before[key].items():
            assert torch.equal(optimizer.state[after[key]][part], value)
    for key, module in models.low_rank_modules(model).items():
        old, new = before[f"{key}.weight"], optimizer.state[after[f"{key}.up.weight"]]
        assert torch.allclose(new["exp_avg"], old["exp_avg"] @ module.down.weight.T, atol=1e-9)  # type: ignore[union-attr]
        assert torch.equal(new["step"], old["step"])
        assert new["step"] is not old["step"]
        if f"{key}.bias" in before:
            assert torch.equal(
                optimizer.state[after[f"{key}.up.bias"]]["exp_avg_sq"], before[f"{key}.bias"]["exp_avg_sq"]
            )
        assert not torch.equal(module.map().dense(), weights[key])  # type: ignore[operator]
    # Nothing is left of what is gone, and every parameter is in one group, in the model's order.
    assert {id(value) for value in optimizer.state} == {id(value) for value in after.values()}
    listed = [id(value) for group in optimizer.param_groups for value in group["params"]]
    wanted = [id(value) for value in after.values() if value.ndim > 1]
    wanted += [id(value) for value in after.values() if value.ndim == 1]
    assert listed == wanted
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    optimizer.step()


def test_momentum_is_projected_and_unknown_states_begin_anew() -> None:
    model, optimizer = trained("llama", torch.optim.SGD, lr=1e-3, momentum=0.9)
    done = switch(model, optimizer, STRUCTURE)
    assert done.begun == ()
    assert len(done.projected) == 2 * len(models.low_rank_modules(model))
    model, optimizer = trained("llama", torch.optim.Adafactor, lr=1e-3)
    done = switch(model, optimizer, STRUCTURE)
    assert done.projected == ()
    assert len(done.begun) == 2 * len(models.low_rank_modules(model))
    assert set(done.kept) == set(dict(model.named_parameters())) - set(done.begun)
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    optimizer.step()
    fresh = tiny.build("llama")
    nothing = torch.optim.AdamW(fresh.parameters())
    assert switch(fresh, nothing, STRUCTURE).projected == ()
    assert len(nothing.param_groups[0]["params"]) == len(list(fresh.parameters()))


def run(folder: Path, model: Any, steps: int, callbacks: list[Any], **options: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(16).repeat(16, 1)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=5e-3, weight_decay=0.1, report_to=[],
        use_cpu=True, logging_steps=1, disable_tqdm=True, per_device_train_batch_size=4, save_steps=3,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_inside_trainer_the_loss_goes_on_falling(tmp_path: Path, form: Any) -> None:
    structure = Structure(keep=0.7, of="linears", form=form)
    moving = Switch(structure, 8)
    trainer = run(tmp_path, tiny.build("llama-bias-untied").train(), 20, [FrobeniusDecay(), moving])
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(found[12:]) < min(found[:8]) < found[0]
    assert isinstance(moving.done, Switched)
    assert len(moving.done.projected) > 0
    assert models.low_rank_modules(trainer.model)


def test_checkpoints_from_before_and_after_go_on_to_the_same_result(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", tiny.build("llama").train(), 8, [Switch(STRUCTURE, 4)])
    whole.train()
    before = run(tmp_path / "whole", tiny.build("llama").train(), 8, [Switch(STRUCTURE, 4)])
    before.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    after = run(tmp_path / "whole", reload(tmp_path / "whole" / "checkpoint-6").train(), 8, [])
    after.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for again in (before, after):
        pairs = zip(whole.model.named_parameters(), again.model.parameters(), strict=True)
        for (name, value), other in pairs:
            assert torch.allclose(value, other, atol=1e-6), name


def test_what_cannot_be_done_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dense_steps 0"):
        Switch(STRUCTURE, 0)
    with pytest.raises(ConfigError, match=r"dense_steps 6 of 6 steps: nothing would be low-rank"):
        run(tmp_path, tiny.build("llama"), 6, [Switch(STRUCTURE, 6)]).train()
    with pytest.raises(RankError, match="above break-even"):
        run(tmp_path, tiny.build("llama"), 6, [Switch(Structure(rank=16), 2)])
    small = preset.factorize(tiny.build("llama"), STRUCTURE)
    with pytest.raises(ModelError):
        run(tmp_path, small, 6, [Switch(STRUCTURE, 2)]).train()
    callback = Switch(STRUCTURE, 2)
    nothing: Any = None
    several: Any = type("Arguments", (), {"world_size": 2})()
    with pytest.raises(ConfigError, match=r"dense_steps on 2 processes.*use one process"):
        callback.on_init_end(several, nothing, nothing, model=tiny.build("llama"))
