"""Show a model that was trained from scratch: before, after, as a card, the decline of its spectra."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..adapt import report_tune
from ..adapt.tuned import Prospect, Tuned
from ..modelcard import PERPLEXITY, Facts, Figure
from ..render import markdown_table, table, to_json
from . import decline
from .decline import Decline

Rows = list[tuple[str, ...]]
COLUMNS = ("", "at the start", "in the end")


def prospect_table(prospect: Prospect) -> RenderableType:
    """Return what is shown before the first step."""
    parts: list[RenderableType] = [
        table(f"{prospect.source} from scratch", ("", ""), report_tune.prospect_rows(prospect))
    ]
    own = {"full": prospect.memory["full"]} if "full" in prospect.memory else {}
    if own:
        parts.append(table("", report_tune.MEMORY_COLUMNS, report_tune.memory_rows(own)))
    return Group(*parts, *(Text(f"note: {line}") for line in prospect.notes))


def rows(tuned: Tuned) -> Rows:
    """Return held-out loss and perplexity before and after, and what a penalty did to the spectra."""
    before, after = tuned.prospect.start.loss, tuned.end.loss
    found: Rows = [
        ("held-out loss, nats a token", f"{before:.4f}", f"{after:.4f}"),
        ("perplexity", f"{math.exp(before):,.1f}", f"{math.exp(after):,.1f}"),
    ]
    if tuned.decline is not None:
        spectra = _decline(tuned.decline)
        for key, words in (("stable_rank", "mean stable rank"), ("beyond", "energy beyond the target rank")):
            means = spectra.mean(key)
            if means:
                found.append((words, f"{means[0][1]:.3g}", f"{means[-1][1]:.3g}"))
    return found


def _decline(values: Mapping[str, Any]) -> Decline:
    made = Decline()
    made.take(values)
    return made


def lines(values: Mapping[str, Any], tuned: Tuned) -> list[str]:
    """Return what else there is to say; `values` is Pretrained.to_dict."""
    settings, ranks = values["settings"], values["ranks"]
    share = f"{values['parameters']:,} parameters, {values['parameters'] / values['dense']:.1%} of full rank"
    found = [f"{share}; {values['vocabulary']:,} tokens in the vocabulary"]
    if ranks:
        found.append(
            f"{len(ranks)} matrices of rank {min(ranks.values())} to {max(ranks.values())}, "
            f"form {settings['form']}"
        )
    if settings["dense_steps"]:
        found.append(f"{settings['dense_steps']:,} steps at full rank first")
    if values["switched"]:
        kept, projected, begun = (len(values["switched"][key]) for key in ("kept", "projected", "begun"))
        found.append(
            f"of the optimizer's states {kept} were kept, {projected} projected onto factors and {begun} "
            "begun anew"
        )
    # The second line of a tuning says what was trained, which is all.
    return [*found, *(line for line in report_tune.lines(tuned) if "parameters trained" not in line)]


def result_table(values: Mapping[str, Any], tuned: Tuned) -> RenderableType:
    """Return the table that ends a run."""
    title = f"{tuned.prospect.source} from scratch"
    return Group(table(title, COLUMNS, rows(tuned)), *map(Text, lines(values, tuned)))


def plot(tuned: Tuned, path: Path) -> bool:
    """Draw how the spectra declined under a penalty; return False where there was none, or no matplotlib."""
    return tuned.decline is not None and decline.plot(_decline(tuned.decline), path)


def documents(values: Mapping[str, Any], tuned: Tuned, picture: bool) -> dict[str, str]:
    """Return the texts that stand beside the weights: what was done, and machine-readable report.

    Args:
        values: Pretrained.to_dict.
        tuned: how the run went.
        picture: whether spectra.png stands beside them.
    """
    shown = "\n![decline of the spectra](spectra.png)\n" if picture else ""
    card = f"""## Trained from scratch

{markdown_table(COLUMNS, rows(tuned))}

{chr(10).join(f"- {line}" for line in lines(values, tuned))}
{shown}
Measured on {tuned.prospect.held_out:,} held-out windows; the state was chosen by their loss. All settings and
the course of the run are in `eckart.json`.
"""
    return {"README.md": card, "eckart.json": to_json({"pretrained": dict(values)})}


def facts(tuned: Tuned, licence: str | None = None) -> Facts:
    """Return what the model card says beside it; `licence` is that of the data."""
    tuning = tuned.prospect.tuning
    data = ", ".join(Path(source).name for source in tuning.data)
    on = ", ".join(Path(source).name for source in tuning.eval_data) or f"{data}, held out"
    protocol = {"windows": tuned.prospect.held_out, "window": tuning.seq_len, "chosen_by_it": True}
    return Facts(
        f"Trained from scratch by eckart on {data}.",
        texts=tuple((source, "training") for source in tuning.data),
        licence=licence,
        figures=(Figure(on, PERPLEXITY, "perplexity", math.exp(tuned.end.loss), protocol),),
    )
