"""Model cards, in one place: README.md beside every model that is written, by huggingface_hub's card classes.

What was done comes from the report of each command; name, how to load it, where it comes from, licences,
measured figures and what was not measured are put around it here.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import environment, origins, tasks
from .errors import ConfigError, StoreError
from .measure import Perplexity
from .origins import NOT_STATED, Origin, Text
from .render import markdown_table

REPORT = "eckart.json"
QUANTISED, ADAPTER, FINETUNE = "quantized", "adapter", "finetune"
PERPLEXITY, ACCURACY = "perplexity", "accuracy"
_DONE, _EVALUATED, _UNMEASURED = "what was done", "evaluated", "not measured"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure of the model that is written.

    Args:
        on: the text or task.
        metric: its kind on the hub, perplexity or accuracy.
        name: what exactly it is.
        value: in the unit of `name`.
        protocol: what one must know to measure it again.
    """

    on: str
    metric: str
    name: str
    value: float
    protocol: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """Figures of the same key replace each other."""
        return self.on, self.metric, self.name


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card says beside what was done.

    Args:
        summary: one or two sentences.
        sources: the models that it was made of, as they were given; the first is the base.
        relation: to the base, in the hub's words; None: none of them.
        tags: beside `eckart`.
        task: a name of eckart.tasks.
        texts: (source, what for) of the texts that were used.
        licence: of these texts, where the user states it.
        figures: measured on the model that is written.
        continued: whether what was done to the first source before belongs to the card.
        code: that loads it; default: what the files in the folder ask for.
        library: that loads it; default: transformers, or peft.
    """

    summary: str
    sources: tuple[str, ...] = ()
    relation: str | None = QUANTISED
    tags: tuple[str, ...] = ()
    task: str = tasks.CAUSAL
    texts: tuple[tuple[str, str], ...] = ()
    licence: str | None = None
    figures: tuple[Figure, ...] = ()
    continued: bool = False
    code: str | None = None
    library: str | None = None


def perplexity_figure(sources: Sequence[str | Path], found: Any, fallback: str) -> tuple[Figure, ...]:
    """Return the figure of a perplexity on the texts `sources`, none where `found` is no perplexity."""
    if not isinstance(found, Perplexity):
        return ()
    on = ", ".join(Path(str(source)).name for source in sources) or fallback
    protocol = {
        "predicted_tokens": found.predicted, "windows": found.windows, "window": found.seq_len,
        "dtype": found.dtype, "loss_nats_per_token": found.loss,
        "standard_error_of_loss": found.standard_error,
    }  # fmt: skip
    return (Figure(on, PERPLEXITY, "perplexity", found.perplexity, protocol),)


def write(folder: Path, name: str, documents: Mapping[str, str], facts: Facts) -> None:
    """Write the card, the report and what else stands beside the weights that are in `folder` already.

    Args:
        folder: is about to become the output `name`.
        documents: by name of file; README.md holds what was done, in Markdown, without a title.
        facts: all else.
    """
    found = [origins.of_model(source) for source in facts.sources]
    texts = [*_texts_before(facts), *(origins.of_text(one, use, facts.licence) for one, use in facts.texts)]
    carried = origins.carry_terms(folder, found)
    values = json.loads(documents.get(REPORT, "{}"))
    values["card"] = {
        "base_model": [one.name for one in found],
        "licences": {one.name: one.licence for one in found},
        "texts": [asdict(one) for one in texts],
        "figures": [asdict(one) for one in facts.figures],
    }
    values.pop("evaluated", None)  # of another model: the one that this was made of
    for file, content in documents.items():
        if file not in (origins.CARD, REPORT):
            (folder / file).write_text(content, encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    body = _body(name, documents.get(origins.CARD, ""), facts, facts.code or usage(folder, name, facts.task))
    body += _provenance(found, texts, carried) + _region(_UNMEASURED, _unmeasured(facts.figures))
    made = ModelCard(f"---\n{_data(folder, name, facts, found, texts).to_yaml()}\n---\n{body}")
    made.save(folder / origins.CARD)


def _texts_before(facts: Facts) -> list[Text]:
    known = _report(Path(facts.sources[0])) if facts.continued and facts.sources else {}
    return [Text(**one) for one in known.get("card", {}).get("texts", ())]


def _report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _data(
    folder: Path, name: str, facts: Facts, found: Sequence[Origin], texts: Sequence[Text]
) -> ModelCardData:
    licences = {origin.licence for origin in found}
    first = found[0] if found else None
    stated = first if first is not None and len(licences) == 1 else None
    relation = facts.relation
    if first is not None and facts.continued:
        relation = QUANTISED if first.relation == QUANTISED else facts.relation or first.relation
    related = {} if first is None or relation is None else {"base_model_relation": relation}
    adapter = (folder / "adapter_config.json").is_file()
    return ModelCardData(
        base_model=first.name if first else None,
        datasets=[text.name for text in texts if text.hub] or None,
        eval_results=[_evaluation(figure, facts.task) for figure in facts.figures] or None,
        language=list(first.languages) or None if first else None,
        library_name=facts.library or ("peft" if adapter else "transformers"),
        license=stated.licence if stated else None,
        license_name=stated.licence_name if stated else None,
        license_link=stated.licence_link if stated else None,
        model_name=name,
        pipeline_tag=tasks.get(facts.task).tag,
        tags=list(dict.fromkeys(["eckart", *facts.tags])),
        **related,
    )


def _evaluation(figure: Figure, task: str) -> EvalResult:
    known = {key: value for key, value in figure.protocol.items() if value is not None}
    return EvalResult(
        task_type=tasks.get(task).tag or "other",
        dataset_type=re.sub(r"[^\w.-]+", "-", figure.on),
        dataset_name=figure.on,
        dataset_args=known or None,
        metric_type=figure.metric,
        metric_name=figure.name,
        metric_value=figure.value,
    )


def _region(name: str, content: str) -> str:
    return f"<!-- eckart: {name} -->\n{content.strip()}\n<!-- eckart: end of {name} -->\n"


def _within(card: str, name: str) -> str:
    found = re.search(rf"<!-- eckart: {name} -->\n(.*?)<!-- eckart: end of {name} -->\n", card, re.DOTALL)
    return found[1].strip() if found else ""


def _body(name: str, done: str, facts: Facts, code: str) -> str:
    before = ""
    if facts.continued and facts.sources and (Path(facts.sources[0]) / origins.CARD).is_file():
        before = _within((Path(facts.sources[0]) / origins.CARD).read_text(encoding="utf-8"), _DONE)
    parts = "\n\n".join(part for part in (before, done.strip()) if part)
    return f"""# {name}

