"""The recipe: everything that decides a compression, as one frozen value and as strict YAML."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import yaml

from . import healing, methods
from .construct import construct, parse_percent, parse_size
from .errors import ConfigError
from .healing import Healing
from .latency import OBJECTIVES, Objective, check_recipe, resolved
from .method_checks import check_method
from .methods import ALLOCATIONS, SHAPES, Allocation, Method, Shape
from .overrides import Override, check_number, listed, rank_rule
from .quant import correction
from .quant.storage import STORAGES
from .ranks import Energy, Fixed, Keep
from .stats import Statistic
from .width import LANDMARKS, Landmarks

Of = Literal["model", "linears"]
Labels = Literal["text", "sampled"]
Split = Literal["none", "fused"]
AUTO, FLOAT = "auto", "float"
"""Storages that are none: chosen per matrix, and the output dtype."""
_STOCK_MULTIPLE = 32
_CORRECTION_RANK, _CORRECTION_STORAGE = 16, "int8"
_BUDGETS = ("keep", "size", "rank", "energy", "latency", "max_ppl_increase")
_LISTS = ("data", "eval_data", "text", "eval_text", "foreign_text", "include", "exclude", "overrides")
_CHOICES: dict[str, tuple[str, ...]] = {
    "objective": OBJECTIVES,
    "of": ("model", "linears"),
    "labels": ("text", "sampled"),
    "form": SHAPES,
    "landmarks": LANDMARKS,
    "split": ("none", "fused"),
    "allocation": ALLOCATIONS,
    "method": tuple(methods.METHODS),
    "dtype": ("float32", "bfloat16", "float16"),
    "storage": (AUTO, FLOAT, *STORAGES),
    "embeddings": (AUTO, FLOAT, *STORAGES),
    "correction": tuple(correction.METHODS),
    "correction_storage": (FLOAT, *STORAGES),
}
_SWITCHES = ("stock", "depth", "share_inputs", "bos", "trust_remote_code")
_NUMBERS = ("keep", "energy", "damp", "alpha")
_AT_LEAST = {
    "multiple": 1,
    "layers": 2,
    "tokens": 2,
    "gradient_tokens": 2,
    "seq_len": 2,
    "eval_tokens": 2,
    "rank": 1,
    "correction_rank": 1,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to do to which model; the same words as on the command line.

    Args:
        model: hub id, folder or .gguf file.
        keep: what remains of the parameters divided by what was, in (0, 1], ...
        of: ... counted over the whole `model` or over the treated `linears`.
        size: bytes of the weight files instead, a number or a text such as "200MB" (10^6).
        rank: the same rank for every matrix instead.
        energy: the share of every (weighted) squared spectrum to hold instead.
        latency: the time of the treated maps instead: a share of the dense ones' (0.6), or per token (12ms).
        objective: what the budget is spent in (docs/latency.md): `size`, `latency`, or `balanced`: size, with
            nothing slower than dense. Default: latency where that is the budget, else size.
        workload: of times: `decode`, the default, is one token, a number so many tokens at once.
        times: the JSON file of the table of times; what it lacks is measured and put into it.
        max_ppl_increase: instead the smallest keep whose measured perplexity is above the dense model's by at
            most this percentage, such as "3%".
        method: a preset of eckart.methods.METHODS ...
        allocation: ... whose allocation ...
        form: ... and form may be changed.
        stock: by width alone and the same in every layer, so that the result is an ordinary model of the
            same architecture, which needs no eckart.
        depth: whole blocks may be left out.
        share_inputs: matrices that read the same input may have a common right factor, where that costs less.
        landmarks: how the units to keep of a hidden dimension are chosen; default: the method's.
        split: `fused`: projections that are one matrix for queries, keys and values, or for gate and up,
            are treated part by part, with a rank for each (`qkv_proj.v_rows`); `none`: as they are.
        layers: how many consecutive blocks share a basis (form shared).
        task: what to load it for (eckart.tasks.TASKS); auto: what it was stored for.
        data: files or folders to calibrate on where that is no text (eckart.samples.read).
        eval_data: the same to measure on; default: the last tenth of `data`, left out above.
        text: sources to calibrate on (eckart.text.read).
        eval_text: sources to measure on; default: the last 5 % of each of `text`, left out above.
        foreign_text: sources of another kind to measure on as well: calibration on one domain costs others.
        heal: refinements after the compression (eckart.healing.Healing); default: none.
        include: globs on module names that replace the default choice of matrices.
        exclude: globs on module names to leave alone.
        overrides: rules for single modules; the last that matches wins.
        multiple: ranks and widths are multiples of this; default: 1, and 32 for a stock model.
        damp: added to the diagonal of every metric, in units of its mean.
        alpha: exponent of ASVD.
        tokens: for the second moments of inputs.
        gradient_tokens: of those, for the second moments of gradients.
        seq_len: window length.
        seed: which windows, and sampled labels.
        labels: the loss behind the gradients is on the `text`'s own labels or on labels `sampled`
            from the model (true Fisher information).
        eval_tokens: tokens to measure perplexity on, before and after.
        bos: begin each window with the tokenizer's begin-of-text token.
        dtype: of the output; default: as stored at the source (a GGUF: bfloat16).
        storage: of the treated matrices, `float` (the dtype), one of eckart.quant.storage.STORAGES, or
            `auto`: chosen per matrix together with its rank. Default: auto where a size is given and the
            allocation is by curvature, else float.
        embeddings: storage of the embeddings and of the output head; default: the same.
        correction: of what storage does to the matrices of the blocks, by low-rank matrices beside them: a
            row of eckart.quant.correction.METHODS; default: none.
        correction_rank: their bytes in all are at most those of this rank in every matrix; the curvature
            shares them out where the method has gradients. Default: 16.
        correction_storage: of their factors; default: int8.
        device: default: cuda, mps or cpu, the first that is there.
        trust_remote_code: run the code that a model brings along.

    Raises:
        ConfigError: a value is not legal, or not exactly one budget is given.
    """

    model: str | None = None
    keep: float | None = None
    of: Of = "model"
    size: int | str | None = None
    rank: int | None = None
    energy: float | None = None
    latency: float | str | None = None
    objective: Objective | None = None
    workload: int | str | None = None
    times: str | None = None
    max_ppl_increase: str | None = None
    method: str = methods.DEFAULT
    allocation: Allocation | None = None
    form: Shape | None = None
    stock: bool = False
    depth: bool = False
    share_inputs: bool = False
    landmarks: Landmarks | None = None
    split: Split = "none"
    layers: int = 2
    task: str = "auto"
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    eval_text: tuple[str, ...] = ()
    foreign_text: tuple[str, ...] = ()
    heal: Healing | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    multiple: int | None = None
    damp: float = 1e-4
    alpha: float = 0.5
    tokens: int = 32_768
    gradient_tokens: int = 16_384
    seq_len: int = 512
    seed: int = 0
    labels: Labels = "text"
    eval_tokens: int = 12_288
    bos: bool = False
    dtype: str | None = None
    storage: str | None = None
    embeddings: str | None = None
    correction: str | None = None
    correction_rank: int | None = None
    correction_storage: str | None = None
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, legal in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in legal:
                raise ConfigError(f"{name} {value!r}: legal are {', '.join(legal)}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} {getattr(self, name)!r}: must be true or false")
        for name in _NUMBERS:
            check_number(name, getattr(self, name))
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} {value!r}: must be a whole number of at least {least}")
        if self.damp < 0:
            raise ConfigError(f"damp {self.damp}: must be >= 0")
        self.size_bytes()
        self.check_budget()
        check_method(self)
        self.check_storage()
        self.check_correction()
        check_recipe(self)

    @property
    def resolved_objective(self) -> Objective:
        """What the budget is spent in, with the default put in."""
        return resolved(self.objective, self.latency)

    @property
    def timed(self) -> bool:
        """Tell whether times decide."""
        return self.resolved_objective != "size"

    def check_budget(self) -> None:
        """Raise ConfigError unless exactly one budget is given and it is legal."""
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"got {' and '.join(given) or 'no budget'}: give exactly one of {', '.join(_BUDGETS)}"
            )
        self.rule()
        if self.max_ppl_increase is not None:
            self.increase()
            if self.heal is not None:
                raise ConfigError(
                    "max_ppl_increase is measured before anything is healed: leave out heal, and heal the "
                    "output afterwards, or give a keep"
                )

    def check_storage(self) -> None:
        """Raise ConfigError if storage and the rest do not fit."""
        method, given = self.resolved_method(), (self.storage, self.embeddings)
        if AUTO in given and (self.size is None or method.allocation != "curvature"):
            raise ConfigError(
                "storage 'auto' spends bytes where the curvature says: give a size, and method eckart or "
                f"io-svd; or name a storage: {', '.join(STORAGES)}"
            )
        if not self.stores:
            return
        if self.stock:
            raise ConfigError(f"stock needs no eckart to load, and storage {given[0] or given[1]!r} does")
        if method.form == "shared":
            raise ConfigError("form 'shared' is stored in the output dtype only: leave out storage")
        if self.size is not None and method.allocation != "curvature":
            raise ConfigError(
                "a size is shared out over ranks and bits by curvature: use method eckart or io-svd, or "
                "give keep with the storage"
            )

    def check_correction(self) -> None:
        """Raise ConfigError if the correction and the rest do not fit."""
        if self.correction is None:
            if (self.correction_rank, self.correction_storage) != (None, None):
                raise ConfigError(f"there is no correction: name one of {', '.join(correction.METHODS)}")
        elif self.stock:
            raise ConfigError(f"stock needs no eckart to load, and correction {self.correction!r} does")
        elif self.keep != 1:
            raise ConfigError(
                "a correction is for matrices that keep their rank, and its bytes are in no other budget: "
                "give keep 1 with it"
            )
        elif self.matrices_storage == FLOAT:
            raise ConfigError(
                "a correction makes good what a storage of few bits does to the matrices, and these are "
                f"stored in float: name a storage: {', '.join(STORAGES)}"
            )

    @property
    def factors_rank(self) -> int:
        """The rank of corrections that their bytes are counted by, with the default put in."""
        return self.correction_rank or _CORRECTION_RANK

    @property
    def factors_storage(self) -> str:
        """The storage of the factors of corrections, with the default put in."""
        return self.correction_storage or _CORRECTION_STORAGE

    @property
    def matrices_storage(self) -> str:
        """The storage of the treated matrices, with the default put in."""
        if self.storage is not None:
            return self.storage
        by_curvature = self.resolved_method().allocation == "curvature" and not self.stock
        return AUTO if self.size is not None and by_curvature else FLOAT

    @property
    def embeddings_storage(self) -> str:
        """The storage of embeddings and head, with the default put in."""
        return self.embeddings or self.matrices_storage

    @property
    def stores(self) -> bool:
        """Tell whether anything is to be stored in few bits."""
        return (self.matrices_storage, self.embeddings_storage) != (FLOAT, FLOAT)

    def check_text(self) -> None:
        """Raise ConfigError if the method looks at data and there is none: a run needs it, no plan does."""
        if self.heal is not None and not (self.heal.text or self.text):
            raise ConfigError("heal learns from text: give text")
        if self.resolved_method().needs_text and not (self.text or self.data):
            raise ConfigError(
                f"method {self.method!r} looks at data: give text to calibrate on, or use method svd"
            )
        if self.max_ppl_increase is not None and not (self.text or self.eval_text):
            raise ConfigError(
                "max_ppl_increase is measured on text, and there is none: give text or eval_text"
            )
        if self.statistics() and not (self.text or self.data):
            raise ConfigError(
                f"correction {self.correction!r} looks at data: give text, or use loftq or lorc"
            )

    def statistics(self) -> tuple[Statistic, ...]:
        """Return the statistics that the method and the correction look at."""
        own = () if self.correction is None else correction.get(self.correction).statistics()
        return tuple(dict.fromkeys((*self.resolved_method().statistics(), *own)))

    def rule(self) -> Fixed | Keep | Energy | None:
        """Return the budget as a rank rule, None when it is a size."""
        return rank_rule(self.rank, self.keep, self.energy)

    def size_bytes(self) -> int | None:
        """Return the size budget in bytes, None when there is none."""
        return None if self.size is None else parse_size(self.size)

    def increase(self) -> float | None:
        """Return how far the perplexity may be above the dense model's, a fraction; None: no such budget."""
        given = self.max_ppl_increase
        return None if given is None else parse_percent("max_ppl_increase", given)

    def resolved_method(self) -> Method:
        """Return the preset with the recipe's own allocation and form put in."""
        preset = methods.get(self.method)
        allocation = self.allocation or preset.allocation
        if self.rank is not None or self.energy is not None:
            allocation = "uniform"
        form = self.form or ("width" if self.stock else preset.form)
        if form == "mixed" and allocation == "uniform" and self.form is None:
            form = "pivoted"
        landmarks = self.landmarks or preset.landmarks
        return replace(preset, allocation=allocation, form=form, landmarks=landmarks)

    def step(self) -> int:
        """Return what ranks and widths are multiples of."""
        return self.multiple or (_STOCK_MULTIPLE if self.stock else 1)


