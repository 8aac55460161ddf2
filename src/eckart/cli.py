"""The command line: parse, call, print."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from . import __version__, api, hub, pipeline, recipe, report
from .errors import ConfigError, EckartError
from .recipe import Recipe
from .result import Result

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find the low-rank structure of a language model and shrink the model by it.",
)
INTERRUPTED = 130
_SECONDS_BETWEEN_LINES = 10

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


def _version(value: bool) -> None:
    if value:
        print(f"eckart {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find the low-rank structure of a language model and shrink the model by it."""


@contextmanager
def _failures() -> Iterator[None]:
    """Turn the errors that users cause into one line and exit code 2, and Ctrl-C into 130."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except EckartError as error:
        _fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        _fail("interrupted: nothing was written", INTERRUPTED)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(message, style="red", markup=False, highlight=False)
    raise typer.Exit(code)


class _Bars:
    """Progress on stderr: bars with an estimate of the time left, or lines where there is no terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.started = self.said = time.monotonic()

    def __enter__(self) -> "_Bars":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def watch(self, stage: str, done: int, total: int) -> None:
        """Show that `stage` has done `done` of `total`."""
        if stage not in self.tasks:
            for task in self.tasks.values():
                self.progress.update(task, completed=self.progress.tasks[task].total)
            self.tasks[stage] = self.progress.add_task(stage, total=total)
            self.started, self.said = time.monotonic(), 0.0
        self.progress.update(self.tasks[stage], completed=done, total=total)
        if self.progress.disable and time.monotonic() - self.said > _SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            left = (self.said - self.started) * (total - done) / done if done else None
            estimate = "" if left is None else f", {left:.0f} s left"
            self.console.print(f"{stage}: {done} of {total}{estimate}", highlight=False)


