"""The command `quantise`."""

from pathlib import Path
from typing import Annotated

import typer

from . import api, hub, quantising, recipe, render
from .bars import Bars
from .quant.correction import METHODS
from .terminal import (
    AsJson,
    Bos,
    Device,
    EvalSources,
    EvalTokens,
    Exclude,
    ForeignSources,
    GradientTokens,
    Overwrite,
    Remote,
    Seed,
    SeqLen,
    Sources,
    Storage,
    TextLicence,
    Tokens,
    failures,
    show,
)


def quantise(
    model: Annotated[str, typer.Argument(help="Hub id, folder (compressed or not) or .gguf file.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    storage: Storage = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Storage of embeddings and output head; default: the same.")
    ] = None,
    correction: Annotated[
        str | None,
        typer.Option(help=f"Low-rank corrections of whole matrices: {', '.join(METHODS)}. Default: none."),
    ] = None,
    correction_rank: Annotated[
        int | None, typer.Option(help="They take the bytes of this rank in every matrix (16).")
    ] = None,
    correction_storage: Annotated[
        str | None, typer.Option(help="Storage of their factors (int8), or float.")
    ] = None,
    text: Sources = None,
    eval_text: EvalSources = None,
    foreign_text: ForeignSources = None,
    method: Annotated[
        str | None, typer.Option(help="Whose metric errors are measured in (eckart); svd needs no text.")
    ] = None,
    exclude: Exclude = None,
    tokens: Tokens = None,
    gradient_tokens: GradientTokens = None,
    seq_len: SeqLen = None,
    eval_tokens: EvalTokens = None,
    seed: Seed = None,
    bos: Bos = None,
    dtype: Annotated[str | None, typer.Option(help="Of what is not stored in few bits.")] = None,
    device: Device = None,
    trust_remote_code: Remote = None,
    text_licence: TextLicence = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Store a model, dense or compressed, in few bits; ranks and widths stay."""
    given = {
        "model": model, "keep": 1.0, "storage": storage, "embeddings": embeddings, "method": method,
        "correction": correction, "correction_rank": correction_rank,
        "correction_storage": correction_storage,
        "text": tuple(text or ()), "eval_text": tuple(eval_text or ()),
        "foreign_text": tuple(foreign_text or ()), "exclude": tuple(exclude or ()), "tokens": tokens,
        "gradient_tokens": gradient_tokens, "seq_len": seq_len, "eval_tokens": eval_tokens, "seed": seed,
        "bos": bos, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    with failures():
        resolved = recipe.from_mapping(recipe.override({}, given), "quantise")
        hub.check_output(out, overwrite, model)
        quantising.check(resolved)
        with Bars() as bars:
            bars.watch("load", 0, 1)
            loaded = api.loaded_for(resolved)
            small, result = quantising.quantise(resolved, loaded, bars.watch)
            bars.watch("write", 0, 1)
            api.save(small, loaded.tokenizer, out, result, text_licence=text_licence, overwrite=overwrite)
            bars.watch("write", 1, 1)
        result = result.with_file_bytes(hub.weight_bytes(out))
        show(render.to_json(result.to_dict()) if as_json else result, as_json)
        if not as_json:
            print(f"written to {out}")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(quantise)
