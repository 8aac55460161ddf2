"""Frozen settings out of mappings, strictly."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _suggest(key: str, legal: list[str]) -> str:
    close = difflib.get_close_matches(key, legal, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"legal are {', '.join(legal)}"


def construct(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    """Return the dataclass `kind` made of `values`.

    Raises:
        ConfigError: an unknown key (with a suggestion), a key that is missing, or an illegal value.
    """
    legal = [field.name for field in fields(kind)]
    for key in values:
        if key not in legal:
            raise ConfigError(f"{where}: unknown key {key!r}: {_suggest(str(key), legal)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_number(
    name: str, value: Any, kind: type, least: float, *, most: float | None = None, above: bool = False
) -> None:
    """Raise ConfigError unless `value` is a number of `kind` (int or float) within the bounds.

    Args:
        name: how the message calls it.
        least: the smallest legal value; with `above`, it is itself illegal.
        most: the largest.
    """
    legal = isinstance(value, (kind, int)) and not isinstance(value, bool)
    number = float(value) if legal else least - 1
    if number >= least and not (above and number == least) and (most is None or number <= most):
        return
    bound = f"of at least {least:g}" if most is None else f"in [{least:g}, {most:g}]"
    if above:
        bound = f"above {least:g}"
    raise ConfigError(f"{name} {value!r}: must be {'a whole number' if kind is int else 'a number'} {bound}")


def parse_percent(name: str, value: object) -> float:
    """Return a percentage such as "3%" as a fraction above 0.

    Raises:
        ConfigError: it is none.
    """
    text = value.strip() if isinstance(value, str) else ""
    try:
        found = float(text.removesuffix("%")) / 100 if text.endswith("%") else 0.0
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ConfigError(f"{name} {value!r}: is not a percentage above 0, write for example 3%")
    return found


def parse_size(size: int | str) -> int:
    """Return a size in bytes: a number, or a text with B, KB, MB, GB (powers of 10) or KiB, MiB, GiB.

    Raises:
        ConfigError: it is not a positive size.
    """
    text = str(size).strip().upper()
    number = text.rstrip("KMGIB ")
    unit = text[len(number) :].strip() or "B"
    try:
        value = round(float(number) * _UNITS[unit])
    except (ValueError, KeyError):
        value = 0
    if value <= 0:
        raise ConfigError(f"size {size!r}: write for example 200MB (10^6 bytes), 1.5GB or 190MiB")
    return value
