"""How adapters start: what they do at first, what they take out of the base, which ranks they can have."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from eckart.adapt import attach, targets
from eckart.errors import RankError

from . import adapters, tiny, tuning

pytestmark = adapters.QUIET


def attached(model: Any, tokenizer: Any, folder: Path, **changes: Any) -> attach.Attached:
    """Return the state before the first step: a step so small that it changes nothing."""
    chosen = tuning.settings(tuning.data(folder), **{"steps": 1, "rate": 1e-12, "evaluations": 1, **changes})
    found, _ = tuning.run(model, tokenizer, chosen, folder / "work")
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rslora": True},
        {"init": "pissa"},
        {"init": "olora"},
        {"init": "corda"},
        {"init": "eva"},
        {"method": "dora"},
        {"method": "adalora", "steps": 10},
    ],
)
def test_a_start_does_not_change_the_function(
    changes: dict[str, Any], llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    found = attached(llama, tokenizer, tmp_path, **changes)
    ids = tiny.tokens()
    assert adapters.differ(tuning.logits(found.model, ids), tuning.logits(llama, ids)) < 1e-4
    assert bool(found.start) == (changes.get("init") in ("pissa", "olora", "corda"))


def test_pissa_takes_the_largest_singular_vectors(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    found = attached(llama, tokenizer, tmp_path, init="pissa", targets=("q_proj",), rank=3)
    for name in found.ranks:
        weight = llama.get_submodule(name).weight.detach().double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        best = (left[:, :3] * values[:3]) @ right[:3]
        assert torch.allclose(found.start[name].dense().double(), best, atol=1e-4)
        base = found.model.base_model.model.get_submodule(name).base_layer.weight.detach().double()
        assert torch.allclose(base, weight - best, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "scale"), [({}, 2.0), ({"alpha": 3.0}, 0.75), ({"rslora": True}, 4.0), ({"rank": 2}, 2.0)]
)
def test_the_scale_of_the_update(
    changes: dict[str, Any], scale: float, llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    found = attached(llama, tokenizer, tmp_path, **changes)
    for name, rank in found.ranks.items():
        layer = found.model.base_model.model.get_submodule(name)
        assert layer.scaling[attach.ADAPTER] == pytest.approx(scale)
        assert layer.lora_A[attach.ADAPTER].weight.shape[0] == rank == changes.get("rank", 4)


def test_ranks_of_their_own_have_the_same_scale(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    found = attached(llama, tokenizer, tmp_path, rank="auto", auto_rank=3)
    assert len(set(found.ranks.values())) > 1
    shapes = targets.shapes(llama, list(found.ranks))
    spent = sum(rank * sum(shapes[name]) for name, rank in found.ranks.items())
    everything = targets.names(llama)
    assert spent <= 3 * sum(map(sum, targets.shapes(llama, everything).values()))
    for name in found.ranks:
        layer = found.model.base_model.model.get_submodule(name)
        assert layer.scaling[attach.ADAPTER] == pytest.approx(2)


def test_a_rank_above_the_smaller_side_is_a_warning_for_lora(
    llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    chosen = tuning.settings(tuning.data(tmp_path), rank=17, targets=("k_proj",))
    _, done = tuning.run(llama, tokenizer, chosen, tmp_path / "work")
    (note,) = [note for note in done.prospect.notes if "rank" in note]
    assert note == (
        "rank 17 of model.layers.0.self_attn.k_proj, which is 16 x 32: more than the matrix can have; the "
        "rest is parameters without use"
    )


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "eva"])
def test_a_rank_above_the_smaller_side_is_an_error_where_singular_vectors_are_taken(
    init: str, llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        RankError,
        match=rf"rank 17 of model\.layers\.0\.self_attn\.k_proj, which is 16 x 32: init '{init}' takes "
        "singular vectors, of which there are at most 16; lower the rank, or leave such matrices out",
    ):
        attached(llama, tokenizer, tmp_path, rank=17, targets=("k_proj",), init=init)


@pytest.mark.parametrize("architecture", tiny.LINEAR)
def test_short_names_are_found_by_peft(architecture: str) -> None:
    model = tiny.build(architecture)
    every = targets.names(model)
    for chosen in (every, every[:3], every[1::2]):
        short = attach.short_names(model, chosen)
        config = peft.LoraConfig(r=1, target_modules=short, task_type="CAUSAL_LM")
        made = peft.get_peft_model(copy.deepcopy(model), config)
        assert sorted(made.base_model.targeted_module_names) == sorted(chosen)
    assert len(attach.short_names(model, every)) < len(every)


def test_the_random_state_of_the_caller_is_left_alone(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = attached(llama, tokenizer, tmp_path / "a")
    torch.manual_seed(99)
    second = attached(llama, tokenizer, tmp_path / "b")
    own, other = tuning.trained(first.model), tuning.trained(second.model)
    assert all(torch.equal(value, other[name]) for name, value in own.items())
