"""A page for each public name of the package, from its docstring; a hook of mkdocs."""

import inspect
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import eckart

INDEX = "python/index.md"


def _names() -> list[str]:
    return sorted((name for name in eckart.__all__ if not name.startswith("_")), key=str.lower)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the pages in the navigation."""
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Python" in entry:
            entry["Python"] = [INDEX, *({name: f"python/{name}.md"} for name in _names())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages."""
    rows = ""
    for name in _names():
        value = getattr(eckart, name)
        rows += f"| [eckart.{name}]({name}.md) | {_kind(value)} | {_first(value)} |\n"
        files.append(File.generated(config, f"python/{name}.md", content=_page(name)))
    about = (
        "`import eckart` teaches transformers to load compressed folders. What is listed here is public; "
        "everything else may change.\n\n"
    )
    content = f"# Python\n\n{about}| name | | what it is |\n|---|---|---|\n{rows}"
    files.append(File.generated(config, INDEX, content=content))
    return files


def _page(name: str) -> str:
    return f"---\ntitle: eckart.{name}\n---\n::: eckart.{name}\n    options: {{heading_level: 1}}\n"


def _kind(value: Any) -> str:
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value):
        return "error" if issubclass(value, Exception) else "class"
    return "function"


def _first(value: Any) -> str:
    first = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    for letter in "\\*_|<>`[]":
        first = first.replace(letter, f"\\{letter}")
    return first
