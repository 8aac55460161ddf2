"""The command `sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from . import render, report_sweep, sweeping
from .bars import Bars
from .commands_curve import chosen
from .terminal import AsJson, EvalSources, NoCache, Remote, WholeCache, failures, numbers, show, words


def sweep(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.")],
    text: Annotated[
        list[str], typer.Option("--text", help="Text to calibrate on: a file, a .jsonl, or a datasets id.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the rows; an unfinished sweep goes on there.")],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Presets, each alone or with a form: eckart, eckart/pivoted, eckart/stock; several, or a,b "
            f"({','.join(sweeping.METHODS)})."
        ),
    ] = None,
    keeps: Annotated[
        list[str] | None, typer.Option(help=f"Several, or a,b ({','.join(map(str, sweeping.KEEPS))}).")
    ] = None,
    storages: Annotated[
        list[str] | None, typer.Option(help="float (default), int8, nf4-dq and so on; several, or a,b.")
    ] = None,
    of: Annotated[
        str | None, typer.Option(help="Keeps count the 'model' (default) or its 'linears'.")
    ] = None,
    eval_text: EvalSources = None,
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
    devices: Annotated[
        list[str] | None, typer.Option(help="One process for each: cuda:0,cuda:1; default: one process.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes on a CPU, which share its threads.")] = 1,
    speed: Annotated[bool, typer.Option("--speed", help="Time decoding as well.")] = False,
    cache: WholeCache = None,
    no_cache: NoCache = False,
    trust_remote_code: Remote = None,
    as_json: AsJson = False,
) -> None:
    """Measure methods at sizes and storages, and show which are the best of their size."""
    with failures(out):
        with Bars() as bars:
            found = sweeping.sweep(
                model, text, out=out,
                methods=words(methods) or sweeping.METHODS, keeps=numbers(keeps, "keeps") or sweeping.KEEPS,
                storages=words(storages) or ("float",), of=of,  # type: ignore[arg-type]
                eval_text=eval_text, include=include, exclude=exclude, tokens=tokens,
                gradient_tokens=gradient_tokens, seq_len=seq_len, eval_tokens=eval_tokens, seed=seed,
                dtype=dtype, trust_remote_code=trust_remote_code, devices=words(devices), jobs=jobs,
                speed=speed, cache=chosen(cache, no_cache), watch=bars.watch,
            )  # fmt: skip
        show(render.to_json(found.to_dict()) if as_json else report_sweep.sweep_tables(found), as_json)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(sweep)
