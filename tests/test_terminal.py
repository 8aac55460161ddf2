"""What commands print: at every width, without colour, in pipes, as JSON; how they end."""

import inspect
import io
import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.cells import cell_len
from rich.console import Console, Group
from typer.main import get_command
from typer.testing import CliRunner

from eckart import evaluating, panels, render, terminal
from eckart.bars import Bars
from eckart.cli import app

from .commanded import SHOWING, WRITING, Commanded, invoke

ANSI = re.compile(r"\x1b\[")
COMMANDS = {
    info.name or getattr(info.callback, "__name__", ""): info.callback for info in app.registered_commands
}
WIDTHS = (40, 80, 200)


def printed(what: Any, width: int, environment: dict[str, str] | None = None, tty: bool = True) -> str:
    """Return what a terminal of `width` gets."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=tty or None, _environ=environment or {})
    console.print(what)
    return file.getvalue()


@pytest.mark.parametrize("name", [*WRITING, *SHOWING])
def test_nothing_is_wider_than_the_terminal_and_no_word_is_lost(commanded: Commanded, name: str) -> None:
    assert commanded.shown[name], "nothing was shown"
    for what in commanded.shown[name]:
        wide = re.sub(r"[^\w.%,+-]", "", printed(what, 2_000, {"TERM": "dumb"}, tty=False))
        for width in WIDTHS:
            text = ANSI.sub("", re.sub(r"\x1b\[[\d;]*m", "", printed(what, width)))
            assert max(map(cell_len, text.splitlines())) <= width, text
            figures = set(re.findall(r"\d[\d,.]*\d", text))
            for figure in figures:
                assert figure in wide, (width, figure)


def tables(what: Any) -> Iterator[render.Rows]:
    """Return the tables that are shown by `what`."""
    if hasattr(what, "__rich__"):
        yield from tables(what.__rich__())
    elif isinstance(what, Group):
        for part in what.renderables:
            yield from tables(part)
    elif isinstance(what, render.Rows):
        yield what


@pytest.mark.parametrize("name", [*WRITING, *SHOWING])
def test_no_word_of_a_table_is_broken(commanded: Commanded, name: str) -> None:
    found = [made for what in commanded.shown[name] for made in tables(what)]
    assert found or name in ("merged", "diff")
    for made in found:
        for width in WIDTHS:
            words = set(re.split(r"[\s│┃]+", printed(made, width, {"TERM": "dumb"}, tty=False)))
            for cell in (cell for row in made.rows for cell in row):
                assert {word for word in cell.split() if len(word) < 20} <= words, (width, cell)


@pytest.mark.parametrize(
    ("environment", "tty"), [({"TERM": "dumb"}, True), ({}, False), ({"NO_COLOR": "1"}, True)]
)
def test_no_colour_where_none_is_wanted(commanded: Commanded, environment: dict[str, str], tty: bool) -> None:
    coloured = False
    for name in ("compressed", "eval", "diff"):
        for what in commanded.shown[name]:
            text = printed(what, 80, environment, tty)
            codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", text) for code in found.split(";")}
            # NO_COLOR is about colour; bold and italic (1, 3, 0 to end them) are none.
            assert codes <= ({"0", "1", "3", ""} if "NO_COLOR" in environment else set()), codes
            coloured |= bool(
                ANSI.search(printed(what, 80, {"TERM": "xterm-256color", "COLORTERM": "truecolor"}))
            )
    assert coloured


def test_a_narrow_table_is_stacked_and_a_wide_one_is_not() -> None:
    made = render.table(
        "sizes", ("what", "before", "after"), [("parameters", "1,234,567", "1,000"), ("", "x", "")]
    )
    assert "parameters\n  before: 1,234,567\n  after: 1,000\n-\n  before: x\n" in render.plain(made, 20)
    wide = render.plain(made, 60)
    assert "before:" not in wide
    assert any("1,234,567" in line and "1,000" in line for line in wide.splitlines())


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_json_and_help_of_any_width(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = COMMANDS[name]
    assert callback is not None
    assert "as_json" in inspect.signature(callback).parameters, f"{name} has no --json"
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        found = CliRunner().invoke(app, [name, "--help"])
        assert found.exit_code == 0
        assert not ANSI.search(found.output)
        if width >= 80:
            assert "--json" in found.output
            assert max(map(cell_len, found.output.splitlines())) <= width


def test_estimates_are_of_this_run_of_a_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("eckart.bars.time.monotonic", lambda: now)
    with Bars() as bars:
        for stage, done, later in (
            ("measure", 0, 0), ("measure", 1, 20), ("measure", 4, 60),  # a quarter in 80 s
            ("choose", 0, 5), ("choose", 1, 500),
            ("measure", 0, 50), ("measure", 8, 16),  # again: half in 16 s
            ("calibrate", 6, 30), ("calibrate", 8, 40),  # goes on from 6, which took none of its time
        ):  # fmt: skip
            now += later
            bars.watch(stage, done, 16)
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "measure: 0 of 16", "measure: 1 of 16, 300 s left", "measure: 4 of 16, 240 s left",
        "choose: 0 of 16", "choose: 1 of 16, 7500 s left",
        "measure: 0 of 16", "measure: 8 of 16, 16 s left",
        "calibrate: 6 of 16", "calibrate: 8 of 16, 160 s left",
    ]  # fmt: skip


def test_every_command_and_every_option_of_a_very_long_one_stands_in_a_panel() -> None:
    named = [name for names in panels.COMMANDS.values() for name in names]
    assert sorted(named) == sorted(COMMANDS)
    options = [name for names in panels.OPTIONS.values() for name in names]
    assert len(options) == len(set(options))
    found = getattr(get_command(app), "commands")  # noqa: B009  no type says that it is a group
    used: set[str] = set()
    for name, command in found.items():
        own = {one.name for one in command.params if one.param_type_name == "option"}
        used |= own
        if name in ("compress", "tune", "pretrain"):  # others have what is theirs alone in front
            assert own <= set(options), f"{name}: {own - set(options)} in no panel"
    assert set(options) <= used


def test_the_help_of_a_long_command_has_its_panels_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    lines = CliRunner().invoke(app, ["compress", "--help"]).output.splitlines()
    assert [line.strip("╭─╮ ") for line in lines if line.startswith("╭─")] == [
        "Arguments", "Options", "Budget", "Method", "Text and data", "Machine", "Output",
    ]  # fmt: skip
    budget = "\n".join(lines).partition("─ Budget ")[2].partition("─ Method ")[0]
    assert "--keep" in budget
    assert "--text" not in budget


QUICK: dict[str, tuple[Any, ...]] = {
    "compress": (*WRITING["streamed"], "--out", "streamed-json"),
    "quantise": (*WRITING["quantised"], "--out", "quantised-json"),
    "share": (*WRITING["shared"], "--out", "shared-json"),
    "untie": (*WRITING["untied"], "--out", "untied-json"),
    "tie": (*WRITING["tied"], "--out", "tied-json"),
    "export": (*WRITING["exported"], "--out", "exported-json"),
    "extract": (*WRITING["extracted"], "--out", "extracted-json"),
    "resize": (*WRITING["resized"], "--out", "resized-json"),
    "merge": (*WRITING["merged"], "--out", "merged-json"),
    "heal": (*WRITING["healed"], "--out", "healed-json"),
    "tune": (*WRITING["adapter"], "--out", "adapter-json"),
    "pretrain": (*WRITING["pretrained"], "--out", "pretrained-json"),
    **{name: SHOWING[name] for name in ("eval", "diff", "params", "spectrum", "bench", "push")},
    **{name: SHOWING[name] for name in ("curve", "sweep", "cache", "compare")},
    "report": ("report", "compressed", "--out", "page.html"),
}


def test_json_is_tried_of_every_command() -> None:
    assert set(QUICK) == set(COMMANDS)


@pytest.mark.parametrize("name", list(QUICK))
def test_stdout_is_json_alone(commanded: Commanded, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(commanded.root)
    found = invoke(*QUICK[name], "--json")
    assert found.exit_code == 0, found.output
    assert isinstance(json.loads(found.stdout), dict)


def test_exit_codes_are_documented_and_true(commanded: Commanded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(commanded.root)
    monkeypatch.setenv("COLUMNS", "200")
    help_text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    for words in ("0 done", "1 you said no", "2 refused", "130 interrupted"):
        assert words in help_text, words
    assert invoke("params").exit_code == 0
    for wrong in (
        ("eval", "nowhere/at/all", "--text", "text.txt"),
        ("eval", "dense"),
        ("eval", "--wrong"),
        ("no",),
    ):
        found = invoke(*wrong)
        assert found.exit_code == 2, found.output
        assert found.stdout == ""
        assert found.stderr

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluating, "evaluate", interrupted)
    found = invoke("eval", "dense", "--text", "text.txt", "--json")
    assert found.exit_code == 130
    assert found.stdout == ""
    assert "interrupted: nothing was written" in found.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals to try it on")
@pytest.mark.parametrize("width", WIDTHS)
def test_on_a_real_terminal_the_width_is_its_own(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = os.openpty()
    made = render.table("a title", ("module", *"abcdef"), [("model.layers.0", *["1,234,567"] * 6)])
    with os.fdopen(slave, "w") as screen:
        monkeypatch.setattr("sys.stdout", screen)
        terminal.show(made, as_json=False)
        screen.flush()
        text = os.read(master, 1 << 16).decode()
    os.close(master)
    assert ANSI.search(text)
    bare = re.sub(r"\x1b\[[\d;]*m", "", text).replace("\r", "")
    assert max(map(cell_len, bare.splitlines())) <= width
    assert ("a: 1,234,567" in bare) == (width < 90)  # what the words and lines of the grid take


class Swallowing:
    """Interrupts while it is collected, where Python can only ignore it."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_is_lost_in_a_destructor_is_heard_at_the_next_step() -> None:
    # Where tests run in the background, the signal is ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Bars() as bars:
            bars.watch("calibrate", 0, 2)
            Swallowing()
            assert bars.interrupted
            with pytest.raises(KeyboardInterrupt):
                bars.watch("calibrate", 1, 2)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_left_to_who_ignores_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Bars() as bars:
            signal.raise_signal(signal.SIGINT)
            bars.watch("calibrate", 1, 1)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_usage_error_of_a_sub_command_is_told_on_stderr() -> None:
    assert isinstance(app, typer.Typer)
    found = invoke("compress", "--keep", "much")
    assert found.exit_code == 2
    assert "Invalid value" in found.stderr
