"""The documentation: every block runs on a tiny model or says why not; every reference resolves."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages
import pytest
from page_inputs import Inputs

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
        return pages.run_page(page, pages.Stage(folder, inputs, CAPS))

    return run


def page_of(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs(page: Path, run: Run) -> None:
    run(page)
