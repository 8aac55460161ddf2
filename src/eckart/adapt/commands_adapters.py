"""The commands that take adapters apart: extract, resize, merge, diff."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from .. import render
from ..bars import Bars
from ..terminal import (
    AsJson,
    Bos,
    Device,
    EvalSources,
    Overwrite,
    Remote,
    Sources,
    TextLicence,
    failures,
    show,
)
from . import difference, toolbox
from .extract import Carry

Out = Annotated[Path, typer.Option(help="Folder to write; must not exist.")]
Tokens = Annotated[int, typer.Option(help="Tokens of --text that weight what is cut.")]
EvalTokens = Annotated[int, typer.Option(help="Tokens to measure on.")]
Length = Annotated[int, typer.Option(help="Window length.")]
Damp = Annotated[float, typer.Option(help="Damping of the metrics, in units of their mean.")]
OutDtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")]
Rank = Annotated[int | None, typer.Option(help="At most this rank for every matrix.")]
Energy = Annotated[
    float | None, typer.Option(help="Share of every squared spectrum to hold instead, in (0, 1].")
]
Params = Annotated[
    int | None, typer.Option(help="Parameters of all factors instead, shared for the least error.")
]


def extract(
    base: Annotated[str, typer.Argument(help="The model before fine-tuning: hub id, folder or .gguf file.")],
    tuned: Annotated[str, typer.Argument(help="The same after it.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    params: Params = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="Terms above the optimal threshold for noise instead.")
    ] = False,
    carry: Annotated[
        str,
        typer.Option(help="Other tensors that differ go along whole: all, small (norms, biases) or none."),
    ] = "small",
    text: Sources = None,
    eval_text: EvalSources = None,
    tokens: Tokens = 32_768,
    eval_tokens: EvalTokens = 12_288,
    seq_len: Length = 512,
    bos: Bos = False,
    damp: Damp = 1e-4,
    dtype: OutDtype = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    text_licence: TextLicence = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Take a LoRA adapter out of a fully fine-tuned model, weighted by its inputs where there is text."""
    with failures():
        with Bars() as bars:
            _, done = toolbox.extract(
                base, tuned, out=out, rank=rank, energy=energy, params=params, noise=noise,
                carry=cast(Carry, carry), text=text, eval_text=eval_text, tokens=tokens,
                eval_tokens=eval_tokens, seq_len=seq_len, bos=bool(bos), damp=damp, dtype=dtype,
                device=device, trust_remote_code=bool(trust_remote_code), text_licence=text_licence,
                overwrite=overwrite, watch=bars.watch,
            )  # fmt: skip
        _end(done, out, as_json)


def resize(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter: folder or hub id.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    params: Params = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the weight file instead, e.g. 2MB (10^6).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Change the ranks of an adapter to the best approximation of its updates there."""
    with failures():
        _, done = toolbox.resize(
            adapter, out=out, rank=rank, energy=energy, params=params, size=size, overwrite=overwrite
        )
        _end(done, out, as_json)


def merge(
    model: Annotated[str, typer.Argument(help="Hub id, folder (compressed or not) or .gguf file.")],
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter: folder or hub id.")],
    out: Out,
    text: Sources = None,
    eval_text: EvalSources = None,
    tokens: Tokens = 32_768,
    eval_tokens: EvalTokens = 12_288,
    seq_len: Length = 512,
    bos: Bos = False,
    damp: Damp = 1e-4,
    dtype: OutDtype = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    text_licence: TextLicence = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into a model; a compressed one keeps its ranks."""
    with failures():
        with Bars() as bars:
            _, done = toolbox.merge(
                model, adapter, out=out, text=text, eval_text=eval_text, tokens=tokens,
                eval_tokens=eval_tokens, seq_len=seq_len, bos=bool(bos), damp=damp, dtype=dtype,
                device=device, trust_remote_code=bool(trust_remote_code), text_licence=text_licence,
                overwrite=overwrite, watch=bars.watch,
            )  # fmt: skip
        _end(done, out, as_json)


def diff(
    first: Annotated[str, typer.Argument(help="Hub id, folder (compressed or not) or .gguf file.")],
    second: Annotated[str, typer.Argument(help="The model to compare it with.")],
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
) -> None:
    """Compare two models tensor by tensor: how large the difference is, and how low-rank."""
    with failures():
        with Bars() as bars:
            found = difference.diff(
                first,
                second,
                trust_remote_code=bool(trust_remote_code),
                watch=lambda done, total: bars.watch("compare", done, total),
            )
        show(render.to_json(found.to_dict()) if as_json else found, as_json)


def _end(done: Any, out: Path, as_json: bool) -> None:
    show(render.to_json(done.to_dict()) if as_json else done, as_json)
    if not as_json:
        print(f"written to {out}")


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (extract, resize, merge, diff):
        app.command()(command)
