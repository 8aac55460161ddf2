"""Run a page of the documentation: every block in order, in one fresh folder.

    python benchmarks/pages.py README.md docs/X.md --model MODEL --text T --eval-text E [--write]

`--model` is a folder or a .gguf file. What each block printed, its seconds, date, versions, machine and
command go to `--out`/X.json, the figures that blocks saved (.svg, .png) to `--out`/X/; a page shows one as
`../benchmarks/results/pages/X/figure.svg`. `--write` puts fresh output into the page's output fences. How
pages mark blocks is in page_blocks.py; the names that they may use without making them are in page_inputs.py.

- python: blocks share one namespace; what a block reads by a "quoted" name of page_inputs.py is made before
  it. It writes to names that are new on the page.
- bash: a line that begins with `eckart` and has no pipe or `&&` (`> FILE` may end it) runs in this process,
  once what is there of the name that it gives to --out, --html or --figures is deleted. A block with a
  compound (if, for, while) or a document (<<) is one script, other lines are one script each, with this
  Python's programs in the path. A block fails by an exit code other than 0.
- yaml is a recipe of eckart, json is JSON: both are parsed.
- `<!-- model: num_hidden_layers=16 -->` anywhere on a page says what its commands need of the small model
  that tests run them on; the real model is as it is.

For speed, tests (tests/test_docs.py) cap the options of `Caps` in commands, where given and by default;
nothing else in a command is ever changed, and on a real model not even that.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import page_blocks
import torch
import yaml
from page_blocks import Block, PageError
from page_inputs import PLACEHOLDERS, Inputs
from typer.main import get_command
from typer.testing import CliRunner

from eckart import environment, hub, recipe
from eckart.cli import app
from eckart.errors import ConfigError

Caps = Mapping[str, int]
"""By option: the largest value that a command gets, and what it gets where it says nothing."""
FIGURES = (".svg", ".png")
WIDTH = "110"
_WRITES = ("--out", "--html", "--figures")
_COMPOUND = re.compile(r"^\s*(if|for|while|until|case|function)\b|<<|\{\s*$", re.MULTILINE)
_OPERATOR = re.compile(r"^[|&;<>()]+$")


@dataclass(frozen=True, slots=True)
class Ran:
    """What a block printed, how long it took, and the figures that it saved."""

    block: Block
    output: str
    seconds: float
    figures: tuple[Path, ...]

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Return JSON values; figures relative to `folder`."""
        return {
            "line": self.block.line,
            "language": self.block.language,
            "code": self.block.code,
            "output": self.output,
            "seconds": round(self.seconds, 2),
            "figures": [str(figure.relative_to(folder)) for figure in self.figures],
        }


@dataclass(slots=True)
class Stage:
    """A folder in which a page runs: the current one while it does."""

    folder: Path
    inputs: Inputs
    caps: Caps = field(default_factory=dict)
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__page__"})

    def run(self, block: Block) -> Ran:
        """Run `block`.

        Raises:
            PageError: a command, a recipe or JSON fails, with page and line; what Python code raises
                passes, with page and line in its traceback.
        """
        before, start = set(self._figures()), time.perf_counter()
        with _inside(self.folder):
            output = _RUNNERS[block.language](self, block)
        seconds = time.perf_counter() - start
        shown = output.replace(f"{self.folder.resolve()}{os.sep}", "")
        new = tuple(sorted(set(self._figures()) - before))
        return Ran(block, "\n".join(line.rstrip() for line in shown.splitlines()), seconds, new)

    def _figures(self) -> Iterator[Path]:
        # Not through links: the model's own folder is none of the page's.
        return (path for path in self.folder.rglob("*") if path.suffix in FIGURES)

    def need(self, names: Sequence[str]) -> None:
        """Make those of `names` that are inputs and not there."""
        for name in names:
            if name.rstrip("/") in PLACEHOLDERS:
                self.inputs.make(name.rstrip("/"), self.folder)


