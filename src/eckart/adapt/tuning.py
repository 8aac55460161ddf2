"""How a model is tuned: the settings, as one frozen value."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..construct import check_number, construct
from ..errors import ConfigError
from ..healing import Precision
from ..scratch import persuasion
from ..scratch.persuasion import Persuasion

Method = Literal["lora", "dora", "qlora", "adalora", "full"]
Init = Literal["default", "gaussian", "pissa", "olora", "eva", "corda", "residual", "lqer", "loftq"]
Optimizer = Literal["adamw", "galore_adamw", "galore_adamw_8bit", "galore_adafactor"]
Task = Literal["generation", "classification"]
METHODS: tuple[Method, ...] = ("lora", "dora", "qlora", "adalora", "full")
CORRECTING: tuple[Init, ...] = ("residual", "lqer", "loftq")
"""Initialisations that put into the adapter what quantising took out of the base."""
INITS: tuple[Init, ...] = ("default", "gaussian", "pissa", "olora", "eva", "corda", *CORRECTING)
MUTATING: tuple[Init, ...] = ("pissa", "olora", "corda")
"""Initialisations that take out of the base what they put into the adapter."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "init": INITS,
    "task": ("generation", "classification"),
    "precision": ("auto", "float32", "bfloat16"),
    "optimizer": ("adamw", "galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
}
_RATES: dict[Method, float] = {"lora": 5e-4, "dora": 5e-4, "qlora": 5e-4, "adalora": 2e-3, "full": 3e-5}
_WHOLE = ("batch", "micro", "evaluations", "patience", "eval_limit", "first_batches")
_LISTS = ("data", "eval_data", "targets", "exclude", "labels")
_SWITCHES = ("rslora", "double", "packing", "checkpointing", "tight")
_COLUMNS = ("messages", "prompt", "completion", "text", "label")


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is trained, on what, and how.

    Args:
        method: `lora`, `dora`, `qlora` (LoRA on an NF4 base with double quantisation), `adalora` (ranks
            allocated while it trains) or `full` (all parameters).
        data: sources to learn from (eckart.adapt.examples).
        eval_data: sources to decide on; default: `hold` of `data`.
        task: `generation`, or `classification`, which scores the label words and reports accuracy.
        columns: what the columns messages, prompt, completion, text and label are called in the data, e.g.
            {"prompt": "question"}.
        template: classification: what is made of a text before its label word follows.
        labels: classification: the label words; rows may name them or their index.
        rank: of every adapted matrix; for adalora their mean in the end; `auto`: by the spectra of the
            gradients of the first batches, as many parameters in all as uniform rank `auto_rank`.
        auto_rank: see rank.
        budget: rank auto: parameters instead.
        alpha: numerator of the scale of the update, alpha / rank; default: twice the rank.
        dropout: of the adapter's input.
        rslora: divide alpha by the root of the rank instead.
        init: how the adapter starts: `default` (an update of zero), `gaussian`, `pissa`, `olora`, `eva`,
            `corda` (PEFT's); for qlora the best low-rank part of the quantisation error: `residual`, its
            default, in the metric of the inputs, `lqer` in that of their mean magnitudes, `loftq` in
            Frobenius norm (one step, as in PEFT: further ones change the base).
        targets: globs on module names; default: every linear map inside the blocks.
        exclude: of those.
        start_rank: adalora: rank at the start; default: half as much again as `rank`.
        double: qlora: quantise the quantisation constants, too.
        epochs: passes over the data, or
        steps: optimizer steps.
        rate: AdamW's rate after warm-up, it falls to 0 in a line; default by method: 5e-4, adalora 2e-3,
            full 3e-5.
        warmup: the share of the steps before it.
        weight_decay: AdamW's.
        clip: the largest norm of a gradient.
        batch: examples a step, over all devices ...
        micro: ... and those that one device takes at a time.
        seq_len: tokens of an example at most; what is longer is cut.
        packing: several examples in one row, which do not see each other.
        hold: the share of the data that is held out where `eval_data` is not given, at least one example of
            each source.
        eval_limit: examples of it that are used.
        evaluations: on held-out data, evenly over the run.
        patience: stop after so many of them in a row without a new best.
        first_batches: batches that initialisation and rank auto look at.
        checkpointing: recompute activations on the way back.
        tight: on a CPU under Linux, give freed memory back at once: the peak is what was estimated and not
            half as much again, and a step takes about a quarter longer. It holds for the whole process.
        precision: to train in; `auto` is bfloat16 where the device multiplies it in hardware.
        paged: qlora: AdamW's moments in memory that pages out, on cuda; None: where there is one.
        seed: of everything that is drawn.
        penalty: full: what is added to the loss so that matrices come near to low rank.
        optimizer: `adamw`, or, for full, a GaLore of transformers (package galore-torch), which keeps the
            moments of the matrices in the blocks in a subspace; it has no weight decay.
        optimizer_args: of GaLore, e.g. "rank=128,update_proj_gap=200,scale=0.25", which are its defaults.

    Raises:
        ConfigError: a value is not legal.
    """

    method: Method = "lora"
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    task: Task = "generation"
    columns: Mapping[str, str] | None = None
    template: str = "{text}\nLabel:"
    labels: tuple[str, ...] = ()
    rank: int | Literal["auto"] = 8
    auto_rank: int = 8
    budget: int | None = None
    alpha: float | None = None
    dropout: float = 0.05
    rslora: bool = False
    init: Init | None = None
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    start_rank: int | None = None
    double: bool = True
    epochs: float = 1.0
    steps: int | None = None
    rate: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    batch: int = 16
    micro: int = 8
    seq_len: int = 512
    packing: bool = False
    hold: float = 0.05
    eval_limit: int = 512
    evaluations: int = 10
    patience: int = 3
    first_batches: int = 8
    checkpointing: bool = False
    tight: bool = True
    precision: Precision = "auto"
    paged: bool | None = None
    seed: int = 0
    penalty: Persuasion | None = None
    optimizer: Optimizer = "adamw"
    optimizer_args: str | None = None

    def __post_init__(self) -> None:
        for name, legal in _CHOICES.items():
            value = getattr(self, name)
            if value not in legal and not (name == "init" and value is None):
                raise ConfigError(f"{name} {value!r}: legal are {', '.join(legal)}")
        for name in (*_WHOLE, "auto_rank"):
            check_number(name, getattr(self, name), int, 1)
        for name in ("budget", "steps", "start_rank"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), int, 1)
        if isinstance(self.rank, str) and self.rank != "auto":
            raise ConfigError(f"rank {self.rank!r}: must be a whole number of at least 1, or 'auto'")
        if self.rank != "auto":
            check_number("rank", self.rank, int, 1)
        check_number("seq_len", self.seq_len, int, 2)
        check_number("seed", self.seed, int, 0)
        check_number("clip", self.clip, float, 0.0, above=True)
        for name in ("epochs", "alpha", "rate"):
            if name == "epochs" or getattr(self, name) is not None:
                check_number(name, getattr(self, name), float, 0.0, most=sys.float_info.max, above=True)
        for name in ("dropout", "warmup", "hold"):
            check_number(name, getattr(self, name), float, 0.0, most=1.0)
        check_number("weight_decay", self.weight_decay, float, 0.0)
        self._check_kinds()
        self._check_together()

    def _check_kinds(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} {getattr(self, name)!r}: must be true or false")
        for name in _LISTS:
            found = getattr(self, name)
            if isinstance(found, str) or not all(isinstance(one, str) for one in found):
                raise ConfigError(f"{name} {found!r}: must be a tuple of strings")
        for name in self.columns or {}:
            if name not in _COLUMNS:
                raise ConfigError(f"columns: unknown column {name!r}: legal are {', '.join(_COLUMNS)}")
        if self.dropout == 1:
            raise ConfigError("dropout 1: must be below 1, or nothing is learned")

    def _check_together(self) -> None:
        if self.batch % self.micro:
            raise ConfigError(f"batch {self.batch}: must be a multiple of micro = {self.micro}")
        if self.init in CORRECTING and self.method != "qlora":
            raise ConfigError(
                f"init {self.init!r} is for method qlora, which quantises, not for {self.method}"
            )
        if self.init not in (None, "default", "gaussian") and self.method in ("full", "adalora", "dora"):
            raise ConfigError(f"init {self.init!r} is for methods lora and qlora, not for {self.method}")
        if self.init in ("corda", "eva") and self.method == "qlora":
            raise ConfigError(f"init {self.init!r} is for method lora: PEFT has it for float bases alone")
        if self.rank == "auto" and self.method in ("adalora", "full"):
            raise ConfigError(f"rank 'auto' is for methods lora, dora and qlora, not for {self.method}")
        if self.rank == "auto" and self.init == "eva":
            raise ConfigError("init 'eva' chooses the ranks itself: give it a rank")
        if self.rank != "auto" and self.budget is not None:
            raise ConfigError(f"budget is for rank 'auto', not for rank {self.rank}")
        if self.start_rank is not None and self.method != "adalora":
            raise ConfigError(f"start_rank is for method adalora, not for {self.method}")
        if self.start_rank is not None and isinstance(self.rank, int) and self.start_rank < self.rank:
            raise ConfigError(f"start_rank {self.start_rank}: must be at least rank = {self.rank}")
        if self.penalty is not None and self.method != "full":
            raise ConfigError(
                f"a penalty pulls at the matrices of the model, which method {self.method} leaves as they "
                "are: use method full"
            )
        if self.optimizer != "adamw" and self.method != "full":
            raise ConfigError(f"optimizer {self.optimizer!r} is for method full, not for {self.method}")
        if self.optimizer_args is not None and self.optimizer == "adamw":
            raise ConfigError(f"optimizer_args {self.optimizer_args!r}: they are for the GaLore optimizers")
        if self.task != "classification" and self.labels:
            raise ConfigError(f"labels are for task classification, not for {self.task}")
        if self.task == "classification" and "{text}" not in self.template:
            raise ConfigError(f"template {self.template!r}: must contain {{text}}")
        if self.task == "classification" and self.packing:
            raise ConfigError("packing is for generation: a label is scored after its own text")

    @property
    def rank_at_start(self) -> int:
        """The rank that adapters have before anything is allocated."""
        rank = self.auto_rank if self.rank == "auto" else self.rank
        return self.start_rank or math.ceil(1.5 * rank) if self.method == "adalora" else rank

    @property
    def starting(self) -> Init:
        """How the adapter starts."""
        return self.init or ("residual" if self.method == "qlora" else "default")

    @property
    def starting_rate(self) -> float:
        """AdamW's rate after warm-up."""
        return self.rate or _RATES[self.method]

    def total_steps(self, examples: int) -> int:
        """Return the optimizer steps for so many examples, at least one."""
        return self.steps or max(1, math.ceil(self.epochs * examples / self.batch))


def from_mapping(values: Mapping[str, Any], where: str = "tune") -> Tuning:
    """Return the settings that `values` describe; lists, and single values for lists, will do.

    Raises:
        ConfigError: an unknown key (with a suggestion) or an illegal value.
    """
    made = dict(values)
    for name in _LISTS:
        if name in made:
            found = made[name]
            made[name] = tuple(map(str, found)) if isinstance(found, (list, tuple)) else (str(found),)
    if isinstance(made.get("penalty"), Mapping):
        made["penalty"] = persuasion.from_mapping(made["penalty"], f"{where}: penalty")
    settings: Tuning = construct(Tuning, made, where)
    return settings
