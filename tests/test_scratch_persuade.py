"""Penalties in Trainer: what is added, when, to what; how spectra decline; what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import eckart
from eckart import Override
from eckart.errors import ConfigError, ModelError
from eckart.factors import FactoredLinear
from eckart.scratch import decline, persuasion, preset
from eckart.scratch.decline import Decline, target_rank
from eckart.scratch.penalties import Nuclear, StableRank, Tail
from eckart.scratch.persuade import Persuade, matrices
from eckart.scratch.persuasion import Persuasion
from eckart.scratch.preset import Structure

from . import tiny


def trainer(folder: Path, model: Any, callbacks: list[Any], steps: int = 1, **options: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(12).repeat(32, 1)]
    given = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1.0} | options
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4, save_strategy="no", logging_steps=1, lr_scheduler_type="constant",
        **given,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=callbacks)


def after(folder: Path, model: Any, callbacks: list[Any], **options: Any) -> dict[str, torch.Tensor]:
    """Return the parameters after training with plain gradient descent."""
    made = trainer(folder, model, callbacks, **options)
    made.train()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


KINDS: dict[str, tuple[Persuasion, Any]] = {
    "nuclear": (Persuasion("nuclear", 0.3), lambda shape: Nuclear()),
    "tail": (Persuasion("tail", 0.3, keep=0.4), lambda shape: Tail(target_rank(shape, 0.4) or 0)),
    "stable-rank": (Persuasion("stable-rank", 0.3), lambda shape: StableRank()),
}


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_loss_and_once_that_of_the_penalty(
    tmp_path: Path, kind: str, passes: int
) -> None:
    settings, reference = KINDS[kind]
    start = dict(tiny.build("llama").named_parameters())
    given = {"gradient_accumulation_steps": passes}
    plain = after(tmp_path, tiny.build("llama"), [], **given)
    pulled = after(tmp_path, tiny.build("llama"), [Persuade(settings)], **given)
    for name, value in plain.items():
        if name.endswith("proj.weight"):
            weight = start[name].detach()
            penalty = reference(tuple(weight.shape))
            slope = penalty.on_matrix(weight, penalty.anchor(weight)).gradients[0]
            assert torch.allclose(pulled[name], value - 0.3 * slope, atol=1e-4)
            assert not torch.allclose(pulled[name], value, atol=1e-4)
        else:
            assert torch.equal(pulled[name], value)


@pytest.mark.parametrize("kind", ["nuclear", "tail", "stable-rank", "orthogonality"])
def test_factors_are_pulled_exactly(tmp_path: Path, kind: Any) -> None:
    settings = Persuasion(kind, 0.05, keep=0.2 if kind == "tail" else None)

    def small() -> Any:
        return preset.factorize(tiny.build("llama"), Structure(keep=0.6, of="linears"))

    callback = Persuade(settings)
    model = small()
    module = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        module.up.weight.add_(0.1)
        module.down.weight.add_(0.1)
    start = [module.up.weight.detach().clone(), module.down.weight.detach().clone()]
    made = trainer(tmp_path, model, [callback], max_grad_norm=1e-12)
    slopes = callback._penalty("", module).on_factors(*start).gradients  # type: ignore[union-attr]
    made.train()
    for weight, old, slope in zip((module.up.weight, module.down.weight), start, slopes, strict=True):
        assert torch.allclose(weight, old - 0.05 * slope, atol=1e-5)
        assert not torch.allclose(weight, old, atol=1e-5)


def test_strength_follows_the_schedule() -> None:
    constant = Persuasion("nuclear", 2.0, warmup=0.5)
    assert [constant.at(step, 10) for step in (0, 4, 5, 9)] == [0.0, 0.0, 2.0, 2.0]
    linear = Persuasion("nuclear", 2.0, schedule="linear", warmup=0.5)
    assert [linear.at(step, 10) for step in (4, 5, 7, 9)] == pytest.approx([0.0, 0.4, 1.2, 2.0])
    cosine = [Persuasion("nuclear", 2.0, schedule="cosine").at(step, 100) for step in range(100)]
    assert cosine == sorted(cosine)
    assert cosine[0] < 0.001 < 1.95 < cosine[-1] <= 2.0
    assert cosine[49] == pytest.approx(1.0)
    until = Persuasion("nuclear", 2.0, schedule="linear", until=4)
    assert [until.at(step, 10) for step in (0, 3, 4, 9)] == pytest.approx([0.5, 2.0, 0.0, 0.0])


def test_decompositions_last_as_long_as_they_are_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = Tail.anchor

    def counted(self: Tail, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        taken.append(1)
        return real(self, weight)

    monkeypatch.setattr(Tail, "anchor", counted)
    callback = Persuade(Persuasion("tail", 1e-3, keep=0.4, every=3, include=("layers.0.*.up_proj",)))
    made = trainer(tmp_path, tiny.build("llama"), [callback], steps=7, learning_rate=1e-3)
    taken.clear()
    made.train()
    assert len(taken) == 3


def test_spectra_decline_with_a_penalty_and_are_plotted(tmp_path: Path) -> None:
    found, lost = {}, {}
    for name, strength in (("with", 0.3), ("without", 1e-9)):
        callback = Persuade(persuasion.from_mapping({"kind": "tail", "strength": strength, "keep": 0.3}))
        model = tiny.build("llama")
        given = {"optim": "adamw_torch", "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 10}
        made = trainer(tmp_path, model, [callback], steps=30, **given)
        made.train()
        found[name] = callback.decline
        whole = copy.deepcopy(model).eval()
        small, _ = eckart.compress(model, keep=0.3, of="linears", method="svd", form="factored")
        with torch.no_grad():
            before, after = (
                float(one(input_ids=tiny.tokens(12), labels=tiny.tokens(12)).loss) for one in (whole, small)
            )
        lost[name] = after - before
    # Compressed at equal keep, the model that was persuaded loses a fraction of what the other one does.
    assert lost["with"] < 0.5 * lost["without"]
    noted = found["with"]
    assert [step for step, _ in noted.steps] == [0, 10, 20, 30]
    beyond = {name: [value for _, value in one.mean("beyond")] for name, one in found.items()}
    assert beyond["with"][0] == beyond["without"][0]
    assert beyond["with"][-1] < 0.2 * beyond["without"][-1]
    again = Decline()
    again.take(json.loads(json.dumps(noted.to_dict())))
    assert again.to_dict() == noted.to_dict()
    assert decline.plot(again, tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").stat().st_size > 10_000


def test_a_spectrum_is_that_of_the_map() -> None:
    model = preset.factorize(tiny.build("llama"), Structure(rank=5))
    module = model.model.layers[0].mlp.down_proj
    dense = nn.Linear(module.in_features, module.out_features, bias=False)
    with torch.no_grad():
        dense.weight.copy_(module.map().dense())
    own, other = decline.spectrum(module), decline.spectrum(dense)
    assert len(own) == 5
    assert torch.allclose(own, other[:5], rtol=1e-5)
    assert float(other[5:].max()) < 1e-5 * float(other[0])
    pivoted = preset.factorize(tiny.build("llama"), Structure(rank=5, form="pivoted"))
    assert torch.allclose(decline.spectrum(pivoted.model.layers[0].mlp.down_proj), other, atol=1e-5)
    made = decline.summary(torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64), 2)
    assert made == pytest.approx(
        {"norm": 12**0.5, "stable_rank": 12 / 9, "rank_90": 3, "rank_99": 4, "beyond": 2 / 12}
    )
    assert decline.summary(torch.zeros(3), 1)["stable_rank"] == 0


def test_what_is_penalised_can_be_chosen() -> None:
    model = eckart.from_config(
        tiny.build("llama").config, rank=4, overrides=[Override("*.v_proj", dense=True)]
    )
    found = matrices(model, Persuasion("nuclear", 1.0))
    assert len(found) == 14
    assert {type(module) for module in found.values()} == {nn.Linear, FactoredLinear}
    some = matrices(model, Persuasion("nuclear", 1.0, include=("*.mlp.*", "lm_head"), exclude=("up_proj",)))
    assert {name.rsplit(".", 1)[-1] for name in some} == {"gate_proj", "down_proj", "lm_head"}


def test_weights_in_few_bits_are_refused() -> None:
    settings = Persuasion("nuclear", 1.0)
    stored, _ = eckart.quantise(tiny.build("llama"), "int8", method="svd")
    with pytest.raises(ConfigError, match=r"stored in few bits.*densify the model first"):
        matrices(stored, settings)
    foreign = tiny.build("llama")
    linear = foreign.model.layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"q_proj and 0 more are stored in few bits"):
        matrices(foreign, settings)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    dense = tiny.build("llama")
    with pytest.raises(ConfigError, match="orthogonality is for factors"):
        trainer(tmp_path, dense, [Persuade(Persuasion("orthogonality", 1.0))])
    with pytest.raises(ModelError, match="'nothing' matches none"):
        trainer(tmp_path, dense, [Persuade(Persuasion("nuclear", 1.0, include=("nothing",)))])
    with pytest.raises(ConfigError, match="no matrix left"):
        trainer(tmp_path, dense, [Persuade(Persuasion("nuclear", 1.0, exclude=("*",)))])
    pivoted = preset.factorize(tiny.build("llama"), Structure(rank=4, form="pivoted"))
    with pytest.raises(ConfigError, match=r"is a PivotedLinear: penalties are for dense.*exclude"):
        trainer(tmp_path, pivoted, [Persuade(Persuasion("nuclear", 1.0))])
    small = preset.factorize(tiny.build("llama"), Structure(keep=0.4, of="linears"))
    with pytest.raises(ConfigError, match=r"keep 0.4: no matrix has a higher rank"):
        trainer(tmp_path, small, [Persuade(Persuasion("tail", 1.0, keep=0.4))])


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"kind": "rank", "strength": 1}, "kind 'rank': legal are nuclear, tail, stable-rank, orthogonality"),
        ({"kind": "nuclear", "strength": 0}, "strength 0: must be a number above 0"),
        ({"kind": "nuclear", "strength": 1, "keep": 0.5}, "keep 0.5 with penalty 'nuclear'"),
        ({"kind": "tail", "strength": 1}, "keep None with penalty 'tail': it is the target"),
        ({"kind": "nuclear", "strength": 1, "schedule": "up"}, "schedule 'up': legal are constant"),
        ({"kind": "nuclear", "strength": 1, "polar": "qr"}, "polar 'qr': legal are svd"),
        ({"kind": "nuclear", "strength": 1, "warmup": 2}, "warmup 2"),
        ({"kind": "nuclear", "strength": 1, "every": 0}, "every 0"),
        ({"kind": "nuclear", "strength": 1, "until": 0}, "until 0"),
        ({"kind": "nuclear", "strengt": 1}, "unknown key 'strengt': did you mean 'strength'"),
    ],
)
def test_illegal_settings_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        persuasion.from_mapping(values)
