"""The command `heal`."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from . import api, healing, hub, recipe, render
from .bars import Bars
from .terminal import (
    AsJson,
    Bos,
    Cache,
    Checkpointing,
    Device,
    ForeignSources,
    Overwrite,
    Precision,
    Remote,
    SeqLen,
    TextLicence,
    failures,
    show,
    work_folder,
)
from .training import is_main
from .yaml_files import section


def heal(
    model: Annotated[str, typer.Argument(help="The compressed folder.")],
    teacher: Annotated[str, typer.Option(help="The dense model: hub id, folder or .gguf file.")],
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            help="Text to learn from, NAME or NAME=WEIGHT: a file, a .jsonl, a datasets id, or self: what "
            "the teacher writes.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    refine: Annotated[
        list[str] | None, typer.Option(help="ranks, closed, block, logits, in order; default: logits.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on end to end (250000).")] = None,
    fit_tokens: Annotated[int | None, typer.Option(help="Tokens for closed and block (32768).")] = None,
    hold_tokens: Annotated[int | None, typer.Option(help="Tokens to decide on (8192).")] = None,
    mixture: Annotated[
        list[float] | None, typer.Option(help="closed: what to try between 0, the own map, and 1, anchored.")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="factors, blocks (default), all, or adapter on the factors.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="AdamW's rate; default: by the distance from the teacher.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows a step, over all devices (1).")] = None,
    micro: Annotated[int | None, typer.Option(help="Windows at a time on one device (1).")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both distributions (1).")] = None,
    text_loss: Annotated[
        float | None, typer.Option(help="Share of the text's own loss (0): it teaches the domain, too.")
    ] = None,
    largest: Annotated[
        int | None, typer.Option(help="Entries of the teacher's distribution to keep; default: all.")
    ] = None,
    adapter_rank: Annotated[int | None, typer.Option(help="Of --train adapter (16).")] = None,
    checkpointing: Checkpointing = None,
    precision: Precision = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a new best (4).")
    ] = None,
    seq_len: SeqLen = None,
    seed: Annotated[int | None, typer.Option(help="Order of the windows (0).")] = None,
    eval_text: Annotated[
        list[str] | None, typer.Option(help="Text to measure perplexity on, before and after.")
    ] = None,
    foreign_text: ForeignSources = None,
    eval_tokens: Annotated[int, typer.Option(help="Tokens to measure on (12288).")] = 12_288,
    bos: Bos = False,
    recipe_file: Annotated[
        Path | None,
        typer.Option("--recipe", help="YAML recipe whose heal section is taken."),
    ] = None,
    cache: Cache = None,
    dtype: Annotated[str | None, typer.Option(help="Of the output; default: as stored.")] = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    text_licence: TextLicence = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Bring a compressed model closer to the dense one. An interrupted run goes on where it was."""
    given = {
        "steps": tuple(refine or ()), "tokens": tokens, "fit_tokens": fit_tokens, "hold_tokens": hold_tokens,
        "mixtures": tuple(mixture or ()), "train": train, "rate": rate, "batch": batch, "micro": micro,
        "temperature": temperature, "text_loss": text_loss, "largest": largest, "adapter_rank": adapter_rank,
        "checkpointing": checkpointing, "precision": precision, "patience": patience, "seq_len": seq_len,
        "seed": seed,
    }  # fmt: skip
    remote = bool(trust_remote_code)
    with failures(work_folder(out)):
        settings = healing.from_mapping(recipe.override(section(recipe_file, "heal"), given), "heal")
        for source in (model, teacher):
            hub.check_output(out, overwrite, source)
        with Bars() as bars:
            bars.watch("load", 0, 1)
            found, done = api.heal(
                model, teacher, text, settings=settings, eval_text=eval_text, foreign_text=foreign_text,
                eval_tokens=eval_tokens, bos=bool(bos), work=work_folder(out), cache=cache, dtype=dtype,
                device=device, trust_remote_code=remote, watch=bars.watch,
            )  # fmt: skip
            if not is_main():
                return
            tokenizer = hub.load_tokenizer(model, trust_remote_code=remote)
            api.save(
                found, tokenizer, out, done, source=model, text_licence=text_licence, overwrite=overwrite
            )
        shutil.rmtree(work_folder(out), ignore_errors=True)
        show(render.to_json(done.to_dict()) if as_json else done, as_json)
        if not as_json:
            print(f"written to {out}")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(heal)
