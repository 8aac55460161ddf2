"""What pages link to outside of docs/: Markdown becomes pages of the site, other files are copied along.

A hook of mkdocs (https://www.mkdocs.org/user-guide/configuration/#hooks); nothing that it makes is kept.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LOG = logging.getLogger("mkdocs.hooks.outside")
ROOT = Path(__file__).resolve().parent.parent
STYLES = "_static/site.css"
PAGES = {"CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
"""Pages of the site by the file of the repository."""
HOMES = {"README.md": "index.md"} | PAGES
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files of the repository."""
    files.append(File.generated(config, STYLES, abs_src_path=str(ROOT / "website" / "site.css")))
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/ point at what the site has of it."""
    sources = {name: source for source, name in PAGES.items()}
    generated = page.file.generated_by is not None
    home = ROOT / sources[page.file.src_uri] if page.file.src_uri in sources else None
    if generated and home is None:
        return markdown
    here = (home or ROOT / "docs" / page.file.src_uri).parent
    return _outside_code(
        markdown, lambda text: _LINK.sub(lambda m: _turned(m, here, page, config, files), text)
    )


def _outside_code(markdown: str, change: Any) -> str:
    """Apply `change` to what is neither in a fence nor in a span of code."""
    parts = re.split(r"(^```.*?^```\s*?$|`[^`\n]*`)", markdown, flags=re.MULTILINE | re.DOTALL)
    # Text of links may be code: [`x`](y) has its target in the next part.
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))


def _turned(link: re.Match[str], here: Path, page: Page, config: MkDocsConfig, files: Files) -> str:
    target = Path(os.path.normpath(here / link[2]))
    if not target.exists():  # all of them are told before a strict build stops
        _LOG.warning("%s links to %s, and there is no such file", page.file.src_uri, link[2])
        return link[0]
    if not target.is_relative_to(ROOT):
        raise PluginError(f"{page.file.src_uri} links to {link[2]}, outside of the repository")
    name = target.relative_to(ROOT)
    if name.parts[0] == "docs":
        uri = "/".join(name.parts[1:])
    elif str(name) in HOMES:
        uri = HOMES[str(name)]
    elif target.is_dir():
        raise PluginError(f"{page.file.src_uri} links to the folder {name}: name a file of it")
    else:
        uri = f"files/{name.as_posix()}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
    back = os.path.relpath(uri, Path(page.file.src_uri).parent)
    return f"{link[1]}{back}{link[3] or ''}{link[4]}"