def run_page(page: Path, stage: Stage) -> Iterator[Ran]:
    """Run the blocks of `page` in order, as they are asked for; those that are marked are left out.

    Raises:
        PageError: as `Stage.run` and `page_blocks.blocks` do.
    """
    return (stage.run(block) for block in page_blocks.blocks(page) if block.runs)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def _run_python(stage: Stage, block: Block) -> str:
    stage.need(re.findall(r"""["']([\w./-]+)["']""", block.code))
    # Lines before it stand empty, so that a traceback shows the page's own lines.
    code = compile("\n" * (block.line - 1) + block.code, str(block.page.resolve()), "exec")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), _columns():
        try:
            exec(code, stage.namespace)
        except SystemExit as error:
            raise PageError(f"{block.where}: the block left Python with {error.code!r}") from error
    return said.getvalue()


@contextlib.contextmanager
def _columns() -> Iterator[None]:
    known = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if known is not None:
            os.environ["COLUMNS"] = known


def _run_bash(stage: Stage, block: Block) -> str:
    if _COMPOUND.search(block.code):
        words = [word for _, line in _lines(block) for word in _words(block, line)]
        stage.need(_read(words))
        return _run_script(block, block.line, block.code)
    return "".join(_run_line(stage, block, number, line) for number, line in _lines(block))


def _lines(block: Block) -> Iterator[tuple[int, str]]:
    """Give the lines of `block` with their numbers, continued ones as one."""
    whole, first = "", block.line
    for number, line in enumerate(block.code.splitlines(), block.line):
        if not whole:
            first = number
        if line.endswith("\\"):
            whole += line[:-1]
            continue
        if (whole + line).strip():
            yield first, whole + line
        whole = ""
    if whole:
        raise PageError(f"{block.page}:{first}: the last line of the block goes on")


def _words(block: Block, line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.wordchars += "%:,@{}[]+"
    try:
        return list(lexer)
    except ValueError as error:
        raise PageError(f"{block.where}: {line!r}: {error}") from error


def _read(words: Sequence[str]) -> list[str]:
    """Return the words that are not the names of what is written."""
    pairs = zip(["", *words[:-1]], words)
    named = [word for before, word in pairs if before not in (*_WRITES, ">", ">>")]
    return [part for word in named for part in re.split(r"[=,]", word)]


def _run_line(stage: Stage, block: Block, number: int, line: str) -> str:
    words = _words(block, line)
    if not words:
        return ""
    stage.need(_read(words))
    command, file = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)
    if command[0] == "eckart" and not any(_OPERATOR.match(word) for word in command):
        said = _run_command(stage, f"{block.page}:{number}", command[1:])
        if file is None:
            return said
        (stage.folder / file).write_text(said, encoding="utf-8")
        return ""
    return _run_script(block, number, line)


def _run_command(stage: Stage, where: str, words: list[str]) -> str:
    for option, value in itertools.pairwise(words):
        if option in _WRITES:
            _remove(stage.folder / value)
    defaults = _defaults(words[0] if words else "", stage.caps)
    runner = CliRunner()
    found = runner.invoke(app, _capped(words, stage.caps), default_map=defaults, env={"COLUMNS": WIDTH})
    if found.exit_code != 0:
        said = found.output.strip() or repr(found.exception)
        raise PageError(f"{where}: eckart {shlex.join(words)}: exit code {found.exit_code}: {said}") from (
            None if isinstance(found.exception, SystemExit) else found.exception
        )
    return str(found.stdout)


def _defaults(name: str, caps: Caps) -> dict[str, dict[str, int]]:
    """Return what the options of command `name` that `caps` names are where a command does not say."""
    command = getattr(get_command(app), "commands", {}).get(name)
    options = () if command is None else command.params
    return {
        name: {
            str(option.name): caps[word]
            for option in options
            for word in option.opts
            if word in caps and not option.multiple
        }
    }


