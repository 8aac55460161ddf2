"""How help is laid out: commands by what they are for, options by what they decide."""

from typing import Any

import typer
from typer.core import TyperCommand

COMMANDS = {
    "Look": ("spectrum", "curve", "diff", "params"),
    "Make smaller": ("compress", "quantise", "heal", "sweep", "share", "tie", "untie"),
    "Train and adapt": ("tune", "merge", "extract", "resize", "pretrain"),
    "Measure": ("eval", "bench", "compare"),
    "Pass on": ("export", "report", "push"),
    "Keep house": ("cache",),
}
OPTIONS = {
    "Budget": (
        "keep", "keeps", "of", "size", "rank", "energy", "latency", "max_ppl_increase", "objective",
        "workload", "times", "params", "noise", "auto_rank", "budget", "start_rank",
    ),
    "Method": (
        "method", "methods", "form", "storage", "storages", "embeddings", "stock", "depth", "split",
        "share_inputs", "landmarks", "allocation", "multiple", "include", "exclude", "targets", "damp",
        "alpha", "heal", "correction", "correction_rank", "correction_storage", "refine", "dropout",
        "rslora", "init", "double", "group", "what", "differences", "scales", "start", "dense_steps",
        "frobenius", "adapter_rank", "carry", "ends",
    ),
    "Training": (
        "epochs", "steps", "rate", "warmup", "weight_decay", "clip", "batch", "micro", "evaluations",
        "eval_limit", "patience", "optimizer", "optimizer_args", "checkpointing", "tight", "precision",
        "paged", "penalty", "strength", "penalty_keep", "schedule", "first_batches", "train", "temperature",
        "text_loss", "largest", "mixture",
    ),
    "Text and data": (
        "text", "eval_text", "foreign_text", "data", "eval_data", "hold", "task", "columns", "template",
        "labels", "tokenizer", "vocabulary", "packing", "tokens", "gradient_tokens", "fit_tokens",
        "hold_tokens", "eval_tokens", "seq_len", "bos", "seed", "prompt",
    ),
    "Machine": (
        "device", "devices", "jobs", "threads", "memory", "cache", "no_cache", "trust_remote_code",
    ),
    "Output": (
        "out", "html", "limit", "dtype", "text_licence", "recipe_file", "overwrite", "dry_run", "as_json",
    ),
}  # fmt: skip
"""Panels in this order, with the names of their parameters; an option of none of them is in the first one."""
_PANELS = {name: panel for panel, names in OPTIONS.items() for name in names}
_PLACES = {name: place for place, name in enumerate(_PANELS)}
LONG = 20
"""Options from which a command shows them in panels."""


class Panelled(TyperCommand):
    """A command whose help shows many options in the panels of OPTIONS."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = [one for one in self.params if one.param_type_name == "option"]
        if len(options) < LONG:
            return
        for option in options:
            option.rich_help_panel = _PANELS.get(option.name or "")  # type: ignore[attr-defined]
        arguments = [one for one in self.params if one.param_type_name != "option"]
        self.params = [*arguments, *sorted(options, key=lambda one: _PLACES.get(one.name or "", -1))]


def lay_out(app: typer.Typer) -> None:
    """Put the commands of `app` into the panels and the order of COMMANDS.

    Raises:
        KeyError: a command is in none of them.
    """
    panels = {name: panel for panel, names in COMMANDS.items() for name in names}
    places = {name: (place, panel) for place, (name, panel) in enumerate(panels.items())}

    def where(info: Any) -> tuple[int, str]:
        return places[info.name or str(info.callback.__name__).replace("_", "-")]

    app.registered_commands.sort(key=where)
    for info in app.registered_commands:
        info.rich_help_panel = where(info)[1]
        info.cls = Panelled
