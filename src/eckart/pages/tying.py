"""Reports of tie and untie: embeddings and head."""

from . import facts
from .parts import Part, Record, Section, Table, Values


def known(values: Values) -> bool:
    """Tell whether `values` are such a report."""
    return {"done", "vocabulary", "width", "saved"} <= set(values)


def sections(values: Values) -> list[Section]:
    """Return what was saved and what it cost."""
    before, after = values["parameters"]
    rows: list[tuple[object, ...]] = [("parameters", before, after), ("bytes saved", None, values["saved"])]
    dense, now = values.get("dense"), values.get("compressed")
    if dense and now:
        rows.append(("loss, nats", dense["loss"], now["loss"]))
    parts: list[Part] = [Table("Before and after", ("", "before", "after"), rows)]
    return [Section(f"{facts.short(values['source'])}: embeddings and head {values['done']}", parts)]


def records(values: Values) -> list[Record]:
    """Return one record."""
    names = ("source", "done", "vocabulary", "width", "saved", "dtype", "method")
    before, after = values["parameters"]
    return [
        {**{name: values[name] for name in names}, "parameters_before": before, "parameters_after": after}
    ]
