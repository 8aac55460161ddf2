"""The command line: parse, call, print."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from . import (
    __version__,
    api,
    commands_eval,
    commands_export,
    commands_params,
    commands_push,
    commands_quantise,
    commands_share,
    commands_spectrum,
    healing,
    hub,
    pipeline,
    recipe,
    render,
    report,
)
from .adapt import commands_adapters, commands_tune
from .bars import Bars
from .errors import ConfigError
from .healing import Healing
from .mend import Ward
from .recipe import Recipe
from .result import Result
from .scratch import commands_pretrain
from .speed import commands_bench
from .streaming import execute
from .tasks import TASKS
from .terminal import (
    EXIT_CODES,
    AsJson,
    Bos,
    Cache,
    Checkpointing,
    DataSources,
    Device,
    EvalDataSources,
    EvalSources,
    ForeignSources,
    Model,
    Overwrite,
    Precision,
    Remote,
    Sources,
    Storage,
    TextLicence,
    failures,
    show,
    work_folder,
)
from .training import is_main
from .yaml_files import read_yaml, section

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find the low-rank structure of a language model and shrink the model by it.",
    epilog=EXIT_CODES,
)


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
    task: Annotated[
        str | None, typer.Option(help=f"What the model is for: {', '.join(TASKS)}; default: as stored.")
    ] = None,
    text: Sources = None,
    eval_text: EvalSources = None,
    data: DataSources = None,
    eval_data: EvalDataSources = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; must not exist.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="svd, fwsvd, asvd, svd-llm, io-svd, pifa, nystrom-mlp, eckart (default)."),
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="factored, pivoted, width or mixed; default: the method's.")
    ] = None,
    storage: Storage = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Storage of embeddings and output head; default: the same.")
    ] = None,
    stock: Annotated[
        bool | None,
        typer.Option("--stock/--no-stock", help="By width, an ordinary model that needs no eckart to load."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="none|fused", help="Treat q, k, v of one matrix apart.")
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
    foreign_text: ForeignSources = None,
    heal: Annotated[
        bool, typer.Option("--heal", help="Refine afterwards, with default settings or the recipe's.")
    ] = False,
    cache: Cache = None,
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
    bos: Bos = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the output; default: the source's, bfloat16 for GGUF.")
    ] = None,
    device: Device = None,
    trust_remote_code: Remote = None,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="YAML recipe; options go over it.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Go block by block, from weight files to weight files, within e.g. 6GB."),
    ] = None,
    text_licence: TextLicence = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model smaller and say what it cost."""
    given = {
        "model": model, "keep": keep, "of": of, "size": size, "rank": rank, "energy": energy,
        "method": method, "form": form, "storage": storage, "embeddings": embeddings,
        "stock": stock, "depth": depth, "split": split, "landmarks": landmarks,
        "allocation": allocation, "multiple": multiple,
        "task": task, "data": tuple(data or ()), "eval_data": tuple(eval_data or ()),
        "text": tuple(text or ()), "eval_text": tuple(eval_text or ()),
        "foreign_text": tuple(foreign_text or ()),
        "include": tuple(include or ()), "exclude": tuple(exclude or ()), "tokens": tokens,
        "gradient_tokens": gradient_tokens, "seq_len": seq_len, "eval_tokens": eval_tokens,
        "seed": seed, "labels": labels, "damp": damp, "alpha": alpha, "bos": bos, "dtype": dtype,
        "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    with failures(None if out is None else _kept_in(out, memory)):
        resolved = _recipe(recipe_file, given)
        if heal and resolved.heal is None:
            resolved = replace(resolved, heal=Healing())
        if dry_run:
            _print_plan(resolved, as_json)
            return
        if resolved.model is None:
            raise ConfigError("no MODEL: give a hub id, a folder or a .gguf file")
        if out is None:
            raise ConfigError("no --out: name the folder to write, or pass --dry-run to see the plan")
        hub.check_output(out, overwrite, resolved.model)
        resolved.check_text()
        if memory is not None:
            result = _stream(resolved, out, memory, text_licence, overwrite)
        else:
            result = _run(resolved, out, text_licence, overwrite, cache)
        if not is_main():
            return
        show(render.to_json(result.to_dict()) if as_json else result, as_json)
        if not as_json:
            print(f"written to {out}")


def _recipe(path: Path | None, given: dict[str, Any]) -> Recipe:
    base = {} if path is None else read_yaml(path)
    where = "command line" if path is None else str(path)
    return recipe.from_mapping(recipe.override(base, given), where)


def _print_plan(resolved: Recipe, as_json: bool) -> None:
    if resolved.model is None:
        raise ConfigError("no MODEL: give a hub id, a folder or a .gguf file")
    remote = resolved.trust_remote_code
    model = hub.skeleton(resolved.model, task=resolved.task, trust_remote_code=remote)
    stored = hub.stored_dtype(resolved.model, trust_remote_code=remote)
    plan = pipeline.plan(resolved, model, stored)
    show(json.dumps(report.plan_dict(plan), indent=2) if as_json else report.plan_table(plan), as_json)


def _kept_in(out: Path, memory: str | None) -> Path:
    """Return where an interrupted run finds what is finished."""
    return work_folder(out) if memory is None else execute.work_folder(out)


def _stream(resolved: Recipe, out: Path, memory: str, text_licence: str | None, overwrite: bool) -> Result:
    with Bars() as bars:
        return execute.compress_to(
            resolved, out, memory=memory, text_licence=text_licence, overwrite=overwrite, watch=bars.watch
        )


def _run(
    resolved: Recipe, out: Path, text_licence: str | None, overwrite: bool, cache: Path | None
) -> Result:
    work = work_folder(out)
    with Bars() as bars:
        bars.watch("load", 0, 1)
        loaded = pipeline.load_for(resolved)
        prepared = pipeline.prepare(resolved, loaded, bars.watch)
        model, result = pipeline.finish(resolved, prepared, Ward(work, cache))
        bars.watch("write", 0, 1)
        api.save(model, loaded.tokenizer, out, result, text_licence=text_licence, overwrite=overwrite)
        bars.watch("write", 1, 1)
    shutil.rmtree(work, ignore_errors=True)
    return result.with_file_bytes(hub.weight_bytes(out))


@app.command()
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
        list[float] | None, typer.Option(help="closed: what to try between own map (0) and anchored (1).")
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
    seq_len: Annotated[int | None, typer.Option(help="Window length (512).")] = None,
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


commands_eval.register(app)
commands_push.register(app)
commands_tune.register(app)
commands_adapters.register(app)
commands_params.register(app)
commands_export.register(app)
commands_quantise.register(app)
commands_pretrain.register(app)
commands_share.register(app)
commands_spectrum.register(app)
commands_bench.register(app)


if __name__ == "__main__":
    app()
