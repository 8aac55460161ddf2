"""The commands `curve` and `cache`."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from . import curving, points, render, report_curve
from .bars import Bars
from .checkpoint import appearing
from .errors import ConfigError
from .files import check_new
from .shelf import VARIABLE, Shelf, default_folder
from .terminal import (
    AsJson,
    Device,
    EvalSources,
    NoCache,
    Remote,
    Sources,
    Storage,
    WholeCache,
    failures,
    numbers,
    show,
)

_MB = 1e6


def curve(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.")],
    text: Sources = None,
    eval_text: EvalSources = None,
    count: Annotated[
        int | None, typer.Option("--points", help="Sizes to predict at, evenly from keep 1 to 0.3 (15).")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Keeps to predict at instead; several, or 0.9,0.8.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(help="Keeps at which a model is made and measured as well; several, or 0.9,0.6."),
    ] = None,
    of: Annotated[
        str | None, typer.Option(help="Keeps count the 'model' (default) or its 'linears'.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="As in compress; eckart (default) and io-svd predict.")
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="factored, pivoted, width or mixed; default: the method's.")
    ] = None,
    storage: Storage = None,
    stock: Annotated[
        bool | None, typer.Option("--stock/--no-stock", help="By width, as an ordinary model.")
    ] = None,
    depth: Annotated[
        bool | None, typer.Option("--depth/--no-depth", help="Whole blocks may be left out.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Globs on module names to treat.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Globs on module names to leave alone.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to calibrate on (32768).")] = None,
    gradient_tokens: Annotated[int | None, typer.Option(help="Of those, with gradients (16384).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Window length (512).")] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="Tokens to measure on (12288).")] = None,
    seed: Annotated[int | None, typer.Option(help="Which windows are taken (0).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the output; default: the source's, bfloat16 for GGUF.")
    ] = None,
    cache: WholeCache = None,
    no_cache: NoCache = False,
    device: Device = None,
    trust_remote_code: Remote = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write as well; must not exist.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show loss against size, predicted from one calibration, before anything is compressed."""
    with failures():
        if out is not None:
            check_new(out, overwrite)
        if count is not None and keep:
            raise ConfigError("got points and keep: give one of them")
        keeps = numbers(keep, "keep") or (points.KEEPS if count is None else curving.evenly(count))
        with Bars() as bars:
            found = curving.curve(
                model, text=text, eval_text=eval_text, keeps=keeps, measure=numbers(measure, "measure"),
                of=of, method=method, form=form, storage=storage,  # type: ignore[arg-type]
                stock=stock, depth=depth, include=include, exclude=exclude, tokens=tokens,
                gradient_tokens=gradient_tokens, seq_len=seq_len, eval_tokens=eval_tokens, seed=seed,
                dtype=dtype, device=device, trust_remote_code=trust_remote_code,
                cache=chosen(cache, no_cache), watch=bars.watch,
            )  # fmt: skip
        content = render.to_json(found.to_dict())
        if out is not None:
            with appearing(out) as partial:
                partial.write_text(content + "\n", encoding="utf-8")
        show(content if as_json else report_curve.curve_tables(found), as_json)
        if out is not None and not as_json:
            print(f"written to {out}")


def chosen(cache: Path | None, none: bool) -> Path | bool:
    """Return the cache of a command that keeps things: what is named, that of the user, or none.

    Raises:
        ConfigError: one is named, and none is wanted.
    """
    if cache is not None and none:
        raise ConfigError(f"got a cache, {cache}, and no cache: give one of them")
    return cache or not none


def cache(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--cache", help=f"The folder; default: ${VARIABLE}, or eckart in the user's cache folder."
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show what is there (default).")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Delete it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show, or delete, what curve, sweep and compress keep for later runs."""
    with failures():
        if listed and clear:
            raise ConfigError("got --list and --clear: give one of them")
        shelf = Shelf(folder or default_folder())
        if clear:
            freed = shelf.clear()
            said = f"{freed / _MB:,.1f} MB deleted from {shelf.folder}"
            show(json.dumps({"folder": str(shelf.folder), "freed": freed}) if as_json else said, as_json)
            return
        entries = shelf.entries()
        if as_json:
            rows = [
                {"name": e.name, "kind": e.kind, "source": e.source, "bytes": e.bytes, "made": e.made}
                for e in entries
            ]
            show(json.dumps({"folder": str(shelf.folder), "entries": rows}, indent=2), True)
            return
        cells = [
            (
                e.kind,
                e.source,
                f"{e.bytes / _MB:,.1f}",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(e.made)),
            )
            for e in entries
        ]
        total = sum(entry.bytes for entry in entries)
        title = f"{shelf.folder}: {len(entries)} entries, {total / _MB:,.1f} MB"
        show(render.table(title, ("kind", "model", "MB", "made"), cells), as_json)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(curve)
    app.command()(cache)
