"""The commands `report` and `compare`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import comparing, render, reporting
from .bars import Bars
from .errors import ConfigError, StoreError
from .files import check_new
from .terminal import AsJson, Bos, Device, Remote, failures, show


def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Folders with an eckart.json, folders of these, or reports in JSON."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; must not exist.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures as PNG and SVG; must not exist.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; default: the names of the reports.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show reports of any command in one HTML file that needs no network, and as figures for papers."""
    with failures():
        if out is None and figures is None:
            raise ConfigError("nothing to write: give --out FILE.html, --figures FOLDER, or both")
        if out is not None:
            check_new(out, overwrite)
        if figures is not None and figures.exists() and not (overwrite and figures.is_dir()):
            raise StoreError(f"{figures} exists: choose another --figures, or pass --overwrite to add to it")
        found = reporting.gather(sources)
        made = reporting.write(found, out, figures, title)
        if as_json:
            show(json.dumps({"reports": [name for name, _ in found], "files": list(map(str, made))}), as_json)
        else:
            for path in made:
                print(f"written to {path}")


def compare(
    a: Annotated[str, typer.Argument(help="Hub id, folder (compressed or not) or .gguf file.")],
    b: Annotated[str, typer.Argument(help="Another one, with the same tokenizer.")],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="Text to measure on: a file, a .jsonl, or a datasets id."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="What both go on from; default: beginnings of windows of --text."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file to write; must not exist.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens from the start of the text.")] = 24_576,
    seq_len: Annotated[int, typer.Option(help="Window length.")] = 512,
    new_tokens: Annotated[
        int, typer.Option(help="That each writes after a prompt, greedily.")
    ] = comparing.NEW_TOKENS,
    bos: Bos = False,
    dtype: Annotated[str | None, typer.Option(help="To compute in; default: float32 on a CPU.")] = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put two models side by side: sizes, perplexity, matrix by matrix, and what both write."""
    with failures():
        if out is not None:
            check_new(out, overwrite)
        with Bars() as bars:
            found = comparing.compare(
                a, b, text=text, prompts=prompt or (), tokens=tokens, seq_len=seq_len, new_tokens=new_tokens,
                bos=bool(bos), dtype=dtype, device=device, trust_remote_code=bool(trust_remote_code),
                watch=bars.watch,
            )  # fmt: skip
        if out is not None:
            reporting.write_result(f"{Path(a).name} and {Path(b).name}", found, out)
        show(render.to_json(found.to_dict()) if as_json else found, as_json)
        if out is not None and not as_json:
            print(f"written to {out}")


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (report, compare):
        app.command()(command)
