"""The commands `share`, `tie` and `untie`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import api, api_sharing, groups, hub, render
from .bars import Bars
from .joined import Joined, Tied
from .stages import Watch
from .terminal import (
    AsJson,
    Bos,
    Device,
    EvalSources,
    EvalTokens,
    ForeignSources,
    GradientTokens,
    Overwrite,
    Remote,
    Seed,
    SeqLen,
    Sources,
    TextLicence,
    Tokens,
    failures,
    show,
)

Source = Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.")]
Out = Annotated[Path, typer.Option(help="Folder to write; must not exist.")]
Method = Annotated[
    str | None,
    typer.Option(help="Whose metric is fitted in: eckart (default), svd-llm, or svd, which needs no text."),
]
Dtype = Annotated[str | None, typer.Option(help="Of the output; default: as stored.")]


def share(
    model: Source,
    group: Annotated[
        str,
        typer.Option("--groups", help="Blocks that share: 0-3,4-7 or 0+2+4 or every:2 or all."),
    ],
    out: Out,
    what: Annotated[str, typer.Option(help=f"What of them: {', '.join(groups.WHAT)}.")] = "blocks",
    differences: Annotated[
        int, typer.Option(help="Rank of what each matrix has on top of what it shares.")
    ] = 0,
    scales: Annotated[bool, typer.Option("--scales", help="Each matrix scales the shared outputs.")] = False,
    start: Annotated[
        str,
        typer.Option(help="fit: to the weights that are there; first: those of the first, to be trained."),
    ] = "fit",
    text: Sources = None,
    eval_text: EvalSources = None,
    foreign_text: ForeignSources = None,
    method: Method = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Globs on matrices to leave alone.")] = None,
    tokens: Tokens = None,
    gradient_tokens: GradientTokens = None,
    seq_len: SeqLen = None,
    eval_tokens: EvalTokens = None,
    damp: Annotated[float | None, typer.Option(help="Added to the metrics, in units of their mean.")] = None,
    seed: Seed = None,
    bos: Bos = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Remote = None,
    text_licence: TextLicence = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Let blocks of a model share their matrices, fitted to all of them."""

    def make(watch: Watch) -> Any:
        return api_sharing.share(
            model, group, what=what, differences=differences, scales=scales, start=start,  # type: ignore[arg-type]
            text=text, eval_text=eval_text, foreign_text=foreign_text, method=method, exclude=exclude,
            tokens=tokens, gradient_tokens=gradient_tokens, seq_len=seq_len, eval_tokens=eval_tokens,
            damp=damp, seed=seed, bos=bos, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, watch=watch,
        )  # fmt: skip

    _write(make, model, out, trust_remote_code, text_licence, overwrite, as_json)


def tie(
    model: Source,
    out: Out,
    text: Sources = None,
    eval_text: EvalSources = None,
    method: Method = None,
    tokens: Tokens = None,
    gradient_tokens: GradientTokens = None,
    seq_len: SeqLen = None,
    eval_tokens: EvalTokens = None,
    seed: Seed = None,
    bos: Bos = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Remote = None,
    text_licence: TextLicence = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make embeddings and output head one matrix, fitted to both."""

    def make(watch: Watch) -> Any:
        return api_sharing.tie(
            model, text=text, eval_text=eval_text, method=method, tokens=tokens,
            gradient_tokens=gradient_tokens, seq_len=seq_len, eval_tokens=eval_tokens, seed=seed,
            bos=bos, dtype=dtype, device=device, trust_remote_code=trust_remote_code, watch=watch,
        )  # fmt: skip

    _write(make, model, out, trust_remote_code, text_licence, overwrite, as_json)


def untie(
    model: Source,
    out: Out,
    device: Device = None,
    trust_remote_code: Remote = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Give the output head a matrix of its own, with the values of the embeddings."""

    def make(watch: Watch) -> Any:
        return api_sharing.untie(model, device=device, trust_remote_code=trust_remote_code)

    _write(make, model, out, trust_remote_code, None, overwrite, as_json)


def _write(
    make: Callable[[Watch], tuple[Any, Joined | Tied]],
    source: str,
    out: Path,
    trust_remote_code: bool | None,
    text_licence: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the model that `make` returns, and show what it found."""
    with failures():
        hub.check_output(out, overwrite, source)
        with Bars() as bars:
            bars.watch("load", 0, 1)
            model, found = make(bars.watch)
            bars.watch("write", 0, 1)
            tokenizer = hub.load_tokenizer(source, trust_remote_code=bool(trust_remote_code))
            api.save(
                model, tokenizer, out, found, source=source, text_licence=text_licence, overwrite=overwrite
            )
            bars.watch("write", 1, 1)
        done = found.with_file_bytes(hub.weight_bytes(out)) if isinstance(found, Joined) else found
        show(render.to_json(done.to_dict()) if as_json else done, as_json)
        if not as_json:
            print(f"written to {out}")


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (share, tie, untie):
        app.command()(command)