{facts.summary.strip()}

## How to load

```python
{code}```

{_region(_DONE, parts)}
{_region(_EVALUATED, "")}
"""


def usage(folder: Path, name: str, task: str = tasks.CAUSAL) -> str:
    """Return Python code that loads what is in `folder`, called `name`."""
    if (folder / "adapter_config.json").is_file():
        return _adapter_usage(folder, name)
    auto = tasks.get(task).auto
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    head = "import eckart  # pip install eckart\n" if _compressed(config) else ""
    preparation = _preparation(folder)
    names = sorted({auto, *([preparation] if preparation else [])})
    lines = [f"{head}from transformers import {', '.join(names)}\n"]
    lines.append(f'model = {auto}.from_pretrained("{name}", dtype="auto")')
    if preparation:
        what = "tokenizer" if preparation == "AutoTokenizer" else "processor"
        lines.append(f'{what} = {preparation}.from_pretrained("{name}")')
    return "\n".join(lines) + "\n"


def _compressed(config: Mapping[str, Any]) -> bool:
    return (config.get("quantization_config") or {}).get("quant_method") == "eckart"


def _preparation(folder: Path) -> str | None:
    if (folder / "tokenizer_config.json").is_file():
        return "AutoTokenizer"
    for file, loader in (
        ("processor_config.json", "AutoProcessor"),
        ("preprocessor_config.json", "AutoProcessor"),
    ):
        if (folder / file).is_file():
            return loader
    return None


def _adapter_usage(folder: Path, name: str) -> str:
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if "base" in _report(folder):  # stored in few bits, as it was when the adapter was trained
        return f'import eckart  # pip install eckart\n\nmodel = eckart.load("{name}")\n'
    shown, options, head = base or "BASE", 'dtype="auto"', ""
    if base and Path(base).exists():
        path = Path(base)
        shown = path.name
        if path.is_file():
            shown, options = ".", f'gguf_file="{path.name}", dtype="float32"'
        elif (path / "config.json").is_file():
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            head = "import eckart  # pip install eckart\n" if _compressed(config) else ""
    return f"""{head}from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{shown}", {options})
