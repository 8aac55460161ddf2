"""The command `spectrum`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import render, report_survey, reporting, surveying
from .bars import Bars
from .checkpoint import appearing
from .errors import ConfigError
from .files import check_new
from .tasks import TASKS
from .terminal import AsJson, Bos, DataSources, Device, Page, Remote, Sources, failures, show


def spectrum(
    model: Annotated[str, typer.Argument(help="Hub id, folder (compressed or not) or .gguf file.")],
    text: Sources = None,
    data: DataSources = None,
    include: Annotated[list[str] | None, typer.Option(help="Globs on module names to look at.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Globs on module names to leave out.")] = None,
    ends: Annotated[bool, typer.Option("--ends", help="Embeddings and output head as well.")] = False,
    split: Annotated[
        str | None, typer.Option("--split", metavar="none|fused", help="Look at q, k, v of one matrix apart.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help=f"What the model is for: {', '.join(TASKS)}; default: as stored.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to take second moments on (32768).")] = None,
    gradient_tokens: Annotated[int | None, typer.Option(help="Of those, with gradients (16384).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Window length (512).")] = None,
    seed: Annotated[int | None, typer.Option(help="Which windows are taken (0).")] = None,
    damp: Annotated[
        float | None, typer.Option(help="Damping of the metrics, in units of their mean (1e-4).")
    ] = None,
    bos: Bos = None,
    limit: Annotated[int, typer.Option(help="Matrices to show.")] = report_survey.LIMIT,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write all singular values to; must not exist.")
    ] = None,
    html: Page = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files that are there.")] = False,
    device: Device = None,
    trust_remote_code: Remote = None,
    as_json: AsJson = False,
) -> None:
    """Show how low-rank a model is: the singular values of every matrix, plain and on text."""
    with failures():
        if limit < 0:
            raise ConfigError(f"limit {limit}: must be at least 0")
        if out is not None:
            check_new(out, overwrite)
        if html is not None:
            check_new(html, overwrite, "--html")
        with Bars() as bars:
            found = surveying.spectrum(
                model, text=text, data=data, include=include, exclude=exclude, ends=ends,
                split=split, task=task, tokens=tokens,  # type: ignore[arg-type]
                gradient_tokens=gradient_tokens, seq_len=seq_len, seed=seed, damp=damp, bos=bos,
                device=device, trust_remote_code=trust_remote_code, watch=bars.watch,
            )  # fmt: skip
        if out is not None:
            with appearing(out) as partial:
                partial.write_text(json.dumps(found.values_dict()) + "\n", encoding="utf-8")
        if html is not None:
            reporting.write_result(Path(model).name, found, html)
        show(render.to_json(found.to_dict()) if as_json else report_survey.tables(found, limit), as_json)
        for path in (out, html):
            if path is not None and not as_json:
                print(f"written to {path}")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(spectrum)
