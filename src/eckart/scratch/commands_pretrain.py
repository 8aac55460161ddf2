"""The command that trains from scratch."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import recipe, render
from ..adapt.session import work_folder
from ..bars import Bars
from ..terminal import (
    AsJson,
    Checkpointing,
    Device,
    Overwrite,
    Precision,
    Remote,
    TextLicence,
    failures,
    show,
)
from ..training import is_main
from ..yaml_files import section
from . import pretrain as session
from . import report_pretrain
from .options import (
    Clip,
    Epochs,
    EvalData,
    Evaluations,
    Hold,
    Optimizer,
    OptimizerArgs,
    Penalty,
    PenaltyKeep,
    Schedule,
    Seed,
    Steps,
    Strength,
    Warmup,
    penalty_of,
)
from .pretraining import from_mapping


def pretrain(
    config: Annotated[str, typer.Argument(help="Folder or hub id whose config.json says the architecture.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    data: Annotated[
        list[str] | None, typer.Option(help="What to learn from: .txt, .jsonl or a datasets id.")
    ] = None,
    eval_data: EvalData = None,
    hold: Hold = None,
    keep: Annotated[
        float | None, typer.Option(help="What remains of the parameters, in (0, 1]; default: full rank.")
    ] = None,
    of: Annotated[
        str | None, typer.Option(help="--keep counts the 'model' (default) or its 'linears'.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="The same rank for every matrix instead.")] = None,
    form: Annotated[str | None, typer.Option(help="factored (default) or pivoted.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Globs on module names to make low-rank.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Globs on what stays full rank.")] = None,
    multiple: Annotated[int | None, typer.Option(help="Ranks are multiples of this (1).")] = None,
    dense_steps: Annotated[
        int | None,
        typer.Option(help="Steps at full rank first; then matrices are factored and it goes on."),
    ] = None,
    frobenius: Annotated[
        float | None, typer.Option(help="Decay of the products of factors; default: --weight-decay.")
    ] = None,
    penalty: Penalty = None,
    strength: Strength = None,
    penalty_keep: PenaltyKeep = None,
    schedule: Schedule = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: that of the config.")
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="Train a tokenizer of so many tokens on --data; 257: bytes.")
    ] = None,
    epochs: Epochs = None,
    steps: Steps = None,
    rate: Annotated[float | None, typer.Option(help="AdamW's rate after warm-up (1e-3).")] = None,
    warmup: Warmup = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's (0.1).")] = None,
    clip: Clip = None,
    batch: Annotated[int | None, typer.Option(help="Windows a step, over all devices (16).")] = None,
    micro: Annotated[int | None, typer.Option(help="Windows at a time on one device (8).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Window length (256).")] = None,
    evaluations: Evaluations = None,
    eval_limit: Annotated[int | None, typer.Option(help="Held-out windows that are used (256).")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a new best (10).")
    ] = None,
    optimizer: Optimizer = None,
    optimizer_args: OptimizerArgs = None,
    checkpointing: Checkpointing = None,
    precision: Precision = None,
    dtype: Annotated[str | None, typer.Option(help="Of the output (float32).")] = None,
    seed: Seed = None,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="YAML recipe whose pretrain section is taken.")
    ] = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    text_licence: TextLicence = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from scratch, low-rank or not. An interrupted run goes on where it was."""
    given: dict[str, Any] = {
        "data": tuple(data or ()), "eval_data": tuple(eval_data or ()), "hold": hold, "keep": keep, "of": of,
        "rank": rank, "form": form, "include": tuple(include or ()), "exclude": tuple(exclude or ()),
        "multiple": multiple, "dense_steps": dense_steps, "frobenius": frobenius, "tokenizer": tokenizer,
        "vocabulary": vocabulary, "epochs": epochs, "steps": steps, "rate": rate, "warmup": warmup,
        "weight_decay": weight_decay, "clip": clip, "batch": batch, "micro": micro, "seq_len": seq_len,
        "evaluations": evaluations, "eval_limit": eval_limit, "patience": patience, "optimizer": optimizer,
        "optimizer_args": optimizer_args, "checkpointing": checkpointing, "precision": precision,
        "dtype": dtype, "seed": seed,
    }  # fmt: skip
    work = work_folder(out)
    with failures(work):
        base = section(recipe_file, "pretrain")
        given["penalty"] = penalty_of(base, penalty, strength, penalty_keep, schedule)
        with Bars() as bars:
            bars.watch("load", 0, 1)
            settings = from_mapping(recipe.override(base, given))
            _, done = session.pretrain(
                config, settings, out=out, work=work, device=device,
                trust_remote_code=bool(trust_remote_code), text_licence=text_licence,
                overwrite=overwrite, watch=bars.watch,
                before=lambda prospect: bars.say(report_pretrain.prospect_table(prospect)),
            )  # fmt: skip
        if not is_main():
            return
        shutil.rmtree(work, ignore_errors=True)
        values = done.to_dict()
        show(render.to_json(values) if as_json else report_pretrain.result_table(values, done.tuned), as_json)
        if not as_json:
            print(f"written to {out}")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(pretrain)
