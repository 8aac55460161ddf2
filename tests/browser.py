"""A headless Chromium, where there is one: in the path, or named by CHROMIUM."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")


def executable() -> str | None:
    """Return the browser's path, None where there is none."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


def lacking() -> str | None:
    """Return what is missing to run a browser, None where nothing is."""
    if find_spec("playwright") is None:
        return "no playwright: pip install playwright"
    if executable() is None:
        return f"no browser among {', '.join(_NAMES)}: apt-get install chromium, or set CHROMIUM"
    return None


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """Open the page at `path`; give it, and a list, which fills up, of what went wrong or left the file."""
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    with sync_playwright() as started:
        # Root in a container has no sandbox; the pages are our own.
        browser = started.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        try:
            page = browser.new_context(**options).new_page()
            page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
            page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
            page.on("request", lambda request: wrong.extend(_foreign(request.url)))
            page.goto(path.resolve().as_uri())
            yield page, wrong
        finally:
            browser.close()


def _foreign(address: str) -> list[str]:
    return [] if address.startswith(("file:", "data:")) else [f"request: {address}"]
