"""Show a plan, a result or an evaluation: rich tables, Markdown model card, JSON. Pure rendering."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from . import environment, report_healing
from .choices import Choice
from .environment import name_of
from .hub import DTYPES
from .measure import Comparison, Perplexity
from .modelcard import ACCURACY, Facts, Figure, perplexity_figure
from .planning import Plan
from .quant import storage
from .recipe import FLOAT, Recipe, to_yaml
from .render import markdown_table, table, to_json
from .report_quality import calibration_line, figures_of, quality_remarks, quality_rows, texts_of
from .report_search import search_table
from .report_sizes import mb, share, size_rows
from .result import Module, Result
from .zeroshot import report_tasks
from .zeroshot.evaluated import Evaluated

_MODULES_SHOWN = 8
_SHORTEST = 0.05


def remarks(result: Result) -> list[str]:
    """Return what a reader must not overlook."""
    found = list(result.warnings)
    written = result.file_bytes or result.after.bytes
    if result.source_bytes and written > result.source_bytes:
        found.append(
            f"the output in {result.dtype} is larger than the input file, which is stored in fewer bits: "
            f"{mb(written)} against {mb(result.source_bytes)}; quantise it to go below"
        )
    kept_dense = sum(module.form == "dense" for module in result.modules)
    if _is_stored(result):
        kept_dense = 0
    if kept_dense == len(result.modules):
        found.append("nothing was compressed: every matrix is smallest dense at this budget")
    elif kept_dense and result.recipe.resolved_method().low_rank is not None:
        found.append(
            f"{kept_dense} of {len(result.modules)} matrices gain nothing at this budget and stay dense"
        )
    found += quality_remarks(result)
    if result.timing is not None:
        found += result.timing.remarks()
    if result.recipe.heal is not None:
        found += report_healing.remarks(result.recipe.heal, result.healing, result.foreign)
    return found


def renderable(result: Result) -> RenderableType:
    """Return the tables that end a run."""
    rows = [*size_rows(result), *_time_rows(result), *quality_rows(result)]
    title = f"{result.source}: method {result.recipe.method}, {_budget(result)}"
    parts: list[RenderableType] = [table(title, ("", "before", "after", "share"), rows)]
    if _is_stored(result):
        parts.append(table("stored as", STORAGE_COLUMNS, storage_rows(result)))
    if result.search is not None:
        parts.append(search_table(result.search))
    if result.healing:
        steps = report_healing.step_rows(result.healing)
        parts.append(table("healing", report_healing.STEP_COLUMNS, steps))
    parts += [Text(f"note: {remark}") for remark in remarks(result)]
    if result.calibration_tokens:
        parts.append(Text(calibration_line(result)))
    spent = {name: value for name, value in result.seconds.items() if value >= _SHORTEST}
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in spent.items())
    if seconds:
        parts.append(Text(f"time: {seconds}"))
    memory = ", ".join(f"{name} {mb(size)}" for name, size in result.peak_memory.items())
    parts.append(Text(f"peak memory: {memory}"))
    return Group(*parts)


def _time_rows(result: Result) -> list[tuple[str, str, str, str]]:
    return [] if result.timing is None else result.timing.rows()


STORAGE_COLUMNS = ("storage", "form", "matrices", "parameters", "of their dense size", "bits per parameter")


def _is_stored(result: Result) -> bool:
    return any(module.storage != FLOAT for module in result.modules)


def storage_rows(result: Result) -> list[tuple[str, ...]]:
    """Return the rows of the table of storages: what is stored how, and how much of it was kept."""
    groups: dict[tuple[str, str], list[Module]] = {}
    for module in result.modules:
        groups.setdefault((module.storage, module.form), []).append(module)
    rows: list[tuple[str, ...]] = []
    for (stored, form), found in sorted(groups.items()):
        after, before = (sum(getattr(m, name) for m in found) for name in ("after", "before"))
        bits = 8 * DTYPES[result.dtype].itemsize if stored == FLOAT else storage.get(stored).bits()
        rows.append((stored, form, str(len(found)), f"{after:,}", share(after, before), f"{bits:.3g}"))
    return rows


def _budget(result: Result) -> str:
    recipe = result.recipe
    spent = "" if recipe.objective is None else f", objective {recipe.objective}"
    if recipe.keep is not None:
        return f"keep {recipe.keep:g} of the {recipe.of}{spent}"
    for name in ("size", "rank", "energy", "latency"):
        value = getattr(recipe, name)
        if value is not None:
            return f"{name} {value}{spent}"
    return "no budget"


def plan_table(plan: Plan) -> RenderableType:
    """Return the plan as a table: module, shape, rank, parameters before and after."""
    unknown = plan.recipe.energy is not None
    title = "plan" if plan.exact else "plan (uniform allocation; what text shows will redistribute it)"
    if unknown:
        title = "plan (energy: the ranks follow from spectra, which a plan does not compute)"
    rows = [
        (
            choice.target.name,
            f"{choice.target.shape[0]} x {choice.target.shape[1]}",
            "?" if unknown else _becomes(choice),
            choice.storage,
            f"{choice.target.size:,}",
            "?" if unknown else f"{choice.parameters:,}",
        )
        for choice in plan.choices
    ]
    ranked = [choice for choice in plan.choices if choice.target.ranked]
    before = sum(choice.target.size for choice in ranked)
    after = sum(choice.parameters for choice in ranked)
    whole = plan.model_parameters
    rest = whole - before
    rows.append((f"{len(ranked)} linears", "", "", "", f"{before:,}", "?" if unknown else f"{after:,}"))
    rows.append(("model", "", "", "", f"{whole:,}", "?" if unknown else f"{rest + after:,}"))
    shown = table(title, ("module", "shape", "rank or width", "storage", "before", "after"), rows)
    if plan.timing is None:
        return shown
    times = table("times", ("", "before", "after", "share"), plan.timing.rows())
    return Group(shown, times, *(Text(f"note: {remark}") for remark in plan.timing.remarks()))


def _becomes(choice: Choice) -> str:
    if choice.form in ("narrow", "partial"):
        return f"{choice.rank} of {choice.units} wide"
    return choice.form if choice.form in ("dense", "dropped") else str(choice.rank)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return {
        "exact": plan.exact,
        "model_parameters": plan.model_parameters,
        "timing": None if plan.timing is None else dataclasses.asdict(plan.timing),
        "modules": [
            {
                "name": choice.target.name,
                "shape": list(choice.target.shape),
                "form": choice.form,
                "rank": choice.rank,
                "storage": choice.storage,
                "before": choice.target.size,
                "after": choice.parameters,
            }
            for choice in plan.choices
        ],
    }


_PERPLEXITY = ("model", "perplexity", "loss", "standard error")


def evaluation_table(name: str, found: Perplexity | Comparison, against: str | None) -> RenderableType:
    """Return an evaluation as a table."""
    own = found.model if isinstance(found, Comparison) else found
    rows = [_perplexity_row(name, own)]
    if isinstance(found, Comparison):
        rows.append(_perplexity_row(against or "reference", found.reference))
    found_rows = table(_protocol(own), _PERPLEXITY, rows)
    return Group(found_rows, Text(_comparison_line(found))) if isinstance(found, Comparison) else found_rows


def _protocol(own: Perplexity) -> str:
    return f"{own.predicted:,} tokens predicted in {own.windows} windows of {own.seq_len}, {own.dtype}"


def _comparison_line(found: Comparison) -> str:
    error = "" if found.standard_error is None else f" +- {found.standard_error:.4f} (paired)"
    return (
        f"loss minus that of the reference {found.difference:+.4f}{error}, "
        f"KL(reference || model) {found.kl:.4f} nats per token, top-1 agreement {found.agreement:.1%}"
    )


def _perplexity_row(name: str, found: Perplexity) -> tuple[str, str, str, str]:
    error = "" if found.standard_error is None else f"{found.standard_error:.4f}"
    return name, f"{found.perplexity:.3f}", f"{found.loss:.4f}", error


def model_card(result: Result) -> str:
    """Return what the model card of the output says of what was done, in Markdown."""
    rows = [*size_rows(result), *_time_rows(result), *quality_rows(result)]
    smallest = sorted(result.modules, key=lambda module: module.after / module.before)[:_MODULES_SHOWN]
    modules = [
        (m.name, f"{m.shape[0]} x {m.shape[1]}", m.form, str(m.rank), m.storage, share(m.after, m.before))
        for m in smallest
    ]
    notes = "\n".join(f"- {remark}" for remark in remarks(result))
    return f"""## Compressed

