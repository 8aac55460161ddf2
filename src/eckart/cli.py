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
    commands_curve,
    commands_eval,
    commands_export,
    commands_heal,
    commands_params,
    commands_push,
    commands_quantise,
    commands_report,
    commands_share,
    commands_spectrum,
    commands_sweep,
    hub,
    panels,
    pipeline,
    planning,
    points,
    recipe,
    render,
    report,
    reporting,
)
from .adapt import commands_adapters, commands_tune
from .bars import Bars
from .errors import ConfigError
from .files import check_new
from .healing import Healing
from .mend import Ward
from .recipe import Recipe
from .result import Result
from .scratch import commands_pretrain
from .shelf import Shelf, shelf_to_read
from .speed import commands_bench
from .streaming import execute
from .tasks import TASKS
from .terminal import (
    EXIT_CODES,
    AsJson,
    Bos,
    DataSources,
    Depth,
    Device,
    EvalDataSources,
    EvalSources,
    Exclude,
    ForeignSources,
    FormName,
    GradientTokens,
    Include,
    Latency,
    Model,
    NoCache,
    Objective,
    OutputDtype,
    Overwrite,
    Page,
    Remote,
    RunCache,
    Seed,
    SeqLen,
    Sources,
    Storage,
    TextLicence,
    Times,
    Tokens,
    Workload,
    failures,
    show,
    work_folder,
)
from .training import is_main
from .yaml_files import read_yaml

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
    latency: Latency = None,
    objective: Objective = None,
    workload: Workload = None,
    times: Times = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(help="The smallest keep whose measured perplexity is e.g. 3% above dense, instead."),
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
    form: FormName = None,
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
    depth: Depth = None,
    share_inputs: Annotated[
        bool | None,
        typer.Option("--share-inputs/--own-inputs", help="q, k, v and gate, up may share a right factor."),
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
    cache: RunCache = None,
    no_cache: NoCache = False,
    include: Include = None,
    exclude: Exclude = None,
    multiple: Annotated[
        int | None, typer.Option(help="Ranks and widths are multiples of this (1; stock: 32).")
    ] = None,
    tokens: Tokens = None,
    gradient_tokens: GradientTokens = None,
    seq_len: SeqLen = None,
    eval_tokens: Annotated[
        int | None, typer.Option(help="Tokens to measure on, before and after (12288).")
    ] = None,
    seed: Seed = None,
    labels: Annotated[
        str | None, typer.Option(help="Loss of the gradients: on 'text' or 'sampled' labels.")
    ] = None,
    damp: Annotated[
        float | None, typer.Option(help="Damping of the metrics, in units of their mean (1e-4).")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Exponent of asvd (0.5).")] = None,
    bos: Bos = None,
    dtype: OutputDtype = None,
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
    html: Page = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model smaller and say what it cost."""
    given = {
        "model": model, "keep": keep, "of": of, "size": size, "rank": rank, "energy": energy,
        "latency": latency, "objective": objective, "workload": workload,
        "times": None if times is None else str(times),
        "max_ppl_increase": max_ppl_increase,
        "method": method, "form": form, "storage": storage, "embeddings": embeddings,
        "stock": stock, "depth": depth, "split": split, "share_inputs": share_inputs, "landmarks": landmarks,
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
        if html is not None:
            check_new(html, overwrite, "--html")
        resolved.check_text()
        if memory is not None:
            result = _stream(resolved, out, memory, text_licence, overwrite)
        else:
            result = _run(
                resolved, out, text_licence, overwrite, Ward(work_folder(out), cache),
                shelf_to_read(cache, no_cache),
            )  # fmt: skip
        if not is_main():
            return
        if html is not None:
            reporting.write_result(out.name, result, html)
        show(render.to_json(result.to_dict()) if as_json else result, as_json)
        if not as_json:
            print(f"written to {out}" + ("" if html is None else f"\nwritten to {html}"))


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
    with Bars() as bars:
        plan = planning.plan(resolved, model, stored, bars.watch)
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
    resolved: Recipe, out: Path, text_licence: str | None, overwrite: bool, ward: Ward, shelf: Shelf | None
) -> Result:
    with Bars() as bars:
        bars.watch("load", 0, 1)
        loaded = pipeline.load_for(resolved)
        model, result = points.compress(resolved, loaded, bars.watch, ward=ward, shelf=shelf)
        bars.watch("write", 0, 1)
        api.save(model, loaded.tokenizer, out, result, text_licence=text_licence, overwrite=overwrite)
        bars.watch("write", 1, 1)
    shutil.rmtree(work_folder(out), ignore_errors=True)
    return result.with_file_bytes(hub.weight_bytes(out))


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
commands_curve.register(app)
commands_sweep.register(app)
commands_heal.register(app)
commands_report.register(app)
panels.lay_out(app)


if __name__ == "__main__":
    app()
