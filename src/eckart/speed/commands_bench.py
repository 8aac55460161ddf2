"""The command `bench`."""

import json
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..bars import Bars
from ..errors import ConfigError
from ..terminal import AsJson, Device, Remote, failures, show
from . import run
from .options import KEEP, LAYER_TOKENS, LayerOptions, Options, Rounds

_ROUNDS, _OPTIONS, _LAYERS = Rounds(), Options(), LayerOptions()


def bench(
    model: Annotated[str, typer.Argument(help="Hub id, folder (compressed or not) or .gguf file.")],
    against: Annotated[
        str | None, typer.Option(help="A model to compare with; the two are run in turn.")
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens at once; several may be given (128).")
    ] = None,
    new_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens to decode; several may be given (32).")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows; several may be given (1).")] = None,
    runs: Annotated[int, typer.Option(help="Rounds that count, at least 3.")] = _ROUNDS.runs,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = _ROUNDS.warmup,
    loads: Annotated[
        int | None,
        typer.Option(
            help="How often each model is loaded in a process of its own, for load time and peak memory (3); "
            "0: never."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; default: as torch has it.")] = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Time single linear maps of the model's shapes instead, dense, factored and pivoted; reads "
            "no weights.",
        ),
    ] = False,
    keep: Annotated[float | None, typer.Option(help=f"--layers: of each map, in (0, 1) ({KEEP}).")] = None,
    layer_tokens: Annotated[
        list[int] | None,
        typer.Option(help=f"--layers: tokens at once ({', '.join(map(str, LAYER_TOKENS))})."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="--layers: other shapes as well, outputs x inputs: 4096x14336.")
    ] = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Measure the models under torch.compile as well, with static caches; takes minutes.",
        ),
    ] = False,
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse",
            help="Fuse low-rank models first (eckart.fuse); --layers: time fused and folded forms as well.",
        ),
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of the token ids (0).")] = None,
    dtype: Annotated[str | None, typer.Option(help="To compute in; default: float32 on a CPU.")] = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
) -> None:
    """Measure how fast a model is on this machine, and how much memory it takes."""
    whole: dict[str, Any] = {
        "against": against, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch,
        "loads": loads, "seed": seed, "compile": compile or None,
    }  # fmt: skip
    single: dict[str, Any] = {"keep": keep, "tokens": layer_tokens, "shape": shape}
    with failures():
        wanted, others = (single, whole) if layers else (whole, single)
        _refuse(others, layers)
        with Bars() as bars:
            measured: Callable[..., Any] = run.bench_layers if layers else run.bench
            found = measured(
                model, runs=runs, warmup=warmup, threads=threads, dtype=dtype, device=device,
                trust_remote_code=bool(trust_remote_code), fuse=fuse, watch=bars.watch, **_given(wanted),
            )  # fmt: skip
        if as_json:
            print(json.dumps({"command": _command(), **found.to_dict()}, indent=2))
        else:
            show(found, as_json=False)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, [])}


def _refuse(others: dict[str, Any], layers: bool) -> None:
    names = {"tokens": "layer_tokens"}
    found = [f"--{names.get(name, name).replace('_', '-')}" for name in _given(others)]
    if found:
        where = "whole models, which --layers does not run" if layers else "single linear maps: give --layers"
        raise ConfigError(f"{', '.join(found)}: for {where}")


def _command() -> str:
    return shlex.join(["eckart", *sys.argv[1:]])


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(bench)
