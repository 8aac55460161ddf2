"""The command `export`."""

from pathlib import Path
from typing import Annotated

import typer

from . import exporting, render
from .bars import Bars
from .terminal import AsJson, Overwrite, Remote, failures, show


def export(
    model: Annotated[str, typer.Argument(help="Folder that eckart wrote, or hub id of one.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    to: Annotated[str, typer.Option(help=f"Form: {', '.join(exporting.TARGETS)}.")] = "dense",
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default: as stored.")] = None,
    trust_remote_code: Remote = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a compressed model for programs that know no eckart: dense, what was saved is gone then."""
    with failures():
        with Bars() as bars:
            found = exporting.export(
                model, out, to, dtype=dtype, trust_remote_code=bool(trust_remote_code), overwrite=overwrite,
                watch=bars.watch,
            )  # fmt: skip
        show(render.to_json(found.to_dict()) if as_json else found, as_json)
        if not as_json:
            print(f"written to {out}")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(export)
