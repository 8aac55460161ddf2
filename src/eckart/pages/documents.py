"""Which report it is: a row for each kind, with its sections and its records."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import StoreError
from . import compared, compressed, curved, fronts, healed, speeds, surveyed, tuned, tying
from .parts import Chart, Grid, Record, Section, Spectra, Table, Values


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of report: how it is known, shown, and taken apart."""

    name: str
    known: Callable[[Values], bool]
    sections: Callable[[Values], list[Section]]
    records: Callable[[Values], list[Record]]


KINDS = (
    Kind("compress", compressed.known, compressed.sections, compressed.records),
    Kind("heal", healed.known, healed.sections, healed.records),
    Kind("tune", tuned.known, tuned.sections, tuned.records),
    Kind("pretrain", tuned.trained, tuned.trained_sections, tuned.trained_records),
    Kind("tie", tying.known, tying.sections, tying.records),
    Kind("compare", compared.known, compared.sections, compared.records),
    Kind("spectrum", surveyed.known, surveyed.sections, surveyed.records),
    Kind("spectra", surveyed.spectra, surveyed.values_sections, surveyed.values_records),
    Kind("bench", speeds.known, speeds.sections, speeds.records),
    Kind("bench --layers", speeds.of_layers, speeds.layer_sections, speeds.layer_records),
    Kind("curve", curved.known, curved.sections, curved.records),
    Kind("sweep", fronts.known, fronts.sections, fronts.records),
)
_NESTED = ("tuned", "pretrained", "tied", "healed")
"""Keys under which a folder's eckart.json holds a report beside another one, or alone."""


def reports(values: Values, name: str) -> list[tuple[Kind, Values]]:
    """Return the reports in `values`, of one file called `name`, in the order they were made in.

    Raises:
        StoreError: there is none.
    """
    found = list(_found(values))
    if not found:
        legal = ", ".join(kind.name for kind in KINDS)
        held = ", ".join(map(str, list(values)[:8])) or "nothing"
        raise StoreError(
            f"{name} is not a report that is known: it holds {held}. Give an eckart.json, what --json "
            f"printed, or what spectrum --out wrote; reports are of {legal}"
        )
    return found


def _found(values: Values) -> Iterator[tuple[Kind, Values]]:
    kind = next((one for one in KINDS if one.known(values)), None)
    if kind is not None:
        yield kind, values
    for key in _NESTED if kind is None or kind.name == "compress" else ():
        inside = values.get(key)
        for one in inside if isinstance(inside, list) else [inside]:
            if isinstance(one, Mapping):
                own = {"environment": values.get("environment"), **one}
                yield from _found(own)


def sections(values: Values, name: str) -> list[Section]:
    """Return the sections of all reports in `values`.

    Raises:
        StoreError: there is none, or it lacks something, as those of other versions may.
    """
    return [section for kind, own in reports(values, name) for section in _read(kind.sections, own, name)]


def records(values: Values, name: str) -> list[Record]:
    """Return the records of the first report in `values`.

    Raises:
        StoreError: there is none, or it lacks something.
    """
    kind, own = reports(values, name)[0]
    found: list[Record] = _read(kind.records, own, name)
    return found


def drawn(found: list[Section]) -> list[Chart | Grid | Spectra]:
    """Return what can be drawn of sections."""
    return [part for section in found for part in section.parts if isinstance(part, Chart | Grid | Spectra)]


def tables(found: list[Section]) -> list[Table]:
    """Return the tables of sections that are not folded."""
    return [part for one in found for part in one.parts if isinstance(part, Table) and not part.folded]


def _read(reader: Callable[[Values], Any], values: Values, name: str) -> Any:
    try:
        return reader(values)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise StoreError(
            f"{name} lacks what this version shows ({type(error).__name__}: {error}): make it again, or show "
            "it with the version that wrote it"
        ) from error
