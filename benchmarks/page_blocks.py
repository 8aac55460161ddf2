"""The fenced code blocks of a Markdown page, with language, line and marks.

Every fence has a language. Marks are HTML comments on the lines before a fence:

    <!-- needs: gpu -->       cannot run here; gpu, hub, engine (another program) or machines
    <!-- not run: REASON -->  is not run, for that reason
    <!-- output -->           before a ```text fence: what the block before it printed

and a comment that begins with `<!-- setup` on a line of its own, until `-->`, holds Python that runs and
is not shown.
"""

import re
from dataclasses import dataclass
from pathlib import Path

NEEDS = ("gpu", "hub", "engine", "machines")
RUN = ("python", "bash", "yaml", "json")
SHOWN = ("text", "toml", "html", "markdown")
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>[^\s`]*)(?P<rest>[^`]*)$")
_MARK = re.compile(r"^\s*<!--\s*(?P<name>[a-z ]+?)\s*(?::\s*(?P<value>.*?))?\s*-->\s*$")


class PageError(Exception):
    """A page has a block that cannot be read, or does not do what it says."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of `page`: its code begins on `line` (from 1), and its fence closes on line `end`."""

    page: Path
    line: int
    end: int
    language: str
    code: str
    mark: str | None = None
    """Why it is not run, None where it is."""
    output: bool = False
    """It shows what the block before it printed."""

    @property
    def where(self) -> str:
        """Where it begins, as page:line."""
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether there is something to run or parse, and nothing forbids it."""
        return self.language in RUN and self.mark is None


def blocks(page: Path) -> list[Block]:
    """Return the blocks of `page` in order, those in `setup` comments among them.

    Raises:
        PageError: a fence has no language or an unknown one, does not end, or bears a mark that says nothing.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    found, at = [], 0
    while at < len(lines):
        if lines[at].strip() == "<!-- setup":
            block = _setup(page, lines, at)
        elif fence := _FENCE.match(lines[at]):
            block = _fenced(page, lines, at, fence)
        else:
            at += 1
            continue
        found.append(block)
        at = block.end
    return found


def _setup(page: Path, lines: list[str], at: int) -> Block:
    end = _end(page, lines, at, re.compile(r"^-->\s*$"))
    return Block(page, at + 2, end + 1, "python", _code(lines[at + 1 : end], 0))


def _fenced(page: Path, lines: list[str], at: int, fence: re.Match[str]) -> Block:
    language, ticks = fence["language"], fence["ticks"]
    if language not in RUN + SHOWN:
        raise PageError(
            f"{page}:{at + 1}: a fence of language {language!r}: legal are {', '.join(RUN + SHOWN)}"
        )
    end = _end(page, lines, at, re.compile(rf"^ *{ticks[0]}{{{len(ticks)},}}\s*$"))
    mark, output = _marks(page, lines, at)
    if output and language != "text":
        raise PageError(f"{page}:{at + 1}: output is shown in a fence of language text, got {language}")
    code = _code(lines[at + 1 : end], len(fence["indent"]))
    return Block(page, at + 2, end + 1, language, code, mark, output)


def _end(page: Path, lines: list[str], at: int, closing: re.Pattern[str]) -> int:
    for index in range(at + 1, len(lines)):
        if closing.match(lines[index]):
            return index
    raise PageError(f"{page}:{at + 1}: this block does not end")


def _code(lines: list[str], indent: int) -> str:
    return "".join(line.removeprefix(" " * indent) + "\n" for line in lines)


def _marks(page: Path, lines: list[str], at: int) -> tuple[str | None, bool]:
    """Return why the fence at line `at` is not run, and whether it shows output."""
    reason, output = None, False
    while at and (mark := _MARK.match(lines[at - 1])):
        at -= 1
        name, value = mark["name"], mark["value"] or ""
        if name == "output":
            output = True
        elif name == "needs" and value in NEEDS:
            reason = f"needs: {value}"
        elif name == "not run" and value:
            reason = f"not run: {value}"
        elif name in ("needs", "not run"):
            legal = f"needs: {', '.join(NEEDS)}; or 'not run: REASON'"
            raise PageError(f"{page}:{at + 1}: the mark {lines[at].strip()!r}: legal are {legal}")
    return reason, output