@app.command()
def compress(
    model: Model = None,
    keep: Annotated[float | None, typer.Option(help="What remains of the parameters, in (0, 1].")] = None,
    of: Annotated[
        str | None, typer.Option(help="--keep counts the 'model' (default) or its 'linears'.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the weight files instead, e.g. 200MB (10^6).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="The same rank for every matrix instead.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of every squared spectrum to hold instead.")
    ] = None,
    text: Sources = None,
    eval_text: EvalSources = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; must not exist.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="svd, fwsvd, asvd, svd-llm, io-svd, pifa, nystrom-mlp, eckart (default)."),
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="factored, pivoted, width or mixed; default: the method's.")
    ] = None,
    stock: Annotated[
        bool | None,
        typer.Option("--stock/--no-stock", help="By width, an ordinary model that needs no eckart to load."),
    ] = None,
    depth: Annotated[
        bool | None, typer.Option("--depth/--no-depth", help="Whole blocks may be left out.")
    ] = None,
    landmarks: Annotated[
        str | None, typer.Option(help="Channels to keep: by curvature, leverage or energy.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="uniform or curvature; default: the method's.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Globs on module names to treat.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Globs on module names to leave alone.")] = None,
    multiple: Annotated[
        int | None, typer.Option(help="Ranks and widths are multiples of this (1; stock: 32).")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to calibrate on (32768).")] = None,
    gradient_tokens: Annotated[int | None, typer.Option(help="Of those, with gradients (16384).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Window length (512).")] = None,
    eval_tokens: Annotated[
        int | None, typer.Option(help="Tokens to measure on, before and after (12288).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which windows are taken (0).")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Loss of the gradients: on 'text' or 'sampled' labels.")
    ] = None,
    damp: Annotated[
        float | None, typer.Option(help="Damping of the metrics, in units of their mean (1e-4).")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Exponent of asvd (0.5).")] = None,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Begin windows with the begin token.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the output; default: the source's, bfloat16 for GGUF.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, mps, cpu; default: the first that is there.")
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option("--trust-remote-code/--no-remote-code", help="Run code that the model brings."),
    ] = None,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="YAML recipe; options go over it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a model smaller and say what it cost."""
    given = {
        "model": model, "keep": keep, "of": of, "size": size, "rank": rank, "energy": energy,
        "method": method, "form": form, "stock": stock, "depth": depth, "landmarks": landmarks,
        "allocation": allocation, "multiple": multiple,
        "text": tuple(text or ()), "eval_text": tuple(eval_text or ()),
        "include": tuple(include or ()), "exclude": tuple(exclude or ()), "tokens": tokens,
        "gradient_tokens": gradient_tokens, "seq_len": seq_len, "eval_tokens": eval_tokens,
        "seed": seed, "labels": labels, "damp": damp, "alpha": alpha, "bos": bos, "dtype": dtype,
        "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    with _failures():
        resolved = _recipe(recipe_file, given)
        if dry_run:
            _print_plan(resolved, as_json)
            return
        if resolved.model is None:
            raise ConfigError("no MODEL: give a hub id, a folder or a .gguf file")
        if out is None:
            raise ConfigError("no --out: name the folder to write, or pass --dry-run to see the plan")
        hub.check_output(out, overwrite, resolved.model)
        resolved.check_text()
        result = _run(resolved, out, overwrite)
        _show(report.to_json(result.to_dict()) if as_json else result, as_json)
        if not as_json:
            print(f"written to {out}")


def _recipe(path: Path | None, given: dict[str, Any]) -> Recipe:
    base = {} if path is None else recipe.read_yaml(path)
    where = "command line" if path is None else str(path)
    return recipe.from_mapping(recipe.override(base, given), where)


def _print_plan(resolved: Recipe, as_json: bool) -> None:
    if resolved.model is None:
        raise ConfigError("no MODEL: give a hub id, a folder or a .gguf file")
    remote = resolved.trust_remote_code
    model = hub.skeleton(resolved.model, trust_remote_code=remote)
    stored = hub.stored_dtype(resolved.model, trust_remote_code=remote)
    plan = pipeline.plan(resolved, model, stored)
    _show(json.dumps(report.plan_dict(plan), indent=2) if as_json else report.plan_table(plan), as_json)


def _run(resolved: Recipe, out: Path, overwrite: bool) -> Result:
    with _Bars() as bars:
        bars.watch("load", 0, 1)
        loaded = pipeline.load_for(resolved)
        model, result = pipeline.finish(resolved, pipeline.prepare(resolved, loaded, bars.watch))
        bars.watch("write", 0, 1)
        api.save(model, loaded.tokenizer, out, result, overwrite=overwrite)
        bars.watch("write", 1, 1)
    return result.with_file_bytes(hub.weight_bytes(out))


def _show(what: Any, as_json: bool) -> None:
    if as_json:
        print(what)
    else:
        # In a pipe, tables have a fixed width and sentences are not broken.
        piped = not sys.stdout.isatty()
        Console(width=120 if piped else None).print(what, soft_wrap=piped)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, folder (compressed or not) or .gguf file.")],
    text: Annotated[list[str], typer.Option("--text", help="Text: a file, a .jsonl, or a datasets id.")],
    tokens: Annotated[int, typer.Option(help="Tokens from the start of the text.")] = 24_576,
    seq_len: Annotated[int, typer.Option(help="Window length.")] = 512,
    against: Annotated[str | None, typer.Option(help="A model to compare with.")] = None,
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="Begin windows with the begin token.")] = False,
    dtype: Annotated[str | None, typer.Option(help="To compute in; default: float32 on a CPU.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, mps, cpu; default: the first that is there.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code/--no-remote-code", help="Run code that the model brings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity, and how far a model is from another."""
    with _failures():
        options: dict[str, Any] = {
            "tokens": tokens, "seq_len": seq_len, "bos": bos, "dtype": dtype, "device": device,
            "against": against, "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        with _Bars() as bars:
            bars.watch("load", 0, 1)
            found = api.evaluate(
                model, text, watch=lambda done, total: bars.watch("evaluate", done, total), **options
            )
        if as_json:
            print(report.to_json({"model": model, "text": text, **options, "result": asdict(found)}))
        else:
            _show(report.evaluation_table(model, found, against), as_json=False)


if __name__ == "__main__":
    app()