def _capped(words: Sequence[str], caps: Caps) -> list[str]:
    capped = list(words)
    for index, (option, value) in enumerate(itertools.pairwise(words)):
        if option in caps and value.isdecimal():
            capped[index + 1] = str(min(int(value), caps[option]))
    return capped


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _run_script(block: Block, number: int, script: str) -> str:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=os.environ | {"PATH": path, "COLUMNS": WIDTH, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode != 0:
        said = (found.stderr or found.stdout).strip()
        raise PageError(f"{block.page}:{number}: {script.strip()}: exit code {found.returncode}: {said}")
    return found.stdout


def _parse_yaml(_: Stage, block: Block) -> str:
    try:
        recipe.from_mapping(yaml.safe_load(block.code), block.where)
    except (yaml.YAMLError, ConfigError) as error:
        raise PageError(f"{block.where}: not a recipe: {error}") from error
    return ""


def _parse_json(_: Stage, block: Block) -> str:
    try:
        json.loads(block.code)
    except json.JSONDecodeError as error:
        raise PageError(f"{block.where}: not JSON: {error}") from error
    return ""


_RUNNERS = {"python": _run_python, "bash": _run_bash, "yaml": _parse_yaml, "json": _parse_json}


def written(page: Path, ran: Sequence[Ran]) -> str:
    """Return the text of `page` with what each block printed in the output fence that follows it."""
    lines = page.read_text(encoding="utf-8").splitlines()
    outputs = {one.block.line: one.output for one in ran}
    changes, last = [], None
    for block in page_blocks.blocks(page):
        if block.output and last is not None:
            changes.append((block, outputs[last.line]))
        elif block.runs:
            last = block
    for block, output in reversed(changes):
        lines[block.line - 1 : block.end - 1] = output.strip("\n").splitlines()
    return "\n".join(lines) + "\n"


def name_of(page: Path) -> Path:
    """Return what the results of `page` are called: its path below docs, without a suffix."""
    parts = page.with_suffix("").parts
    return Path(*parts[len(parts) - parts[::-1].index("docs") :]) if "docs" in parts else Path(parts[-1])


def _keep(page: Path, ran: Sequence[Ran], stage: Stage, out: Path) -> None:
    name = name_of(page)
    _remove(out / name)
    for one in ran:
        for figure in one.figures:
            target = out / name / figure.relative_to(stage.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(figure, target)
    values = {
        "page": str(page),
        "command": f"python benchmarks/pages.py {page} --model MODEL --text TEXT --eval-text EVAL_TEXT",
        "environment": environment.describe(),
        "blocks": [one.to_dict(stage.folder) for one in ran],
    }
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def as_folder(model: Path, scratch: Path) -> Path:
    """Return the folder of `model`; a GGUF is written to `scratch` in bfloat16, as folders on a hub are."""
    if model.is_dir():
        return model
    loaded = hub.load(str(model), compute=torch.bfloat16)
    loaded.model.save_pretrained(scratch / "MODEL")
    loaded.tokenizer.save_pretrained(scratch / "MODEL")
    return scratch / "MODEL"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--eval-text", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pages"))
    parser.add_argument("--write", action="store_true", help="put fresh output into the pages")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    os.environ.setdefault("MPLBACKEND", "agg")
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Inputs(as_folder(options.model, Path(scratch)), options.text, options.eval_text)
        for page in options.pages:
            folder = Path(scratch) / "pages" / name_of(page)
            folder.mkdir(parents=True)
            stage = Stage(folder, inputs)
            ran = []
            for one in run_page(page, stage):
                print(f"{one.block.where}: {one.seconds:.1f} s", flush=True)
                ran.append(one)
            _keep(page, ran, stage, options.out)
            if options.write:
                page.write_text(written(page, ran), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except PageError as error:
        sys.exit(str(error))
