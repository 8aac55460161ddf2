"""The documentation: every block runs on a tiny model or says why not; every reference resolves."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import page_blocks
import pages
import pytest
from page_inputs import Inputs
from typer.main import get_command

from eckart.cli import app
from eckart.speed import layers

from . import tiny

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
CAPS = {
    "--tokens": 1024, "--gradient-tokens": 512, "--eval-tokens": 512, "--seq-len": 128, "--steps": 4,
    "--dense-steps": 2, "--batch": 2, "--micro": 2, "--evaluations": 1, "--eval-limit": 4, "--runs": 3,
    "--warmup": 1, "--loads": 0, "--new-tokens": 8, "--fit-tokens": 256, "--hold-tokens": 128, "--points": 3,
    "--vocabulary": 257,
}  # fmt: skip

SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 1024}

COMMANDS = set(vars(get_command(app))["commands"])

Run = Callable[[Path], list[pages.Ran]]


@pytest.fixture
def run(tmp_path: Path, tokenizer: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a page on a tiny model, of the sizes that it asks for."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layers.copies, "__defaults__", (100_000,))  # small maps have many copies else

    def run(page: Path) -> list[pages.Ran]:
        asked = re.findall(r"<!-- model: (.*?) -->", page.read_text(encoding="utf-8"))
        sizes = {
            key: int(value) for key, value in (word.split("=") for words in asked for word in words.split())
        }
        model = tiny.build("llama", **SIZES | sizes)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        folder = tmp_path / "page"
        folder.mkdir()
        inputs = Inputs(tmp_path / "model", text_file, text_file)
        return list(pages.run_page(page, pages.Stage(folder, inputs, CAPS)))

    return run


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```\s*?$|`[^`\n]*`(?!\]\()", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return what the headings of `page` are called in links, as GitHub has them."""
    text = re.sub(r"^```.*?^```\s*?$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def page_of(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_runs(page: Path, run: Run) -> None:
    run(page)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            "```bash\neckart compress MODEL --keep 2 --dry-run\n```",
            "page.md:4: .*: exit code 2: .*keep 2",
        ),
        ("```bash\neckart compres MODEL\n```", "page.md:4: .* exit code 2"),
        ("```bash\ntrue \\\n\ntrue\nno-such-program\n```", "page.md:7: no-such-program: exit code 127"),
        ("```bash\nfalse | true\n```", "page.md:4: .* exit code 1"),
        ("```bash\nif true; then\n  exit 3\nfi\n```", "page.md:4: .* exit code 3"),
        ("```bash\ntrue \\\n```", "page.md:4: the last line of the block goes on"),
        ("```python\nimport sys\nsys.exit()\n```", "page.md:4: the block left Python"),
        ("```yaml\nmodel: MODEL\nkep: 0.8\n```", "page.md:4: not a recipe: .*kep"),
        ("```json\n{'a': 1}\n```", "page.md:4: not JSON"),
        ("```\nx\n```", "page.md:3: a fence of language ''"),
        ("```cobol\nx\n```", "page.md:3: a fence of language 'cobol'"),
        ("```bash\nx\n", "page.md:3: this block does not end"),
        ("<!-- needs: luck -->\n```bash\nx\n```", "page.md:3: the mark .*: legal are needs: gpu"),
        ("<!-- not run: -->\n```bash\nx\n```", "page.md:3: the mark"),
        ("<!-- output -->\n```bash\nx\n```", "page.md:4: output is shown in a fence of language text"),
    ],
)
def test_what_fails_is_named_by_page_and_line(block: str, message: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(page_blocks.PageError, match=re.compile(message, re.DOTALL)):
        run(page_of(tmp_path, f"# A page\n\n{block}\n"))


def test_what_python_raises_shows_the_line_of_the_page(run: Run, tmp_path: Path) -> None:
    page = page_of(tmp_path, "```python\nfirst = 1\n```\n\n```python\nfirst\nassert first == 2\n```\n")
    with pytest.raises(AssertionError) as raised:
        run(page)
    last = raised.traceback[-1]
    assert (Path(last.path).name, last.lineno + 1) == ("page.md", 7)


def test_blocks_share_what_they_make_and_marked_ones_are_left_out(run: Run, tmp_path: Path) -> None:
    text = (
        "<!-- setup\nfrom pathlib import Path\n-->\n"
        "<!-- needs: gpu -->\n```bash\nexit 1\n```\n"
        "<!-- not run: it would fail -->\n```python\n1 / 0\n```\n"
        '```python\nPath("figure.svg").write_text("<svg/>")\nprint("made")\n```\n'
        "<!-- output -->\n```text\n{}```\n"
        "```bash\ncat figure.svg\necho; echo done # and no more\n```\n"
        "<!-- output -->\n```text\n{}```\n"
    )
    page = page_of(tmp_path, text.format("old\n", ""))
    ran = run(page)
    assert [(one.output, [figure.name for figure in one.figures]) for one in ran] == [
        ("", []), ("made", ["figure.svg"]), ("<svg/>\ndone", []),
    ]  # fmt: skip
    assert pages.written(page, ran) == text.format("made\n", "<svg/>\ndone\n")


def test_commands_are_capped_and_nothing_else_is_changed() -> None:
    words = ["compress", "MODEL", "--tokens", "9999", "--seq-len", "16", "--keep", "0.8", "--out", "9999"]
    assert pages._capped(words, CAPS) == [*words[:3], str(CAPS["--tokens"]), *words[4:]]
    assert pages._defaults("eval", CAPS)["eval"]["tokens"] == CAPS["--tokens"]
    assert pages._defaults("eval", {}) == {"eval": {}}
    assert pages._capped(words, {}) == words


@pytest.mark.parametrize(
    ("page", "name"),
    [("docs/a/b.md", "a/b"), ("README.md", "README"), ("/x/docs/c.md", "c"), ("/y/d.md", "d")],
)
def test_results_are_called_like_their_page(page: str, name: str) -> None:
    assert pages.name_of(Path(page)) == Path(name)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_and_reference_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    scripts = "".join(block.code for block in page_blocks.blocks(page) if block.language == "bash")
    named = {
        *re.findall(r"`eckart ([a-z]+)", text),
        *re.findall(r"^ *eckart ([a-z]+)", scripts, re.MULTILINE),
    }
    assert named <= COMMANDS, f"{page}: no such commands: {named - COMMANDS}"
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = page.parent / path if path else page
        assert found.exists(), f"{page}: {target} is not there"
        assert not anchor or anchor in anchors(found), f"{page}: no heading for {target}"


def test_missing_references_would_be_found(tmp_path: Path) -> None:
    for text, message in (
        ("![figure](none.svg)", "none.svg is not there"),
        ("# One `x`, two\n[two](page.md#two)", "no heading for page.md#two"),
        ("Say `eckart compres MODEL`", "no such commands: .*compres"),
    ):
        with pytest.raises(AssertionError, match=message):
            test_every_command_and_reference_is_there(page_of(tmp_path, text))
    sound = page_of(tmp_path, "# One `x`, two\n[one](#one-x-two), `[a](b)`, `eckart eval`")
    test_every_command_and_reference_is_there(sound)
