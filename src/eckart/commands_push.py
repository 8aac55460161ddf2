"""The command `push`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import pushing, render
from .errors import ConfigError
from .terminal import DECLINED, AsJson, failures, show


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that eckart wrote.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made where it is missing.")],
    private: Annotated[
        bool, typer.Option("--private", help="Where it is made, for its owner alone.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made where it is missing.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload an output folder to a hub, after asking."""
    with failures():
        upload = pushing.prepare(folder, repo, private=private, revision=revision)
        if dry_run:
            show(render.to_json(upload.to_dict()) if as_json else upload, as_json)
            return
        if as_json and not yes:
            raise ConfigError(
                "--json cannot ask: pass --yes as well, or --dry-run to see what would be uploaded"
            )
        if not as_json:
            show(upload, as_json=False)
        if not yes and not typer.confirm(f"Upload to {repo}?", err=True):
            Console(stderr=True).print("nothing was uploaded")
            raise typer.Exit(DECLINED)
        done = pushing.push(upload)
        if as_json:
            show(render.to_json(done.to_dict()), as_json)
        else:
            print(f"uploaded to {done.url}")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(push)
