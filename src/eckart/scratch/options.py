"""Options of commands that train: a model from scratch, or one that is there."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

Penalty = Annotated[
    str | None,
    typer.Option(help="Seek low rank: nuclear, tail, stable-rank, or orthogonality (of factors)."),
]
Strength = Annotated[float | None, typer.Option(help="What the penalty is multiplied by; needed with it.")]
PenaltyKeep = Annotated[
    float | None, typer.Option(help="tail: the target rank is that of factors with this share of parameters.")
]
Schedule = Annotated[
    str | None, typer.Option(help="Of the strength: constant (default), or rising, linear or cosine.")
]

Optimizer = Annotated[
    str | None,
    typer.Option(help="adamw, or with all parameters galore_adamw, galore_adamw_8bit, galore_adafactor."),
]
OptimizerArgs = Annotated[
    str | None, typer.Option(help="Of GaLore, e.g. rank=128,update_proj_gap=200,scale=0.25.")
]

EvalData = Annotated[
    list[str] | None, typer.Option(help="What to decide on; default: a share of --data, held out.")
]
Hold = Annotated[float | None, typer.Option(help="That share (0.05).")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data (1).")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps instead.")]
Warmup = Annotated[float | None, typer.Option(help="Share of the steps before it (0.05).")]
Clip = Annotated[float | None, typer.Option(help="The largest norm of a gradient (1).")]
Evaluations = Annotated[int | None, typer.Option(help="On held-out data, over the run (10).")]
Seed = Annotated[int | None, typer.Option(help="Of everything that is drawn (0).")]


def penalty_of(
    base: Mapping[str, Any],
    penalty: str | None,
    strength: float | None,
    keep: float | None,
    schedule: str | None,
) -> dict[str, Any] | None:
    """Return the settings of the penalty: those of a recipe's section `base`, and what is given over them."""
    given = {"kind": penalty, "strength": strength, "keep": keep, "schedule": schedule}
    found = {key: value for key, value in given.items() if value is not None}
    known = base.get("penalty")
    return {**(known if isinstance(known, Mapping) else {}), **found} if found else None
