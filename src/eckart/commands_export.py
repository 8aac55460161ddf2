"""The command `export`."""

from pathlib import Path
from typing import Annotated

import typer

from . import exporting, render
from .bars import Bars
from .exports.options import BLOCKS
from .terminal import AsJson, Overwrite, Remote, failures, show


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder that eckart wrote, or hub id of one; for engines any model or .gguf file."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    to: Annotated[str, typer.Option(help=f"Form: {', '.join(exporting.TARGETS)}.")] = exporting.DENSE,
    storage: Annotated[
        str | None,
        typer.Option(help="Of weights for an engine: float32 (default), int8, int4; float16 for openvino."),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            help=f"Weights with a common scale, {', '.join(map(str, BLOCKS))} (32): int4, and int8 for onnx."
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder to keep traced graphs in, for later exports of the same model."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights of a dense model; default: as stored.")
    ] = None,
    trust_remote_code: Remote = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model for programs that know no eckart: dense, where the saving is gone, or for an engine.

    dense multiplies the factors of a compressed model out. onnx (onnxruntime) and openvino keep them, in
    floats or few bits, with a cache of keys and values, checked against PyTorch.
    """
    with failures():
        with Bars() as bars:
            found = exporting.export(
                model, out, to, dtype=dtype, storage=storage, block=block, cache=cache,
                trust_remote_code=bool(trust_remote_code), overwrite=overwrite, watch=bars.watch,
            )  # fmt: skip
        show(render.to_json(found.to_dict()) if as_json else found, as_json)
        if not as_json:
            print(f"written to {out}")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(export)
