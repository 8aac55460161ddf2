"""What was measured of speed: values, JSON, and the table that shows them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .. import render
from ..pages.notebook import Shown
from .alone import Alone
from .layers import LayerTime
from .options import LayerOptions, Options, Setting
from .spread import Quotient, Spread, quotient

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT = 1
"""Of the JSON; it grows where a key is renamed or goes."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and when it was measured.

    Args:
        device: as torch calls it.
        dtype: to compute in.
        threads: of the CPU.
        load_average: processes that wanted to run in the minute before, None where it is not known.
        environment: eckart.environment.describe(), while it was measured.
    """

    device: str
    dtype: str
    threads: int
    load_average: float | None
    environment: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that was measured.

    Args:
        source: what it was called.
        kind: its class.
        dtype: that it computes in.
        parameters: each tied one once.
        vocabulary: tokens that it scores.
        file_bytes: of its weight files; None where there are none at hand.
        alone: load time and peak memory; None where they were not asked for, or it was given in memory.
    """

    source: str
    kind: str
    dtype: str
    parameters: int
    vocabulary: int
    file_bytes: int | None
    alone: Alone | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        names = ("source", "kind", "dtype", "parameters", "vocabulary", "file_bytes")
        alone = None if self.alone is None else self.alone.to_dict()
        return {name: getattr(self, name) for name in names} | {"alone": alone}


@dataclass(frozen=True, slots=True)
class Figures:
    """What the passes of one model gave in one setting.

    Args:
        prefill, decode: tokens per second of all rows.
        first_token: seconds.
    """

    prefill: Spread
    decode: Spread
    first_token: Spread

    def named(self) -> dict[str, Spread]:
        """Return them by the names that they have in JSON."""
        return {
            "prefill_tokens_per_second": self.prefill,
            "decode_tokens_per_second": self.decode,
            "first_token_seconds": self.first_token,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """A setting, and what the models gave in it, measured in turn.

    Args:
        setting: rows, tokens of a prompt, new tokens.
        model, against: as they are.
        compiled: the same under torch.compile, with static caches, in the same rounds; None: not asked for.
        compile_seconds: of compiling each, by "model" and "against".
    """

    setting: Setting
    model: Figures
    against: Figures | None
    compiled: "Row | None" = None
    compile_seconds: Mapping[str, float] | None = None

    def ratios(self) -> dict[str, Quotient]:
        """Return the figures of the model divided by those of the other one; nothing without one."""
        if self.against is None:
            return {}
        other = self.against.named()
        return {name: quotient(own, other[name]) for name, own in self.model.named().items()}

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        sides = {"model": self.model, "against": self.against}
        measured = {
            side: figures and {name: spread.to_dict() for name, spread in figures.named().items()}
            for side, figures in sides.items()
        }
        ratios = {name: ratio.to_dict() for name, ratio in self.ratios().items()}
        found = {**asdict(self.setting), **measured, "ratio": ratios or None}
        if self.compiled is None:
            return found
        whole = self.compiled.to_dict()
        same = {key: whole[key] for key in ("model", "against", "ratio")}
        return found | {"compiled": same | {"compile_seconds": dict(self.compile_seconds or {})}}


@dataclass(frozen=True, slots=True)
class Speed(Shown):
    """How fast a model is, alone or against another one."""

    model: Subject
    against: Subject | None
    rows: tuple[Row, ...]
    options: Options
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "format": FORMAT,
            "model": self.model.to_dict(),
            "against": self.against and self.against.to_dict(),
            "settings": [row.to_dict() for row in self.rows],
            "options": asdict(self.options),
            **asdict(self.machine),
        }

    def __str__(self) -> str:
        """Show it as plain text tables."""
        return render.plain(self.__rich__())

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from .report_speed import speed_tables

        return speed_tables(self)


@dataclass(frozen=True, slots=True)
class LayerSpeeds(Shown):
    """How long single linear maps take, dense and in low-rank forms."""

    source: str
    layers: tuple[LayerTime, ...]
    options: LayerOptions
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "format": FORMAT,
            "model": self.source,
            "layers": [_layer(layer) for layer in self.layers],
            "options": asdict(self.options),
            **asdict(self.machine),
        }

    def __str__(self) -> str:
        """Show it as a plain text table."""
        return render.plain(self.__rich__())

    def __rich__(self) -> "RenderableType":
        """Show it as a table."""
        from .report_speed import layer_table

        return layer_table(self)


def _layer(layer: LayerTime) -> dict[str, Any]:
    forms = {
        form: {
            "rank": found.rank,
            "bytes": found.bytes,
            "flops": found.flops,
            "seconds": found.seconds.to_dict(),
            "ratio": found.ratio.to_dict(),
            "allowed_seconds": layer.share(form) * layer.dense.median,
            "excess": layer.excess(form),
        }
        for form, found in layer.forms.items()
    }
    same = {"shape": list(layer.shape), "count": layer.count, "tokens": layer.tokens, "calls": layer.calls}
    return {**same, "dense_seconds": layer.dense.to_dict(), "forms": forms}
