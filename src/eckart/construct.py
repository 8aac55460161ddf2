"""Frozen settings out of mappings, strictly."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .errors import ConfigError


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
