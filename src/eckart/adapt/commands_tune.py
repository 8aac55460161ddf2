"""The command that tunes."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import recipe, render
from ..bars import Bars
from ..scratch.options import (
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
from . import report_tune, session, tuning


def tune(
    model: Annotated[str, typer.Argument(help="Hub id, folder (compressed or not) or .gguf file.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="What to learn from: .txt, .jsonl, .tsv (text, tab, label) or a datasets id."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="lora (default), dora, qlora, adalora or full.")] = None,
    eval_data: EvalData = None,
    hold: Hold = None,
    task: Annotated[
        str | None, typer.Option(help="generation (default), or classification: label words are scored.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option(help="What a column is called in the data, e.g. prompt=question.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="classification: what comes before the label word; has {text}.")
    ] = None,
    labels: Annotated[
        list[str] | None, typer.Option(help="classification: the label words, in the order of their numbers.")
    ] = None,
    rank: Annotated[str | None, typer.Option(help="Of every adapted matrix (8), or auto.")] = None,
    auto_rank: Annotated[
        int | None, typer.Option(help="--rank auto: as many parameters as this uniform rank (8).")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="--rank auto: parameters instead.")] = None,
    start_rank: Annotated[
        int | None, typer.Option(help="adalora: rank at the start; default: 1.5 times --rank.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="The scale is alpha / rank (2 rank).")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the adapter's input (0.05).")] = None,
    rslora: Annotated[
        bool | None, typer.Option("--rslora/--no-rslora", help="Divide alpha by the root of the rank.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="default, gaussian, pissa, olora, eva, corda; qlora: residual, lqer, loftq."),
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="Globs on module names; default: every linear map in the blocks.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Globs on what to leave out.")] = None,
    double: Annotated[
        bool | None, typer.Option("--double/--single", help="qlora: quantise the constants as well.")
    ] = None,
    epochs: Epochs = None,
    steps: Steps = None,
    rate: Annotated[
        float | None, typer.Option(help="AdamW's rate; default by method: 5e-4, adalora 2e-3, full 3e-5.")
    ] = None,
    warmup: Warmup = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's (0).")] = None,
    clip: Clip = None,
    batch: Annotated[int | None, typer.Option(help="Examples a step, over all devices (16).")] = None,
    micro: Annotated[int | None, typer.Option(help="Examples at a time on one device (8).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of an example at most (512).")] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Several examples in one row.")
    ] = None,
    evaluations: Evaluations = None,
    eval_limit: Annotated[int | None, typer.Option(help="Held-out examples that are used (512).")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a new best (3).")
    ] = None,
    first_batches: Annotated[
        int | None, typer.Option(help="Batches that initialisation and --rank auto look at (8).")
    ] = None,
    penalty: Penalty = None,
    strength: Strength = None,
    penalty_keep: PenaltyKeep = None,
    schedule: Schedule = None,
    optimizer: Optimizer = None,
    optimizer_args: OptimizerArgs = None,
    checkpointing: Checkpointing = None,
    tight: Annotated[
        bool | None,
        typer.Option("--tight/--loose", help="Linux CPU: freed memory goes back at once; a quarter slower."),
    ] = None,
    precision: Precision = None,
    paged: Annotated[
        bool | None, typer.Option("--paged/--no-paged", help="qlora on cuda: moments that page out.")
    ] = None,
    seed: Seed = None,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="YAML recipe whose tune section is taken.")
    ] = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    text_licence: TextLicence = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tune a model, or an adapter on it. An interrupted run goes on where it was."""
    given: dict[str, Any] = {
        "data": tuple(data or ()), "method": method, "eval_data": tuple(eval_data or ()), "hold": hold,
        "task": task, "columns": _columns(columns), "template": template, "labels": tuple(labels or ()),
        "rank": _rank(rank), "auto_rank": auto_rank, "budget": budget, "start_rank": start_rank,
        "alpha": alpha, "dropout": dropout, "rslora": rslora, "init": init, "targets": tuple(targets or ()),
        "exclude": tuple(exclude or ()), "double": double, "epochs": epochs, "steps": steps, "rate": rate,
        "warmup": warmup, "weight_decay": weight_decay, "clip": clip, "batch": batch, "micro": micro,
        "seq_len": seq_len, "packing": packing, "evaluations": evaluations, "eval_limit": eval_limit,
        "patience": patience, "first_batches": first_batches, "checkpointing": checkpointing, "tight": tight,
        "precision": precision, "paged": paged, "seed": seed,
        "optimizer": optimizer, "optimizer_args": optimizer_args,
    }  # fmt: skip
    work = session.work_folder(out)
    with failures(work):
        base = section(recipe_file, "tune")
        given["penalty"] = penalty_of(base, penalty, strength, penalty_keep, schedule)
        settings = tuning.from_mapping(recipe.override(base, given))
        with Bars() as bars:
            bars.watch("load", 0, 1)
            _, done = session.tune(
                model, settings, out=out, work=work, device=device, trust_remote_code=bool(trust_remote_code),
                text_licence=text_licence, overwrite=overwrite, watch=bars.watch,
                before=lambda prospect: bars.say(report_tune.prospect_table(prospect)),
            )  # fmt: skip
        if not is_main():
            return
        shutil.rmtree(work, ignore_errors=True)
        show(render.to_json(done.to_dict()) if as_json else report_tune.tuned_table(done), as_json)
        if not as_json:
            print(f"written to {out}")


def _rank(given: str | None) -> Any:
    return int(given) if given is not None and given.isdigit() else given


def _columns(given: list[str] | None) -> dict[str, str] | None:
    """Return {what eckart calls it: what the data calls it}."""
    if not given:
        return None
    found = {}
    for pair in given:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise typer.BadParameter(f"--columns {pair}: expected NAME=COLUMN, e.g. prompt=question")
        found[name] = column
    return found


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(tune)