model = PeftModel.from_pretrained(model, "{name}")
"""


def _provenance(found: Sequence[Origin], texts: Sequence[Text], carried: Sequence[str]) -> str:
    parts = []
    if found:
        rows = [(origin.name, _licence(origin)) for origin in dict.fromkeys(found)]
        parts.append(f"## Base model, licence and terms\n\n{markdown_table(('made of', 'licence'), rows)}")
        files = f" Their files go along: {', '.join(f'`{name}`' for name in carried)}." if carried else ""
        parts.append(f"The licences and terms of these models apply to this one.{files}")
    if texts:
        lines = [(text.name, text.use, text.licence, text.sha256 or "") for text in dict.fromkeys(texts)]
        columns = ("text", "used for", "licence", "SHA-256 of the file")
        parts.append(f"## Texts\n\n{markdown_table(columns, lines)}")
    return "".join(f"{part}\n\n" for part in parts)


def _licence(origin: Origin) -> str:
    named = " ".join(filter(None, (origin.licence_name, origin.licence_link)))
    return f"{origin.licence or NOT_STATED}{f' ({named})' if named else ''}"


def _unmeasured(figures: Sequence[Figure]) -> str:
    kinds = {figure.metric for figure in figures}
    missing = [] if PERPLEXITY in kinds else ["perplexity (`eckart eval DIR --text FILE --record`)"]
    if PERPLEXITY in kinds and len({figure.on for figure in figures if figure.metric == PERPLEXITY}) == 1:
        missing.append("perplexity on text of another kind")
    if ACCURACY not in kinds:
        missing.append("accuracy on tasks (`eckart eval DIR --tasks NAMES --record`)")
    spans = [int(figure.protocol["window"]) for figure in figures if "window" in figure.protocol]
    missing.append(f"contexts of more than {max(spans)} tokens" if spans else "long contexts")
    missing += ["speed (`eckart bench DIR`)", "other languages, bias and safety"]
    return "## Not measured\n\n" + "\n".join(f"- {one}" for one in missing)


def check_recordable(source: str) -> None:
    """Raise ConfigError unless `source` is a folder whose card can take figures."""
    folder = Path(source)
    card = folder / origins.CARD
    marked = card.is_file() and f"<!-- eckart: {_EVALUATED} -->" in card.read_text(encoding="utf-8")
    if not (marked and (folder / REPORT).is_file()):
        raise ConfigError(
            f"{source} has no model card of eckart that figures can be recorded in: record them in a folder "
            "that eckart wrote, or leave --record out"
        )
    if not os.access(folder, os.W_OK):
        raise StoreError(f"{source} cannot be written to: leave --record out")


def record(
    source: str, what: str, section: str, figures: Sequence[Figure], values: Mapping[str, Any]
) -> None:
    """Put measured figures into card and report of the folder `source`; those of the same key are replaced.

    Args:
        source: the folder.
        what: the evaluation is the same as an earlier one of this name, which it replaces.
        section: in Markdown.
        figures: for the metadata.
        values: for the report.
    """
    check_recordable(source)
    folder = Path(source)
    report = _report(folder)
    entry = {"what": what, "section": section, **values, "environment": environment.describe()}
    report["evaluated"] = [one for one in report.get("evaluated", ()) if one["what"] != what] + [entry]
    fresh = {figure.key for figure in figures}
    card = report.setdefault("card", {})
    kept = [Figure(**one) for one in card.get("figures", ())]
    kept = [figure for figure in kept if figure.key not in fresh] + list(figures)
    card["figures"] = [asdict(figure) for figure in kept]
    made = ModelCard.load(folder / origins.CARD)
    task = next((name for name in tasks.TASKS if tasks.get(name).tag == made.data.pipeline_tag), tasks.CAUSAL)
    made.data.model_name = made.data.model_name or folder.resolve().name
    made.data.eval_results = [_evaluation(figure, task) for figure in kept]
    text = f"{made}"
    sections = "\n\n".join(one["section"].strip() for one in report["evaluated"])
    for name, content in ((_EVALUATED, sections), (_UNMEASURED, _unmeasured(kept))):
        pattern = rf"<!-- eckart: {name} -->\n.*?<!-- eckart: end of {name} -->\n?"
        text = re.sub(pattern, lambda _, n=name, c=content: _region(n, c), text, flags=re.DOTALL)  # type: ignore[misc]
    for file, content in ((REPORT, json.dumps(report, indent=2) + "\n"), (origins.CARD, text)):
        partial = folder / f".{file}.partial"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, folder / file)