def from_mapping(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Return the recipe that `values` describe.

    Raises:
        ConfigError: an unknown key (with a suggestion) or an illegal value.
    """
    values = listed(values, _LISTS, where)
    heal = values.get("heal")
    if isinstance(heal, Mapping):
        values["heal"] = healing.from_mapping(heal, f"{where}: heal")
    elif heal is not None and not isinstance(heal, Healing):
        raise ConfigError(f"{where}: heal must be a mapping of settings, got {heal!r}")
    recipe: Recipe = construct(Recipe, values, where)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """Return `recipe` as YAML, every value resolved; `read_yaml` and `from_mapping` give it back."""
    values = asdict(recipe)
    for override in values["overrides"]:
        for key in [key for key, value in override.items() if value in (None, False)]:
            del override[key]
    values = _listed(values)
    return yaml.safe_dump(values, sort_keys=False)


def _listed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with lists for tuples, as YAML has them."""
    return {
        key: list(value)
        if isinstance(value, tuple)
        else _listed(value)
        if isinstance(value, Mapping)
        else value
        for key, value in values.items()
    }


def override(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with what is given (not None, not empty) put in; one budget replaces another."""
    changes = {key: value for key, value in given.items() if value is not None and value != ()}
    kept = dict(base)
    if any(name in changes for name in _BUDGETS):
        kept = {key: value for key, value in kept.items() if key not in _BUDGETS}
    return kept | changes
