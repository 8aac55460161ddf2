"""AdaLoRA under a plain Trainer: that it allocates, when, from what, and what is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eckart.adapt import attach, tune
from eckart.adapt.adalora import Allocation
from eckart.adapt.tuned import Tuned

from . import adapters, tiny, tuning

pytestmark = adapters.QUIET
STEPS, RANK = 20, 2


def run(model: Any, tokenizer: Any, folder: Path, **changes: Any) -> tuple[attach.Attached, Tuned]:
    chosen = tuning.settings(
        tuning.data(folder),
        **{"method": "adalora", "rank": RANK, "steps": STEPS, "evaluations": 4, **changes},
    )
    return tuning.run(model, tokenizer, chosen, folder / "work")


def test_ranks_fall_to_the_target_and_then_stay(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    _, done = run(llama, tokenizer, tmp_path)
    first, last = 2, STEPS - 6  # a tenth of the steps before, three tenths after
    sums = {step: sum(ranks.values()) for step, ranks in done.trajectory}
    assert sums[0] == 3 * 14
    assert list(sums.values()) == sorted(sums.values(), reverse=True)
    assert min(step for step in sums if step) > first
    assert max(sums) <= last
    assert sum(done.ranks.values()) == RANK * 14
    assert len(set(done.ranks.values())) > 1  # it did choose
    assert dict(done.trajectory[-1][1]) == dict(done.ranks)


def test_what_is_given_up_is_zero_and_what_is_kept_learns(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    found, done = run(llama, tokenizer, tmp_path)
    for name, rank in done.ranks.items():
        layer = found.model.base_model.model.get_submodule(name)
        values = layer.lora_E[attach.ADAPTER].detach()[:, 0]
        assert int((values != 0).sum()) == rank


def test_the_state_that_is_kept_is_one_with_settled_ranks(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    # The loss rises, so that the best state would be an early one.
    _, done = run(llama, tokenizer, tmp_path, rate=1.0, warmup=0.9, evaluations=20, patience=20)
    assert done.best >= STEPS - 6
    assert sum(done.ranks.values()) == RANK * 14


def test_the_allocator_sees_gradients(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    seen: list[float] = []
    true = Allocation.on_optimizer_step

    def spy(self: Allocation, *args: Any, **kwargs: Any) -> None:
        gradients = [value.grad for name, value in self.tuner.named_parameters() if "lora_E" in name]
        assert all(gradient is not None for gradient in gradients)
        seen.append(
            float(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).sum())
        )
        true(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Allocation, "on_optimizer_step", spy)
        run(llama, tokenizer, tmp_path)
    assert len(seen) == STEPS
    assert min(seen[1:]) > 0  # at the first step the left factor is zero


def test_modules_of_rank_zero_are_written_and_load(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    found, done = run(llama, tokenizer, tmp_path, rank=1, start_rank=4, rate=5e-2)
    assert min(done.ranks.values()) == 0
    (tmp_path / "adapter").mkdir()
    chosen = tuning.settings(tmp_path / "rows.jsonl", method="adalora", rank=1)
    tune.write_adapter(tmp_path / "adapter", found, "tiny", chosen)
    ids = tiny.tokens()
    again = adapters.load(llama, tmp_path / "adapter")
    assert adapters.differ(tuning.logits(again, ids), tuning.logits(found.model, ids)) < 1e-5
    kept = sum(rank > 0 for rank in done.ranks.values())
    assert len(again.base_model.targeted_module_names) == kept


def test_the_regulariser_keeps_factors_orthogonal(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    found, _ = run(llama, tokenizer, tmp_path, micro=8)
    gap = float(Allocation(found.model).orthogonality().detach())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attach, "_ORTHOGONALITY", 0.0)
        (tmp_path / "free").mkdir()
        free, _ = run(llama, tokenizer, tmp_path / "free", micro=8)
    assert gap < 0.9 * float(Allocation(free.model).orthogonality().detach())


def test_micro_batches_make_no_difference_to_it(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The regulariser is added by each backward pass: together they must add it once."""
    found = []
    for micro in (8, 2):
        folder = tmp_path / str(micro)
        folder.mkdir()
        # Steps before allocation begins, which rounding could decide the other way.
        made, done = run(llama, tokenizer, folder, micro=micro, rate=1e-3)
        assert dict(done.trajectory[0][1]) == dict.fromkeys(done.ranks, 3)
        found.append((tuning.trained(made.model), dict(done.learned)))
    # After the first step the loss has seen one update.
    assert found[0][1][2] == pytest.approx(found[1][1][2], rel=1e-4)
    assert found[0][1][3] == pytest.approx(found[1][1][3], rel=1e-4)
