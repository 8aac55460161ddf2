"""`eckart params`: how many parameters adapters have, for published models or for yours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Group, RenderableType
from rich.text import Text
from transformers import AutoModelForCausalLM

from . import hub, render
from .adapt import sizes
from .declaration import NAME, EckartConfig
from .errors import ConfigError
from .plugin import EckartQuantizer
from .skeleton import build_skeleton
from .terminal import AsJson, Remote, failures, show

_NONE = "no such matrices"
_GPT3 = 3, "q, v", 4
"""LoRA's own: GPT-3 at rank 4 on queries and values (Hu et al. 2021, section 5.5)."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(params)


def params(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, folder (compressed or not) or .gguf file; default: published models."),
    ] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Ranks to show (8, 16, 64).")] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="Globs on module names, for a column of their own.")
    ] = None,
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
) -> None:
    """Count the parameters of adapters, exactly, from shapes: no weights are loaded."""
    with failures():
        ranks = tuple(rank or sizes.RANKS)
        if min(ranks) < 1:
            raise ConfigError(f"rank {min(ranks)}: must be at least 1")
        if model is None and targets:
            raise ConfigError("targets are for a MODEL: give a hub id, a folder or a .gguf file")
        shown = [one.selections() for one in sizes.PUBLISHED]
        if model is not None:
            made = skeleton(model, trust_remote_code=bool(trust_remote_code))
            shown = [sizes.selections(Path(model).name, made, tuple(targets or ()))]
        if as_json:
            show(render.to_json(values(shown, ranks)), as_json)
        else:
            show(tables(shown, ranks, _published() if model is None else ()), as_json)


def skeleton(source: str, *, trust_remote_code: bool) -> Any:
    """Return the model of `source` on the meta device, compressed as it is.

    Raises:
        ModelError: it cannot be had.
    """
    config = hub.load_config(source, trust_remote_code=trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict) or stored.get("quant_method") != NAME:
        return hub.skeleton(source, trust_remote_code=trust_remote_code)
    del config.quantization_config
    declared = EckartConfig.from_dict(stored)
    config = EckartQuantizer(declared).update_attn_implementation(config)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    build_skeleton(made, declared)
    return made


def _published() -> tuple[str, ...]:
    index, column, rank = _GPT3
    model = sizes.PUBLISHED[index].selections()
    count = model.count(column, rank) or 1
    return (
        f"{model.name} at rank {rank} on {column}: {count:,}, {175e9 / count:,.0f} times fewer than 175 "
        "billion: LoRA's 10,000 times",
        f"the widely copied 2, 4 and 16 million of a 7B model are the column {sizes.ONE}: 2 d r a layer",
    )


def tables(shown: Sequence[sizes.Selections], ranks: Sequence[int], notes: Sequence[str]) -> RenderableType:
    """Return what is printed: counts, break-even ranks, and where 0.1 to 1 % holds."""
    columns = list(shown[0].columns)
    prefixes = [f"{one.name}, " if len(shown) > 1 else "" for one in shown]
    counts = [
        [f"{prefix}rank {rank}", *(_cell(one, column, rank) for column in columns)]
        for prefix, one in zip(prefixes, shown, strict=True)
        for rank in ranks
    ]
    ranges = [[one.name, *(_range(one, column) for column in columns)] for one in shown]
    shapes = [row for prefix, one in zip(prefixes, shown, strict=True) for row in _shapes(prefix, one)]
    found = sizes.verdict(shown, ranks)
    of = "the model's" if len(shown) > 1 else f"the {shown[0].parameters:,} of {shown[0].name}"
    title = f"LoRA's parameters, and their share of {of}"
    said = (
        f"0.1 to 1 % of the parameters, as is often said, is true of {found['within']} of the "
        f"{sum(found.values())} adapters above (*); {found['less']} have less, {found['more']} have more."
    )
    return Group(
        render.table(title, ["", *columns], counts),
        render.table("Ranks at which they are 0.1 to 1 % of the parameters", ["", *columns], ranges),
        render.table(
            "Break-even rank mn / (m + n): there two factors are as large as the matrix",
            ["matrices", "m x n", "how many", "break-even rank"], shapes,
        ),
        *map(Text, [said, *notes]),
    )  # fmt: skip


def _range(one: sizes.Selections, column: str) -> str:
    found = one.within(column)
    if found is None:
        return _NONE
    least, most = found
    return f"{least:,} to {most:,}" if least <= most else "none"


def _shapes(prefix: str, one: sizes.Selections) -> list[list[str]]:
    """Return a row for each shape of a matrix, with the names of those that have it."""
    names: dict[sizes.Shape, list[str]] = {}
    times: dict[sizes.Shape, int] = {}
    for name, matrices in one.matrices.items():
        for shape, count in matrices:
            names.setdefault(shape, []).append(name.rpartition(".")[2])
            times[shape] = times.get(shape, 0) + count
    return [
        [
            f"{prefix}{', '.join(dict.fromkeys(names[m, n]))}", f"{m:,} x {n:,}", f"{times[m, n]:,}",
            f"{sizes.break_even((m, n)):,.1f}",
        ]
        for m, n in names
    ]  # fmt: skip


def _cell(one: sizes.Selections, column: str, rank: int) -> str:
    count = one.count(column, rank)
    if count is None:
        return _NONE
    share = count / one.parameters
    low, high = sizes.SHARES
    return f"{count:,} {share:.3%}{'*' if low <= share <= high else ' '}"


def values(shown: Sequence[sizes.Selections], ranks: Sequence[int]) -> dict[str, Any]:
    """Return the same as JSON values."""
    return {
        "schema": 1,
        "models": [
            {
                "model": one.name,
                "parameters": one.parameters,
                "lora": {
                    column: {str(rank): one.count(column, rank) for rank in ranks} for column in one.columns
                },
                "ranks_within_0.1_to_1_percent": {column: one.within(column) for column in one.columns},
                "matrices": [
                    {"name": name, "shape": shape, "count": times, "break_even": sizes.break_even(shape)}
                    for name, matrices in one.matrices.items()
                    for shape, times in matrices
                ],
            }
            for one in shown
        ],
        "0.1_to_1_percent": sizes.verdict(shown, ranks),
    }
