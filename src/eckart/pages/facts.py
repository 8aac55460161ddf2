"""What a report says of how it was made: recipe, versions, machine. No paths of the machine."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from .parts import Code, Part, Table, Values

MB = 1e6


def megabytes(size: float | None) -> str:
    """Return bytes in megabytes of 10^6, empty for None."""
    return "" if size is None else f"{size / MB:,.1f} MB"


def short(value: Any) -> Any:
    """Return `value` with absolute paths, wherever they stand in it, cut to their last part."""
    if isinstance(value, str):
        return PurePath(value).name or value if PurePath(value).is_absolute() else value
    if isinstance(value, Mapping):
        return {key: short(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(one) for one in value]
    return value


def settings(values: Values) -> str:
    """Return settings as YAML: what is set alone, names of files without their folders."""
    given = {key: short(value) for key, value in values.items() if value not in (None, [], (), {}, "")}
    return str(yaml.safe_dump(given, sort_keys=False, allow_unicode=True))


def reproduce(values: Values, command: str, recipe: Values | None) -> list[Part]:
    """Return what is needed to repeat a run: the command, its settings, versions, machine and date."""
    parts: list[Part] = []
    given = values.get("command")
    if isinstance(given, (list, tuple)):
        given = " ".join(map(str, short(given)))
    parts.append(Code("Command", str(given or command)))
    if recipe:
        parts.append(Code("Settings (recipe.yaml)", settings(recipe)))
    rows = environment_rows(values.get("environment") or {})
    if rows:
        parts.append(Table("Versions and machine", ("", ""), rows))
    return parts


def environment_rows(found: Values) -> list[tuple[str, str]]:
    """Return date, versions and machine as rows."""
    rows = [(key, str(found[key])) for key in ("date", "python") if key in found]
    for group in ("versions", "machine"):
        rows += [(key, str(value)) for key, value in (found.get(group) or {}).items() if value is not None]
    return rows


def spent_rows(values: Values) -> list[tuple[str, str]]:
    """Return seconds by stage and peak memory as rows."""
    seconds = values.get("seconds")
    rows = []
    if isinstance(seconds, Mapping):
        rows = [(f"seconds, {name}", f"{value:.1f}") for name, value in seconds.items() if value >= 0.05]
    memory = values.get("peak_memory") or {}
    return rows + [(f"peak memory, {name}", megabytes(size)) for name, size in memory.items()]
