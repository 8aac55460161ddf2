"""A page for each command, from its own help; a hook of mkdocs."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.main import get_command

from eckart.cli import app

ROOT = Path(__file__).resolve().parent.parent
INDEX = "commands/index.md"
_RANGE = re.compile(r"\s*\[(?P<words>[^\[\]]*)\]\s*$")
_DEFAULT = re.compile(
    r"\bin ([(\[]-?[\d.]+, -?[\d.]+[)\]])"  # a range
    r"|\((\d[^()^]*)\)(?=[.:;,]|$)"  # a default that a recipe keeps, which the help names: (32768)
    r"|[Dd]efault(?: by method)?: ((?:[^.;)]|\.(?! |$))+)"
    r"|'?([\w-]+)'? \(default\)"
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the pages in the navigation."""
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Commands" in entry:
            entry["Commands"] = [INDEX, *(f"commands/{name}.md" for name in sorted(_commands()))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages."""
    codes = _exit_codes()
    commands = _commands()
    for name, command in commands.items():
        files.append(File.generated(config, f"commands/{name}.md", content=_page(name, command, codes)))
    rows = "".join(
        f"| [{name}]({name}.md) | {_cell(_paragraph(commands[name]))} |\n" for name in sorted(commands)
    )
    index = f"# Commands\n\n| command | what it does |\n|---|---|\n{rows}\n{codes}"
    files.append(File.generated(config, INDEX, content=index))
    return files


def _commands() -> dict[str, Any]:
    found: dict[str, Any] = getattr(get_command(app), "commands")  # noqa: B009  no type says that it is a group
    return found


def _exit_codes() -> str:
    text = (ROOT / "docs" / "terminal.md").read_text(encoding="utf-8")
    table = text.partition("## Exit codes\n")[2].strip().split("\n\n")[0]
    return f"## Exit codes\n\n{table}\n\nMore in [In a terminal, in a pipe, in a script](../terminal.md).\n"


def _paragraph(command: Any) -> str:
    return str(command.help or "").strip().split("\n\n")[0].replace("\n", " ")


def _page(name: str, command: Any, codes: str) -> str:
    context = command.make_context(f"eckart {name}", [], resilient_parsing=True)
    usage = command.get_usage(context).removeprefix("Usage: ")
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    arguments = [one for one in shown if one.param_type_name == "argument"]
    options = [one for one in shown if one.param_type_name == "option"]
    text = "\n\n".join(part.replace("\n", " ") for part in str(command.help or "").strip().split("\n\n"))
    # The title is code, so that the navigation shows the word that is typed.
    parts = [f"# eckart {name}", _cell(text), f"```text\n{usage}\n```"]
    if arguments:
        parts.append("## Arguments\n\n" + _table("argument", arguments, context))
    parts.append("## Options\n\n" + _table("option", options, context))
    return "\n\n".join(parts) + f"\n\n{codes}"


def _table(title: str, parameters: list[Any], context: Any) -> str:
    rows = "".join(_row(one, context) for one in parameters)
    return f"| {title} | what it says | default, range |\n|---|---|---|\n{rows}"


def _row(parameter: Any, context: Any) -> str:
    record = parameter.get_help_record(context)
    names, said = record if record is not None else (parameter.name, parameter.help or "")
    bracket = _RANGE.search(said)
    if bracket and re.search(r"default:|required|[<>]", bracket["words"]):
        said, stated = said[: bracket.start()], [bracket["words"]]
    else:
        stated = []
    words = [*stated, *(match[match.lastindex or 0] for match in _DEFAULT.finditer(said))]
    shown = "; ".join(dict.fromkeys(word.strip().removeprefix("default: ") for word in words))
    return f"| `{names.strip()}` | {_cell(said)} | {_cell(shown)} |\n"


def _cell(text: str) -> str:
    escaped = re.sub(r"([\\*_|<>`\[\]])", r"\\\1", " ".join(text.split()))
    return escaped.replace("--", "&#45;&#45;")
