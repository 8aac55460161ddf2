"""What the commands have in common: options, errors that end them, and how results are shown."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from .errors import ConfigError, EckartError

INTERRUPTED = 130

Model = Annotated[str | None, typer.Argument(help="Hub id, folder or .gguf file.")]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--text", help="Text to calibrate on: a file, a .jsonl with text or messages, or a datasets id."
    ),
]
EvalSources = Annotated[
    list[str] | None,
    typer.Option("--eval-text", help="Text to measure on; default: the last 5 % of --text, left out above."),
]
ForeignSources = Annotated[
    list[str] | None,
    typer.Option("--foreign-text", help="Text of another kind to measure on as well."),
]
DataSources = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Data of models that do not read text: a .safetensors of their arguments, a .npy of the main "
        "one, or a folder of pictures.",
    ),
]
EvalDataSources = Annotated[
    list[str] | None,
    typer.Option("--eval-data", help="Data to measure on; default: the last tenth of --data."),
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder to keep the dense model's predictions in, for later runs.")
]
RunCache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder to keep statistics, decompositions and the dense model's predictions in, for later "
        "runs; default: what eckart curve or sweep kept in the user's cache is taken from there.",
    ),
]
WholeCache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder to keep statistics and decompositions in, from which later runs start at once; default: "
        "eckart in the user's cache folder (eckart cache shows it).",
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Take nothing from a cache, and keep nothing.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps, cpu; default: the first that is there.")]
Bos = Annotated[bool | None, typer.Option("--bos/--no-bos", help="Begin windows with the begin token.")]
Remote = Annotated[
    bool | None, typer.Option("--trust-remote-code/--no-remote-code", help="Run code that the model brings.")
]
Checkpointing = Annotated[
    bool | None,
    typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations: less memory."),
]
Precision = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or auto: bfloat16 where the device is fast in it.")
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="float, int8, llm.int8, nf4, nf4-dq, fp4, fp4-dq, int6 to int2, or auto: by matrix, with its "
        "rank. Default: auto with --size, else float."
    ),
]
Latency = Annotated[
    str | None,
    typer.Option(help="Time of the treated maps instead: a share of the dense, 0.6, or 12ms per token."),
]
Objective = Annotated[
    str | None, typer.Option(help="Spend size, latency, or balanced: size, with nothing slower than dense.")
]
Workload = Annotated[
    str | None, typer.Option(help="Of times: decode (default), or how many tokens at once, as 512.")
]
Times = Annotated[
    Path | None, typer.Option(help="JSON table of times, read; what it lacks is measured and added.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
Page = Annotated[
    Path | None,
    typer.Option(
        "--html", help="HTML file to write as well: it needs no network; replaced by --overwrite alone."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def failures(work: Path | None = None) -> Iterator[None]:
    """Turn the errors that users cause into one line and exit code 2, and Ctrl-C into 130.

    `work` is where the state is kept from which an interrupted run goes on.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except EckartError as error:
        fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        if work is not None and work.exists():
            kept = f"the state is kept in {work}, the same command goes on from there"
            fail(f"interrupted: {kept}", INTERRUPTED)
        fail("interrupted: nothing was written", INTERRUPTED)


def fail(message: str, code: int) -> NoReturn:
    """Print `message` on stderr and end with exit code `code`."""
    Console(stderr=True, soft_wrap=True).print(message, style="red", markup=False, highlight=False)
    raise typer.Exit(code)


def show(what: Any, as_json: bool) -> None:
    """Print a result: JSON text as it is, anything else by rich."""
    if as_json:
        print(what)
    else:
        # In a pipe, tables have a fixed width and sentences are not broken.
        piped = not sys.stdout.isatty()
        Console(width=120 if piped else None).print(what, soft_wrap=piped)


def numbers(given: list[str] | None, what: str) -> tuple[float, ...]:
    """Return the numbers of an option that may be given several times, each with several between commas.

    Raises:
        ConfigError: one is no number.
    """
    parts = words(given)
    try:
        return tuple(map(float, parts))
    except ValueError as error:
        raise ConfigError(f"--{what} {','.join(parts)}: write numbers such as 0.9,0.6") from error


def words(given: list[str] | None) -> tuple[str, ...]:
    """Return the words of an option that may be given several times, each with several between commas."""
    return tuple(part.strip() for one in given or () for part in one.split(",") if part.strip())


def work_folder(out: Path) -> Path:
    """Return where a run that writes `out` keeps its state until then."""
    return out.parent / f".{out.name}.healing"
