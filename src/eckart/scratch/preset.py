"""Models whose matrices are low-rank from the first step: what is chosen, built, and refused."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from .. import api, hub, models, planning
from ..construct import construct
from ..errors import ConfigError, ModelError, RankError
from ..factors import FORMS, Form, break_even
from ..overrides import Override, listed
from ..recipe import Of, Recipe, from_mapping

METHOD = "svd"
_LISTS = ("include", "exclude", "overrides")


@dataclass(frozen=True, slots=True)
class Structure:
    """Which matrices are low-rank, and how much of them remains.

    Args:
        keep: what remains of the parameters, in (0, 1], or
        rank: the same rank for every matrix.
        of: whether keep counts the whole `model` or its `linears` (the matrices that are treated).
        form: `factored` (two factors) or `pivoted`, which has fewer parameters at a rank.
        include: globs on module names to treat; default: every linear map in the blocks.
        exclude: of those, what stays full rank.
        overrides: rules for single modules.
        multiple: ranks are multiples of this.

    Raises:
        ConfigError: a value is not legal, or both or none of keep and rank are given.
    """

    keep: float | None = None
    rank: int | None = None
    of: Of = "model"
    form: Form = "factored"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    multiple: int | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"form {self.form!r}: a preset is one of {', '.join(FORMS)}")
        if (self.keep is None) == (self.rank is None):
            raise ConfigError(f"keep {self.keep} and rank {self.rank}: give exactly one of them")
        self.recipe()

    def recipe(self) -> Recipe:
        """Return the recipe of the compression that this is: by plain SVD, without any text."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return from_mapping({"method": METHOD, **given}, "structure")


def from_settings(values: Mapping[str, Any], where: str = "structure") -> Structure:
    """Return the structure that `values` describe; lists, and single values for lists, will do.

    Raises:
        ConfigError: an unknown key (with a suggestion) or an illegal value.
    """
    structure: Structure = construct(Structure, listed(values, _LISTS, where), where)
    return structure


def ranks(model: nn.Module, structure: Structure) -> dict[str, int]:
    """Return the rank of every matrix of `model` that becomes low-rank, by name; weights are not looked at.

    Raises:
        RankError: the budget cannot be reached, or a rank is above break-even: two factors of that rank have
            no fewer parameters than the matrix. The pivoted form has no such rank, and full rank is dense.
        ModelError: nothing to treat, or a pattern matches nothing.
    """
    plan = planning.plan(structure.recipe(), model, torch.float32)
    rules = [override.match for override in structure.overrides]
    for choice in plan.choices:
        place = models.match_one(choice.target.name, rules)
        rank = structure.rank if place is None else structure.overrides[place].rank
        form = choice.target.form(structure.form)
        if rank is not None and form is not None:
            _check_break_even(choice.target.name, choice.target.shape, form, rank)
    return {choice.target.name: choice.rank for choice in plan.choices if choice.form != "dense"}


def _check_break_even(name: str, shape: tuple[int, int], form: Form, rank: int) -> None:
    """Refuse factors that are no smaller than the matrix; pivoted, every rank below full is smaller."""
    most = break_even(form, shape)
    if form == "factored" and rank > most:
        raise RankError(
            f"rank {rank} of {name} ({shape[0]} x {shape[1]}) is above break-even: two factors of it have no "
            f"fewer parameters than the matrix; lower it to {most} at most, use form pivoted, or leave the "
            "matrix at full rank (exclude)"
        )


def factorize(model: Any, structure: Structure) -> Any:
    """Make the matrices of `model` low-rank, in place, by the SVD of what they are.

    Factors are balanced, L^T L = R R^T. This is compression by method svd: before any training it is
    spectral initialisation (Khodak et al. 2021), after it a warm start. Nothing else changes, neither
    the mode of the modules nor which parameters learn.

    Raises:
        RankError, ModelError: as `ranks`.
    """
    found = ranks(model, structure)
    if not found:
        return model
    modes = {name: module.training for name, module in model.named_modules()}
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    made, _ = api.compress(model, recipe=structure.recipe())
    for name, module in made.named_modules():
        module.training = modes[innermost(name, modes)]
    for name, value in made.named_parameters():
        part = "bias" if name.endswith("bias") else "weight"
        value.requires_grad_(name not in frozen and f"{innermost(name, modes)}.{part}" not in frozen)
    return made


def innermost(name: str, modules: Mapping[str, Any]) -> str:
    """Return the innermost of `modules` that `name` is, or is inside of."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def from_config(
    config: PretrainedConfig | str | Path,
    *,
    keep: float | None = None,
    rank: int | None = None,
    of: Of = "model",
    form: Form = "factored",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    multiple: int | None = None,
    seed: int | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Any:
    """Build a model with random weights whose matrices are low-rank from the first step.

        model = eckart.from_config(LlamaConfig(...), keep=0.5)

    Each matrix is initialised as its architecture does, and replaced by its best approximation of the rank
    that `keep` allows, in balanced factors. The model trains in Trainer, saves and loads like any other.

    Args:
        config: of transformers, or a hub id or folder that has one; it is not changed.
        keep, rank, of, form, include, exclude, overrides, multiple: as in eckart.scratch.preset.Structure.
        seed: of the initialisation; default: torch's generator goes on.
        dtype: of the parameters.
        trust_remote_code: run the code that the config brings along.

    Raises:
        ConfigError: a value is not legal, or not exactly one of keep and rank is given.
        RankError: the budget cannot be reached, or a rank is above break-even.
        ModelError: there is no such config, or nothing in the model can be treated.
    """
    structure = Structure(keep, rank, of, form, tuple(include), tuple(exclude), tuple(overrides), multiple)
    return factorize(build(config, seed=seed, dtype=dtype, trust_remote_code=trust_remote_code), structure)


def build(
    config: Any, *, seed: int | None = None, dtype: str = "float32", trust_remote_code: bool = False
) -> Any:
    """Build a causal language model with random weights, in training mode, as its architecture has it.

    Raises:
        ModelError: there is no such config, it is of a compressed model, or of another kind.
    """
    kind = hub.dtype(dtype)
    if isinstance(config, (str, Path)):
        config = hub.load_config(str(config), trust_remote_code=trust_remote_code)
    if not isinstance(config, PretrainedConfig):
        raise ModelError(
            f"got a {type(config).__name__}: give a config of transformers, a folder or a hub id"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("the config is of a compressed model: give the config of the dense one")
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=trust_remote_code)
    return model.train()
