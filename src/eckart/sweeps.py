"""What a sweep says: one row per combination of method, keep and storage, and which are on the front."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .curves import frame
from .errors import ConfigError
from .front import front
from .methods import METHODS, SHAPES
from .pages.notebook import Shown
from .quant.storage import STORAGES
from .recipe import FLOAT

STOCK = "stock"


@dataclass(frozen=True, slots=True)
class Combination:
    """One thing to measure.

    Args:
        method: a preset, alone or with a form of its own: eckart, eckart/pivoted, eckart/stock.
        keep: in (0, 1].
        storage: `float`, or a name of eckart.quant.storage.STORAGES.

    Raises:
        ConfigError: one of them is not legal.
    """

    method: str
    keep: float
    storage: str = FLOAT

    def __post_init__(self) -> None:
        preset, slash, form = self.method.partition("/")
        if preset not in METHODS:
            raise ConfigError(f"method {preset!r}: legal are {', '.join(METHODS)}, each alone or with /FORM")
        if slash and form not in (*SHAPES, STOCK):
            raise ConfigError(f"method {self.method!r}: legal behind the / are {', '.join((*SHAPES, STOCK))}")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep {self.keep:g}: must lie in (0, 1]")
        if self.storage not in (FLOAT, *STORAGES):
            raise ConfigError(f"storage {self.storage!r}: legal are {', '.join((FLOAT, *STORAGES))}")

    @property
    def name(self) -> str:
        """The name of its row's file."""
        return f"{self.method.replace('/', '+')}_{self.keep:g}_{self.storage}"

    def settings(self) -> dict[str, Any]:
        """Return what it means in a recipe."""
        preset, _, form = self.method.partition("/")
        how = {"stock": True} if form == STOCK else {"form": form} if form else {}
        stored = {} if self.storage == FLOAT else {"storage": self.storage}
        return {"method": preset, "keep": self.keep, **how, **stored}


@dataclass(frozen=True, slots=True)
class Row:
    """What a combination gave; figures are None where it failed.

    Args:
        method, keep, storage: the combination.
        status: `ok` or `failed`.
        error: why it failed.
        perplexity: on the text to measure on.
        increase, predicted_increase: of the loss in nats per token; predicted where the method has gradients.
        bytes: of the weight file.
        parameters: of the model.
        keep_linears, keep_model: parameters after / before.
        seconds: to choose, make and measure this one.
        shared_seconds: of calibration and decomposition, which serve all keeps of a group.
        decode_tokens_per_second: median, one row behind a prompt of 128 tokens; None unless asked for.
        dense_perplexity, dense_bytes, dense_parameters: of the dense model.
        device: that it ran on.
        on_front: nothing else in the sweep, the dense model among it, is as good in bytes and perplexity and
            better in one.
    """

    method: str
    keep: float
    storage: str
    status: str
    error: str | None = None
    perplexity: float | None = None
    increase: float | None = None
    predicted_increase: float | None = None
    bytes: int | None = None
    parameters: int | None = None
    keep_linears: float | None = None
    keep_model: float | None = None
    seconds: float | None = None
    shared_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    dense_perplexity: float | None = None
    dense_bytes: int | None = None
    dense_parameters: int | None = None
    device: str | None = None
    on_front: bool = False

    @property
    def ok(self) -> bool:
        """Whether there are figures."""
        return self.status == "ok"


@dataclass(frozen=True, slots=True)
class Sweep(Shown):
    """A sweep.

    Args:
        source: the model.
        out: the folder of the rows.
        protocol: everything that all rows have in common.
        rows: in the order of methods, storages, keeps.
        dense_on_front: whether the dense model is on the front.
    """

    source: str
    out: str
    protocol: Mapping[str, Any]
    rows: tuple[Row, ...]
    dense_on_front: bool

    @classmethod
    def of(cls, source: str, out: str, protocol: Mapping[str, Any], rows: Sequence[Row]) -> "Sweep":
        """Return the sweep of `rows`, with its front marked."""
        good = [row for row in rows if row.ok]
        figures = [(float(row.bytes or 0), row.perplexity or 0.0) for row in good]
        dense = [(float(row.dense_bytes or 0), row.dense_perplexity or 0.0) for row in good[:1]]
        marks = front([*figures, *dense])
        marked = {id(row): mark for row, mark in zip(good, marks)}
        whole = tuple(replace(row, on_front=marked.get(id(row), False)) for row in rows)
        return cls(source, out, protocol, whole, bool(dense) and marks[-1])

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values: the fields above, `rows` a list of the fields of `Row`."""
        values = asdict(self)
        return values | {"rows": list(values["rows"])}

    def to_frame(self) -> Any:
        """Return the rows as a pandas.DataFrame, a column for each field of `Row`.

        Raises:
            ConfigError: pandas is not installed.
        """
        return frame(self.rows)

    def __str__(self) -> str:
        """Show it as plain text tables."""
        from .render import plain
        from .report_sweep import sweep_tables

        return plain(sweep_tables(self))
