"""Show speed: rich tables. Pure rendering."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from ..hub import MB
from ..render import table
from .layers import LayerTime
from .options import Rounds
from .result import LayerSpeeds, Machine, Row, Speed, Subject
from .spread import Quotient, Spread

_RATES = {"prefill_tokens_per_second": "prefill", "decode_tokens_per_second": "decode"}
_LABELS = {
    "prefill_tokens_per_second": ("prefill, tokens/s", 1.0),
    "decode_tokens_per_second": ("decode, tokens/s", 1.0),
    "first_token_seconds": ("time to first token, ms", 1e3),
}
LAYER_COLUMNS = (
    "m x n", "in the model", "tokens", "form", "rank", "time, µs", "of dense", "its share", "time / share",
)  # fmt: skip
_MICRO = 1e6


def speed_tables(result: Speed) -> RenderableType:
    """Return a table of the models, one for each setting, and what a reader must not overlook."""
    columns = ("", "model") if result.against is None else ("", "model", "against", "model / against")
    title = result.model.source + ("" if result.against is None else f" against {result.against.source}")
    parts: list[RenderableType] = [table(title, columns, subject_rows(result))]
    parts += [table(str(row.setting), columns, setting_rows(row)) for row in result.rows]
    parts += [Text(f"note: {remark}") for remark in remarks(result)]
    protocol = _protocol(result.options.rounds, result.machine, in_turn=result.against is not None)
    return Group(*parts, Text(f"{protocol}; greedy, with a cache of keys and values, end-of-text ignored"))


def subject_rows(result: Speed) -> list[tuple[str, ...]]:
    """Return what the models are, take on disk, and took in a process of their own."""
    found = [_subject(result.model)]
    if result.against is not None:
        found.append(_subject(result.against))
    rows: list[tuple[str, ...]] = []
    for name, (text, own) in found[0].items():
        others = [one[name] for one in found[1:]]
        shown = [text, *(other[0] for other in others)]
        for _, value in others:
            shown.append("" if own is None or not value else f"{own / value:.3f}")
        if any(shown):
            rows.append((name, *shown))
    return rows


def _subject(one: Subject) -> dict[str, tuple[str, float | None]]:
    """Return text and value of each figure; the value of what has no quotient is None."""
    alone = one.alone
    rows: dict[str, tuple[str, float | None]] = {
        "kind": (one.kind, None),
        "computes in": (one.dtype, None),
        "parameters": (f"{one.parameters:,}", one.parameters),
        "weight files, MB": _megabytes(one.file_bytes),
        "load, s": ("", None) if alone is None else (_spread(alone.load), alone.load.median),
        "peak memory of loading, MB": _megabytes(None if alone is None else alone.loading),
        "peak memory of running, MB": _megabytes(None if alone is None else alone.running),
        "of that before loading, MB": (_megabytes(None if alone is None else alone.resting)[0], None),
    }
    return rows


def _megabytes(size: int | None) -> tuple[str, float | None]:
    return ("", None) if size is None else (f"{size / MB:,.1f}", size)


def setting_rows(row: Row) -> list[tuple[str, ...]]:
    """Return the figures of a setting; those under torch.compile below, and how long compiling took."""
    rows = figure_rows(row)
    if row.compiled is None:
        return rows
    rows += [(f"compiled: {label}", *others) for label, *others in figure_rows(row.compiled)]
    seconds = [f"{value:.1f}" for value in (row.compile_seconds or {}).values()]
    return [*rows, ("compiling, s", *seconds, *([""] if row.against is not None else []))]


def figure_rows(row: Row) -> list[tuple[str, ...]]:
    """Return median and quartiles of each figure, of both models and of their quotient."""
    ratios = row.ratios()
    sides = [row.model.named()] + ([] if row.against is None else [row.against.named()])
    return [
        (
            label,
            *(_spread(side[name], scale) for side in sides),
            *([_quotient(ratios[name])] if ratios else []),
        )
        for name, (label, scale) in _LABELS.items()
    ]


def _spread(found: Spread, scale: float = 1.0) -> str:
    lower, upper = found.quartiles
    return f"{_figure(found.median * scale)} ({_figure(lower * scale)} to {_figure(upper * scale)})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _quotient(ratio: Quotient) -> str:
    return f"{ratio.value:.3f} ({ratio.lower:.3f} to {ratio.upper:.3f})"


def remarks(result: Speed) -> list[str]:
    """Return where the model is not faster than the other one, and what makes the figures doubtful."""
    found = [f"not faster: {text}" for row in result.rows for text in _not_faster(row)]
    compiled = [row.compiled for row in result.rows if row.compiled is not None]
    found += [f"not faster under torch.compile: {text}" for row in compiled for text in _not_faster(row)]
    subjects = [result.model, *([] if result.against is None else [result.against])]
    if any(one.alone is not None and not one.alone.exact for one in subjects):
        found.append(
            "the system keeps one peak for the whole process: that of running may be that of loading"
        )
    return [*found, *_busy(result.machine)]


def _not_faster(row: Row) -> list[str]:
    ratios = row.ratios()
    return [
        f"{what} at {row.setting}, {_quotient(ratios[name])} times"
        for name, what in _RATES.items()
        if ratios and ratios[name].lower <= 1
    ]


def _busy(machine: Machine) -> list[str]:
    cpus = machine.environment["machine"]["cpus"] or 1
    if machine.load_average is None or machine.load_average + machine.threads <= cpus + 0.5:
        return []
    return [
        f"{machine.load_average:.1f} processes wanted to run in the minute before, on {cpus} CPUs, beside "
        f"{machine.threads} threads here: the times are those of a busy machine"
    ]


def _protocol(rounds: Rounds, machine: Machine, *, in_turn: bool) -> str:
    order = ", in turn, every other one in reverse" if in_turn else ""
    return (
        f"median (quartiles) of {rounds.runs} rounds after {rounds.warmup} to warm up{order}; "
        f"{machine.dtype} on {machine.device}, threads: {machine.threads}"
    )


def layer_table(result: LayerSpeeds) -> RenderableType:
    """Return the times of all forms of all shapes, and what a reader must not overlook."""
    rows = [row for layer in result.layers for row in layer_rows(layer)]
    notes = [*_slower(result.layers), *_busy(result.machine)]
    legend = (
        "its share: of the dense bytes, index of outputs included, for one token, of the FLOPs for more; "
        "time / share: 1 is as fast as the size allows"
    )
    return Group(
        table(f"linear maps of {result.source} at keep {result.options.keep:g}", LAYER_COLUMNS, rows),
        *(Text(f"note: {note}") for note in notes),
        Text(legend),
        Text(_protocol(result.options.rounds, result.machine, in_turn=True)),
    )


def layer_rows(layer: LayerTime) -> list[tuple[str, ...]]:
    """Return a row for the dense map, and one for each form."""
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    dense = (
        shape,
        str(layer.count),
        str(layer.tokens),
        "dense",
        "",
        _spread(layer.dense, _MICRO),
        "",
        "",
        "",
    )
    rows: list[tuple[str, ...]] = [dense]
    for form, found in layer.forms.items():
        time = (_spread(found.seconds, _MICRO), _quotient(found.ratio))
        share = (f"{layer.share(form):.3f}", f"{layer.excess(form):.3f}")
        rows.append(("", "", "", form, str(found.rank), *time, *share))
    return rows


def _slower(layers: Sequence[LayerTime]) -> list[str]:
    return [
        f"not faster than dense: {form} {layer.shape[0]} x {layer.shape[1]} at {layer.tokens} tokens, "
        f"{_quotient(found.ratio)} of its time"
        for layer in layers
        for form, found in layer.forms.items()
        if found.ratio.upper >= 1
    ]
