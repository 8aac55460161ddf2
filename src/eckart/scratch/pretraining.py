"""How a model is trained from scratch: the settings, as one frozen value."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..adapt.tuning import Optimizer, Tuning
from ..construct import check_number, construct
from ..errors import ConfigError
from ..factors import Form
from ..healing import Precision
from ..overrides import Override, listed
from ..recipe import Of
from . import persuasion
from .persuasion import Persuasion
from .preset import Structure
from .tokens import BYTES

_LISTS = ("data", "eval_data", "include", "exclude", "overrides")
_TUNING = (
    "data", "eval_data", "hold", "columns", "epochs", "steps", "rate", "warmup", "weight_decay", "clip",
    "batch", "micro", "seq_len", "eval_limit", "evaluations", "patience", "checkpointing", "tight",
    "precision", "seed", "penalty", "optimizer", "optimizer_args",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pretraining:
    """What is built, and how it is trained.

    Args:
        data, eval_data, hold, columns, epochs, steps, rate, warmup, weight_decay, clip, batch, micro,
        seq_len, eval_limit, evaluations, patience, checkpointing, tight, precision, seed, penalty,
        optimizer, optimizer_args: as in eckart.adapt.tuning.Tuning; the seed is that of the start, too.
        keep, rank, of, form, include, exclude, overrides, multiple: as in eckart.scratch.preset.Structure;
            without keep and rank the model has full rank.
        dense_steps: train at full rank for so many steps first, a penalty only in these; default: none, the
            model is low-rank from the first step.
        frobenius: decay of the product that factors stand for, in place of `weight_decay` on them; default:
            as strong as that.
        tokenizer: a folder or hub id; default: that of the model.
        vocabulary: train a tokenizer of so many tokens on the data instead (257: one per byte).
        dtype: of the output.

    Raises:
        ConfigError: a value is not legal.
    """

    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    hold: float = 0.05
    columns: Mapping[str, str] | None = None
    keep: float | None = None
    rank: int | None = None
    of: Of = "model"
    form: Form = "factored"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    multiple: int | None = None
    dense_steps: int | None = None
    frobenius: float | None = None
    penalty: Persuasion | None = None
    tokenizer: str | None = None
    vocabulary: int | None = None
    epochs: float = 1.0
    steps: int | None = None
    rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    batch: int = 16
    micro: int = 8
    seq_len: int = 256
    eval_limit: int = 256
    evaluations: int = 10
    patience: int = 10
    checkpointing: bool = False
    tight: bool = False
    precision: Precision = "auto"
    optimizer: Optimizer = "adamw"
    optimizer_args: str | None = None
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.vocabulary is not None:
            raise ConfigError(
                f"tokenizer {self.tokenizer!r} and vocabulary {self.vocabulary}: one is taken, the other is "
                "trained; give one of them"
            )
        if self.vocabulary is not None:
            check_number("vocabulary", self.vocabulary, int, BYTES)
        if self.frobenius is not None:
            check_number("frobenius", self.frobenius, float, 0.0)
        if self.structure() is None:
            self._check_dense()
        if self.dense_steps is not None:
            check_number("dense_steps", self.dense_steps, int, 1)
        penalty = self.tuning().penalty
        if penalty is not None and self.dense_steps is not None and self.form == "pivoted":
            check_number("penalty: until", penalty.until, int, 1, most=self.dense_steps)

    def _check_dense(self) -> None:
        """Refuse what says something about low rank where there is none."""
        for name in ("dense_steps", "frobenius", "multiple", "include", "exclude", "overrides"):
            if getattr(self, name):
                raise ConfigError(f"{name} {getattr(self, name)!r}: nothing is low-rank; give keep or rank")

    def structure(self) -> Structure | None:
        """Return what becomes low-rank, None for full rank."""
        if self.keep is None and self.rank is None:
            return None
        return Structure(**{field.name: getattr(self, field.name) for field in fields(Structure)})

    def tuning(self) -> Tuning:
        """Return the settings of the run itself; a penalty ends with the steps at full rank."""
        made = Tuning(method="full", **{name: getattr(self, name) for name in _TUNING})
        if made.penalty is None or self.dense_steps is None or made.penalty.until is not None:
            return made
        return replace(made, penalty=replace(made.penalty, until=self.dense_steps))


def from_mapping(values: Mapping[str, Any], where: str = "pretrain") -> Pretraining:
    """Return the settings that `values` describe; lists, and single values for lists, will do.

    Raises:
        ConfigError: an unknown key (with a suggestion) or an illegal value.
    """
    made = listed(values, _LISTS, where)
    if isinstance(made.get("penalty"), Mapping):
        made["penalty"] = persuasion.from_mapping(made["penalty"], f"{where}: penalty")
    settings: Pretraining = construct(Pretraining, made, where)
    return settings
