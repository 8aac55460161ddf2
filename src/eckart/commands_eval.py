"""The command `eval`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import evaluating, modelcard, render, report
from .bars import Bars
from .errors import ConfigError
from .terminal import AsJson, Bos, Device, Remote, failures, show
from .zeroshot import harness
from .zeroshot.evaluated import Evaluated


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, folder (compressed or not) or .gguf file.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Text: a file, a .jsonl, or a datasets id.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", help="Tasks of lm_eval by name, with commas between them: accuracy on them."),
    ] = None,
    task_path: Annotated[
        str | None, typer.Option(help="Folder of task definitions (YAML) of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many samples of each task.")] = None,
    shots: Annotated[int, typer.Option(help="Examples before each question of a task.")] = 0,
    batch: Annotated[int, typer.Option(help="Rows of a task at once.")] = harness.BATCH,
    tokens: Annotated[int, typer.Option(help="Tokens from the start of the text.")] = 24_576,
    seq_len: Annotated[int, typer.Option(help="Window length.")] = 512,
    against: Annotated[str | None, typer.Option(help="A model to compare with.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Put the figures into the model card and report of the folder.")
    ] = False,
    bos: Bos = False,
    dtype: Annotated[str | None, typer.Option(help="To compute in; default: float32 on a CPU.")] = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, accuracy on tasks, and how far a model is from another."""
    with failures():
        if not text and not tasks:
            raise ConfigError("neither --text nor --tasks: give one to measure on, or both")
        if record:
            modelcard.check_recordable(model)
        options: dict[str, Any] = {
            "tokens": tokens, "seq_len": seq_len, "bos": bos, "dtype": dtype, "device": device,
            "against": against, "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        if tasks:
            options |= {
                "tasks": tasks, "task_path": task_path, "limit": limit, "shots": shots, "batch": batch,
            }  # fmt: skip
        with Bars() as bars:
            bars.watch("load", 0, 1)
            found = evaluating.evaluate(
                model, text, watch=lambda done, total: bars.watch("evaluate", done, total), **options
            )
        whole = found if isinstance(found, Evaluated) else Evaluated(model, against, found, ())
        if record:
            texts = text or ()
            modelcard.record(
                model, _what(texts, tasks or (), against), report.evaluated_section(whole, texts),
                report.evaluated_figures(whole, texts), whole.to_dict(),
            )  # fmt: skip
        if as_json:
            values = found.to_dict() if isinstance(found, Evaluated) else asdict(found)
            show(render.to_json({"model": model, "text": text, **options, "result": values}), as_json)
        else:
            show(whole, as_json=False)


def _what(texts: Sequence[str], tasks: Sequence[str], against: str | None) -> str:
    """Return what an evaluation is of: a later one of the same replaces it."""
    parts = [Path(text).name for text in texts] + list(tasks)
    return ", ".join(parts) + (f" against {Path(against).name}" if against else "")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("eval")(evaluate)
