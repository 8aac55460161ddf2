"""Full-rank warm-up: matrices become low-rank at a step inside Trainer, and the optimizer goes on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import models
from ..construct import check_number
from ..embeddings import FactoredEmbedding
from ..errors import ConfigError
from ..factors import FactoredLinear, PivotedLinear
from . import preset
from .preset import Structure

_STATE, _TENSORS = "switch.json", "switch.safetensors"
_LINEAR = ("exp_avg", "momentum_buffer")
"""States that are averages of gradients."""
_SQUARED = ("exp_avg_sq", "max_exp_avg_sq")
"""States that are averages of squared gradients."""


@dataclass(frozen=True, slots=True)
class Switched:
    """What a switch did with the optimizer: names of parameters.

    Args:
        kept: whose state is untouched.
        projected: new ones whose state was made of that of the matrix that they stand for.
        begun: new ones that begin without a state, since the optimizer keeps something else than moments.
    """

    kept: tuple[str, ...]
    projected: tuple[str, ...]
    begun: tuple[str, ...]


def pulled(
    module: nn.Module, moment: Tensor, bias: Tensor | None, squared: bool = False
) -> dict[str, Tensor]:
    """Return what `moment`, a gradient of the map of `module`, is as a gradient of its parameters, by name.

    The chain rule at the present factors: moment @ R^T for L, L^T @ moment for R. It is linear, so for an
    average of gradients it is the average that the factors would have had. With `squared` the entries of the
    factors are squared: for an average of squared gradients, what it would have been if entries of the
    gradient were uncorrelated.

    Args:
        module: what the matrix has become.
        moment: in the shape of the matrix.
        bias: likewise for its bias, or None.
        squared: whether moments are of second order.
    """
    at: Callable[[Tensor], Tensor] = torch.square if squared else lambda value: value
    if isinstance(module, FactoredLinear):
        left, right = at(module.up.weight.detach()), at(module.down.weight.detach())
        found = {"down.weight": left.T @ moment, "up.weight": moment @ right.T}
        return found if bias is None else {**found, "up.bias": bias}
    if isinstance(module, FactoredEmbedding):
        codes, up = at(module.codes.weight.detach()), at(module.up.weight.detach())
        return {"codes.weight": moment @ up, "up.weight": moment.T @ codes}
    assert isinstance(module, PivotedLinear)
    places = torch.argsort(module.order.to(torch.int64))
    first, second = places[: module.rank], places[module.rank :]
    if module.rest is None:
        own = {"pivot.weight": moment[first]}
        return own if bias is None else {**own, "pivot.bias": bias[first]}
    carried, rows = at(module.rest.weight.detach()), at(module.pivot.weight.detach())
    found = {
        "pivot.weight": moment[first] + carried.T @ moment[second],
        "rest.weight": moment[second] @ rows.T,
    }
    if bias is None:
        return found
    # The bias of the rest is what carried pivots leave of the map's bias.
    found["rest.weight"] += torch.outer(bias[second], at(_bias(module)))
    return {**found, "pivot.bias": bias[first] + carried.T @ bias[second], "rest.bias": bias[second]}


def _bias(module: PivotedLinear) -> Tensor:
    assert module.pivot.bias is not None
    return module.pivot.bias.detach()


def switch(model: Any, optimizer: Any, structure: Structure) -> Switched:
    """Make the matrices of `model` low-rank by their SVD, in place; `optimizer` goes on with the factors.

    Factors take the place of their matrix in its parameter group. States of all other parameters stay;
    those of a matrix are projected (`pulled`), first moments exactly, second ones as if entries of gradients
    were uncorrelated. Counts of steps are kept.

    Raises:
        RankError, ModelError: as eckart.scratch.preset.ranks.
    """
    before = dict(model.named_parameters())
    modules = dict(model.named_modules())
    preset.factorize(model, structure)
    after = dict(model.named_parameters())
    known = {id(value) for value in before.values()}
    heirs: dict[str, list[str]] = {}
    for name, value in after.items():
        if id(value) not in known:
            heirs.setdefault(preset.innermost(name, modules), []).append(name)
    projected: list[str] = []
    for owner, names in heirs.items():
        projected += _hand_over(model, optimizer, owner, names, before)
    new = {name for names in heirs.values() for name in names}
    kept = tuple(name for name, value in after.items() if name not in new and value in optimizer.state)
    return Switched(kept, tuple(projected), tuple(sorted(new - set(projected))))


@torch.no_grad()
def _hand_over(
    model: Any, optimizer: Any, owner: str, names: list[str], before: Mapping[str, nn.Parameter]
) -> list[str]:
    """Give the parameters `names` the places, and if possible the states, of those that `owner` had."""
    after = dict(model.named_parameters())
    old = {part: before.get(f"{owner}.{part}") for part in ("weight", "bias")}
    for part, value in old.items():
        if value is not None:
            own = [after[name] for name in names if name.endswith(part)]
            for group in optimizer.param_groups:
                group["params"] = [new for one in group["params"] for new in (own if one is value else [one])]
    weight, bias = (None if value is None else optimizer.state.pop(value, None) for value in old.values())
    module = model.get_submodule(owner)
    found = _projected(module, weight, bias, old["weight"]) if weight else None
    if found is None:
        # A head that is tied to the embeddings has nothing of its own but a bias.
        found = {} if bias is None or weight else {"codes.bias": bias}
    for part, state in found.items():
        optimizer.state[after[f"{owner}.{part}"]] = state
    return [f"{owner}.{part}" for part in found]


def _projected(
    module: nn.Module, weight: Mapping[str, Any], bias: Mapping[str, Any] | None, shape: Tensor | None
) -> dict[str, dict[str, Any]] | None:
    """Return the states of the parameters of `module`, None if the optimizer keeps something unknown."""
    assert shape is not None
    made: dict[str, dict[str, Any]] = {}
    parts: dict[str, Tensor] = {}
    counts: dict[str, Any] = {}
    for key, value in weight.items():
        moment = isinstance(value, Tensor) and value.shape == shape.shape and value.ndim == 2
        if moment and key in (*_LINEAR, *_SQUARED):
            other = None if bias is None else bias[key]
            parts = pulled(module, value, other, key in _SQUARED)
            for name, found in parts.items():
                made.setdefault(name, {})[key] = found.contiguous()
        elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
            counts[key] = value
        else:
            return None
    for state in made.values():
        state |= {key: value.clone() if isinstance(value, Tensor) else value for key, value in counts.items()}
    return made or None


class Switch(TrainerCallback):  # type: ignore[misc]
    """Makes the model low-rank after step `at`, inside Trainer.

    Full-rank warm-up, then factors for the rest of the run (Pufferfish: Wang et al. 2021, arXiv:2103.03936).

    Args:
        structure: which matrices, and how much of them remains.
        at: the number of steps at full rank, at least one.

    `done` says afterwards what became of the optimizer's states. A checkpoint from before is resumed as it
    is; for one from after it, load the model from the checkpoint (it is low-rank there) and leave the switch
    out.

    Raises:
        ConfigError: `at` is not a whole number of at least 1.
    """

    def __init__(self, structure: Structure, at: int) -> None:
        check_number("dense_steps", at, int, 1)
        self.structure, self.at = structure, at
        self.model: Any = None
        self.done: Switched | None = None

    @property
    def settled(self) -> int:
        """The step from which on the structure stays as it is."""
        return self.at

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the model: what cannot be done is refused before anything is trained.

        Raises:
            ConfigError: more than one process.
            RankError, ModelError: as eckart.scratch.preset.ranks.
        """
        if args.world_size > 1:
            raise ConfigError(
                f"dense_steps on {args.world_size} processes: the parameters change in the middle, which "
                "data-parallel training cannot follow; use one process, or factors from the first step"
            )
        self.model = model
        preset.ranks(model, self.structure)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a run that ends before the switch.

        Raises:
            ConfigError: with what to do.
        """
        if self.at >= state.max_steps:
            raise ConfigError(
                f"dense_steps {self.at} of {state.max_steps} steps: nothing would be low-rank; give fewer"
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Switch when it is time."""
        if state.global_step == self.at:
            self.done = switch(self.model, optimizer, self.structure)

    def save(self, folder: Path) -> None:
        """Write into a checkpoint whether it is from after the switch, and which rows are pivots."""
        orders = {
            name: module.order
            for name, module in self.model.named_modules()
            if isinstance(module, PivotedLinear)
        }
        switched = bool(models.low_rank_modules(self.model))
        save_file(orders, folder / _TENSORS)
        (folder / _STATE).write_text(json.dumps({"switched": switched}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Give the model the structure that it has in a checkpoint; the weights come after."""
        if not json.loads((folder / _STATE).read_text(encoding="utf-8"))["switched"]:
            return
        if not models.low_rank_modules(self.model):
            preset.factorize(self.model, self.structure)
        for name, order in load_file(folder / _TENSORS).items():
            self.model.get_submodule(name).order.copy_(order)