{markdown_table(("", "before", "after", "share"), rows)}

{calibration_line(result)}
{_storage_section(result)}{_healing_section(result)}
Notes:

{notes}

### Matrices that gave most

{markdown_table(("module", "shape", "form", "rank", "storage", "share"), modules)}

The full list is in `eckart.json`. To repeat it: `eckart compress MODEL --recipe recipe.yaml --out DIR`, where
the recipe names its files as they were given then:

```yaml
{to_yaml(_without_folders(result.recipe))}```
"""


def _storage_section(result: Result) -> str:
    if not _is_stored(result):
        return ""
    return f"\nStored as:\n\n{markdown_table(STORAGE_COLUMNS, storage_rows(result))}\n"


def _healing_section(result: Result) -> str:
    if not result.healing:
        return ""
    rows = markdown_table(report_healing.STEP_COLUMNS, report_healing.step_rows(result.healing))
    return f"\nHealing, divergence from the dense model in nats per token of held-out text:\n\n{rows}\n"


def _what_it_is(result: Result) -> str:
    if result.recipe.stock:
        return "It is an ordinary model with narrower layers, and loads without eckart."
    return "`eckart.densify(model)` gives back an ordinary model of the original shape."


def _without_folders(recipe: Recipe) -> Recipe:
    """Return `recipe` with the names of files alone: a card is for others."""
    return dataclasses.replace(
        recipe,
        model=None if recipe.model is None else name_of(recipe.model),
        text=tuple(map(name_of, recipe.text)),
        eval_text=tuple(map(name_of, recipe.eval_text)),
    )


def documents(result: Result) -> dict[str, str]:
    """Return the texts that stand beside the weights: what was done, recipe, machine-readable report."""
    return {
        "README.md": model_card(result),
        "recipe.yaml": to_yaml(result.recipe),
        "eckart.json": to_json(result.to_dict()),
    }


def facts(result: Result, licence: str | None = None) -> Facts:
    """Return what the model card says beside it; `licence` is that of the texts."""
    version = environment.describe()["versions"]["eckart"]
    summary = (
        f"{name_of(result.source)} ({result.architecture}), compressed by eckart {version}: method "
        f"`{result.recipe.method}`, {_budget(result)}. {_what_it_is(result)}"
    )
    return Facts(
        summary,
        (result.source,),
        tags=("low-rank", "compressed"),
        task=result.task,
        texts=texts_of(result),
        licence=licence,
        figures=figures_of(result),
        continued=True,
    )


def evaluated_section(found: Evaluated, texts: Sequence[str]) -> str:
    """Return what a model card says of an evaluation, in Markdown."""
    parts = []
    names = ", ".join(name_of(text) for text in texts)
    against = f" against {name_of(found.against)}" if found.against else ""
    if found.language is not None:
        own = found.language.model if isinstance(found.language, Comparison) else found.language
        rows = [_perplexity_row("this model", own)]
        if isinstance(found.language, Comparison):
            rows.append(_perplexity_row(name_of(found.against or "reference"), found.language.reference))
        parts += [f"Perplexity on {names}, {_protocol(own)}:", markdown_table(_PERPLEXITY, rows)]
        parts += [_comparison_line(found.language)] if isinstance(found.language, Comparison) else []
    if found.tasks:
        parts.append(markdown_table(report_tasks.columns(found.tasks), report_tasks.rows(found.tasks)))
        parts.append("\n".join(f"- {line}" for line in report_tasks.lines(found.tasks)))
    return f"## Evaluated{against}\n\n" + "\n\n".join(parts)


def evaluated_figures(found: Evaluated, texts: Sequence[str]) -> tuple[Figure, ...]:
    """Return the figures of an evaluation for the metadata of a model card."""
    language = found.language
    own = language.model if isinstance(language, Comparison) else language
    made = list(perplexity_figure(texts, own, "text"))
    for task in found.tasks:
        for metric, score in task.scores.items():
            protocol = {
                "harness": "lm_eval", "version": task.model.version, "shots": task.model.shots,
                "samples": len(task.model.documents), "standard_error": score.standard_error,
                "chance": task.model.chance,
            }  # fmt: skip
            kind = ACCURACY if metric.startswith("acc") else metric
            made.append(Figure(task.model.task, kind, metric, score.value, protocol))
    return tuple(made)
