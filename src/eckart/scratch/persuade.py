"""The callback that adds a penalty's gradient in Trainer, and keeps account of the spectra."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import models, stores
from ..errors import ConfigError
from ..factors import FactoredLinear, PivotedLinear
from ..quant.corrected import CorrectedLinear
from .decline import Decline, Matrix, target_rank
from .penalties import (
    Nuclear,
    Orthogonality,
    Penalty,
    StableRank,
    Tail,
    polar_by_newton_schulz,
    polar_by_svd,
)
from .persuasion import Persuasion

_STATE = "penalty.json"
_POLAR = {"svd": polar_by_svd, "newton-schulz": polar_by_newton_schulz}


def matrices(model: Any, persuasion: Persuasion) -> dict[str, Matrix]:
    """Return what is penalised, by name: plain linears and factored ones inside the blocks, or `include`.

    Raises:
        ConfigError: weights are stored in few bits, a matrix has another form, or there is none.
        ModelError: a pattern matches nothing.
    """
    _refuse_stored(model)
    low_rank = models.low_rank_modules(model)
    inner = {
        f"{name}.{part}" for name, module in low_rank.items() for part, _ in module.named_modules() if part
    }
    legal = {
        name: module
        for name, module in model.named_modules()
        if name in low_rank or (isinstance(module, nn.Linear) and name not in inner)
    }
    names = list(legal)
    models.check_patterns(names, [*persuasion.include, *persuasion.exclude])
    if persuasion.include:
        chosen = [name for name in names if models.match_one(name, persuasion.include) is not None]
    else:
        blocks = models.block_names(model)
        chosen = [name for name in names if models.owner(name, blocks)]
    chosen = [name for name in chosen if models.match_one(name, persuasion.exclude) is None]
    for name in chosen:
        if name in low_rank and not isinstance(legal[name], FactoredLinear | PivotedLinear):
            raise _refusal(name, legal[name])
    if not chosen:
        raise ConfigError("no matrix left to penalise: exclude removes all of them")
    return {name: legal[name] for name in chosen}


def _refusal(name: str, module: nn.Module) -> ConfigError:
    return ConfigError(
        f"{name} is a {type(module).__name__}: penalties are for dense matrices and for two factors; leave "
        "it out (exclude)"
    )


def _refuse_stored(model: nn.Module) -> None:
    """Refuse weights that are not numbers to add a gradient to, whoever quantised them."""
    found = list(stores.stored(model))
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        whole = isinstance(weight, Tensor) and not weight.is_floating_point()
        if isinstance(module, CorrectedLinear) or whole:
            found.append(name)
    if found:
        raise ConfigError(
            f"{found[0]} and {len(found) - 1} more are stored in few bits: a penalty pulls at float weights; "
            "eckart.densify the model first, train it, and quantise it afterwards"
        )


class Persuade(TrainerCallback):  # type: ignore[misc]
    """Adds strength x gradient of a penalty to the gradients, after clipping and before the optimizer's step.

    For Trainer with any optimizer. The gradient is computed from the weights alone, once per step however
    many backward passes it has, and is the same in every process.

    Args:
        persuasion: which penalty, how strong, when.

    `decline` holds the spectra of the matrices: at the start, at every evaluation, and at the end.
    """

    def __init__(self, persuasion: Persuasion) -> None:
        self.persuasion = persuasion
        self.decline = Decline(persuasion.keep)
        self._anchors: dict[str, tuple[Tensor, ...]] = {}
        self._found: dict[str, Matrix] = {}
        self._model: Any = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the model: what cannot be penalised is refused before anything is trained.

        Raises:
            ConfigError, ModelError: as `matrices`; also where the penalty is not for what the model has, or
                gradients would be scaled.
        """
        self._model = model
        found = matrices(model, self.persuasion)
        if args.fp16 and not args.max_grad_norm:
            raise ConfigError(
                "fp16 without clipping leaves gradients scaled when the penalty is added: set max_grad_norm, "
                "or train in bfloat16"
            )
        pulls = [self._penalty(name, module) for name, module in found.items()]
        if not any(pulls):
            raise ConfigError(
                f"keep {self.persuasion.keep}: no matrix has a higher rank than that leaves; lower it"
            )
        for module, penalty in zip(found.values(), pulls, strict=True):
            if penalty is not None and isinstance(module, nn.Linear):
                penalty.anchor(module.weight.detach())
                break

    def _penalty(self, name: str, module: Matrix) -> Penalty | None:
        """Return the penalty on `module`, None where its rank is at the target already."""
        if isinstance(module, PivotedLinear):
            raise _refusal(name, module)
        kind = self.persuasion.kind
        if kind == "tail":
            rank = target_rank((module.out_features, module.in_features), self.persuasion.keep)
            have = module.rank if isinstance(module, FactoredLinear) else min(module.weight.shape)
            return None if rank is None or rank >= have else Tail(rank)
        if kind == "nuclear":
            return Nuclear(_POLAR[self.persuasion.polar])
        return StableRank() if kind == "stable-rank" else Orthogonality()

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the gradient."""
        strength = self.persuasion.at(state.global_step, state.max_steps)
        if strength == 0:
            return
        for name, module in self._matrices().items():
            penalty = self._penalty(name, module)
            if penalty is None:
                continue
            weights: tuple[Tensor, ...]
            if isinstance(module, FactoredLinear):
                weights = (module.up.weight, module.down.weight)
                slopes = penalty.on_factors(*(weight.detach() for weight in weights)).gradients
            else:
                weights = (module.weight,)
                assert isinstance(module, nn.Linear)
                slopes = penalty.on_matrix(
                    module.weight, self._anchor(name, module, penalty, state)
                ).gradients
            for weight, slope in zip(weights, slopes, strict=True):
                if weight.requires_grad:
                    pull = strength * slope
                    weight.grad = pull if weight.grad is None else weight.grad.add_(pull)

    def _anchor(
        self, name: str, module: nn.Linear, penalty: Penalty, state: TrainerState
    ) -> tuple[Tensor, ...]:
        """Return the decomposition, a new one every `every` steps, counted from the start of the run."""
        if name not in self._anchors or state.global_step % self.persuasion.every == 0:
            self._anchors[name] = penalty.anchor(module.weight)
        return self._anchors[name]

    def _matrices(self) -> dict[str, Matrix]:
        """Return what is penalised, found anew where the model has changed."""
        same = all(self._model.get_submodule(name) is module for name, module in self._found.items())
        if not (self._found and same):
            self._found, self._anchors = matrices(self._model, self.persuasion), {}
        return self._found

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the spectra, unless the run goes on."""
        if not self.decline.steps:
            self.decline.note(state.global_step, self._matrices())

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *rest: Any, **kwargs: Any
    ) -> None:
        """Note the spectra."""
        self.decline.note(state.global_step, self._matrices())

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with fresh decompositions, as a run does that goes on from here: both come to the same."""
        self._anchors = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the spectra of the state that is kept."""
        self.decline.note(state.global_step, self._matrices())

    @property
    def settled(self) -> int:
        """No state is better for being later."""
        return 0

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what was noted."""
        (folder / _STATE).write_text(json.dumps(self.decline.to_dict()), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take up what was noted before, where nothing has been yet."""
        if not self.decline.steps:
            self.decline.take(json.loads((folder / _STATE).read_text(encoding="utf-8")))
