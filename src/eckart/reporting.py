"""Read reports from files and folders, write pages and pictures of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import environment
from .checkpoint import appearing
from .errors import StoreError
from .pages import documents, fronts, page, pictures
from .pages.notebook import Shown, plain

NAME = "eckart.json"
_HEAVY = 200_000_000
"""Bytes of JSON that are read at most."""


def read(source: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the reports of a JSON file, or of a folder, each with a name.

    A folder holds an eckart.json, or, as that of a sweep, JSON files, or folders that hold one each.

    Raises:
        StoreError: there is nothing there, or it is no report in JSON.
    """
    path = Path(source)
    if path.is_file():
        return [(path.name if path.name != NAME else path.absolute().parent.name, _values(path))]
    if not path.is_dir():
        raise StoreError(f"{source}: no such file or folder; give a report in JSON, or a folder with {NAME}")
    if (path / NAME).is_file():
        return [(path.absolute().name, _values(path / NAME))]
    files = [file for file in sorted(path.glob("*.json")) if file.name not in ("config.json", "recipe.json")]
    made = [(file.name, values) for file in files if (values := _values(file)) and _is_report(values)]
    made += [(file.parent.name, _values(file)) for file in sorted(path.glob(f"*/{NAME}"))]
    if not made:
        raise StoreError(
            f"{source} holds no report: neither {NAME}, nor folders with one, nor reports in JSON"
        )
    return made


def _is_report(values: Mapping[str, Any]) -> bool:
    try:
        return bool(documents.reports(values, ""))
    except StoreError:
        return False


def _values(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _HEAVY:
        raise StoreError(f"{path} has {path.stat().st_size:,} bytes: reports have at most {_HEAVY:,}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise StoreError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(found, dict):
        raise StoreError(f"{path} holds a {type(found).__name__}: a report is an object with named values")
    return found


def gather(given: Sequence[str | Path]) -> list[tuple[str, dict[str, Any]]]:
    """Return the reports of all of `given`, under names that tell them apart.

    Raises:
        StoreError: one of them cannot be read.
    """
    made: list[tuple[str, dict[str, Any]]] = []
    for name, values in (report for source in given for report in read(source)):
        taken = {one for one, _ in made}
        count = 2
        distinct = name
        while distinct in taken:
            distinct, count = f"{name} ({count})", count + 1
        made.append((distinct, values))
    return made


def write(
    reports: Sequence[tuple[str, Mapping[str, Any]]],
    out: Path | None,
    figures: Path | None = None,
    title: str | None = None,
) -> list[Path]:
    """Write `reports` as one page, and their figures as PNG and SVG, and return the files.

    Args:
        reports: pairs of a name and values.
        out: the page, which appears by rename; None for none.
        figures: a folder for figures, in one of its own for each report where there are several.
        title: of the page; default: the names.

    Raises:
        ConfigError: there is nothing to show or draw, too much for a page, or no matplotlib.
        StoreError: a report is of no known kind, or a file cannot be written.
    """
    made: list[Path] = []
    if out is not None:
        content = page.page(reports, title)
        with appearing(out) as partial:
            partial.write_text(content, encoding="utf-8")
        made.append(out)
    if figures is not None:
        for name, values in reports:
            folder = figures if len(reports) == 1 else figures / name.replace("/", "-")
            made += pictures.write(documents.drawn(documents.sections(values, name)), folder)
        made += pictures.write(documents.drawn(fronts.overview(reports)), figures)
    return made


def write_result(name: str, result: Shown, out: Path) -> None:
    """Write the page of one result.

    Raises:
        ConfigError: it would be too large.
        StoreError: the file cannot be written.
    """
    write([(name, {"environment": environment.describe(), **plain(result.document())})], out)
