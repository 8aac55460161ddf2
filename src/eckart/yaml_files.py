"""Settings in YAML files."""

from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML recipe.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"no recipe at {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(values).__name__}")
    return values


def section(path: Path | None, name: str) -> dict[str, Any]:
    """Return the settings under `name` in the YAML recipe at `path`, none without either.

    Raises:
        ConfigError: as `read_yaml`, or what stands there is not a mapping.
    """
    found = {} if path is None else read_yaml(path).get(name) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: {name} must be a mapping of settings, got {found!r}")
    return found
