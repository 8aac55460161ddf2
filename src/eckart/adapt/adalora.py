"""AdaLoRA's ranks, allocated under a plain Trainer: when, from what, and how they moved.

PEFT's allocator must run after the step of the optimizer and before gradients are cleared. Trainer calls
on_optimizer_step there; on_step_end comes too late.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .attach import ADAPTER

_STATE, _TENSORS = "allocation.json", "allocation.safetensors"
_SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class Allocation(TrainerCallback):  # type: ignore[misc]
    """Runs the allocator of an AdaLoRA model, keeps the trajectory of the ranks, and resumes.

    Args:
        model: PEFT's model with an AdaLoRA adapter.

    `trajectory` has a pair of the step and the rank of every module for each time that ranks changed.
    """

    def __init__(self, model: Any) -> None:
        self.tuner = model.base_model
        self.config = model.peft_config[ADAPTER]
        self.trajectory: list[tuple[int, dict[str, int]]] = [(0, self.ranks())]

    @property
    def settled(self) -> int:
        """The step from which on the ranks stay as they are."""
        return int(self.config.total_step - self.config.tfinal)

    def ranks(self) -> dict[str, int]:
        """Return the rank that each module has now."""
        pattern = self.config.rank_pattern
        if not pattern:
            layers = self.tuner.model.named_modules()
            return {name: layer.r[ADAPTER] for name, layer in layers if hasattr(layer, "lora_E")}
        return {name.split(".lora_E")[0]: int(sum(kept)) for name, kept in pattern.items()}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the allocator see the gradients, and mask what it gives up."""
        step = state.global_step + 1
        self.tuner.update_and_allocate(step)
        now = self.ranks()
        if now != self.trajectory[-1][1]:
            self.trajectory.append((step, now))

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs: the allocator's averages, which PEFT's files lack."""
        allocator = self.tuner.rankallocator
        sums = {f"{key}|{name}": value for key in _SUMS for name, value in getattr(allocator, key).items()}
        save_file({name: value.contiguous() for name, value in sums.items()}, folder / _TENSORS)
        state = {"pattern": self.config.rank_pattern, "trajectory": self.trajectory}
        (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote."""
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self.config.rank_pattern = state["pattern"]
        self.trajectory = [(step, dict(ranks)) for step, ranks in state["trajectory"]]
        allocator = self.tuner.rankallocator
        place = next(self.tuner.parameters()).device
        found: dict[str, dict[str, Tensor]] = {key: {} for key in _SUMS}
        for name, value in load_file(folder / _TENSORS).items():
            key, _, parameter = name.partition("|")
            found[key][parameter] = value.to(place)
        for key, values in found.items():
            setattr(allocator, key, values)

    def penalty(self) -> Tensor:
        """Return what one backward pass adds to the loss (Zhang et al. 2023, equation 4).

        PEFT adds it to a loss that the model itself returns, which here it does not.
        """
        weight: float = self.config.orth_reg_weight
        return weight * self.orthogonality()

    def orthogonality(self) -> Tensor:
        """Return the mean of ||P^T P - I|| over the factors, which the regulariser lowers."""
        gaps = []
        for name, factor in self.tuner.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
                gaps.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)))
        return torch.stack(gaps).mean()
