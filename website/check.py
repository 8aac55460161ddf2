"""Check the built site: every reference and anchor inside resolves, nothing is loaded from a network.

python website/check.py site
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
_LOADING_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "dns-prefetch"}
_IMPORT = re.compile(r"""(?:url\(\s*|@import\s+)["']?(?P<address>[^"')\s]+)""")


class Document(HTMLParser):
    """What a page has: ids, references, and addresses that a browser fetches by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.references: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of one element."""
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if "href" in given:
            self.references.append(given["href"])
        if _LOADED.get(tag, "") in given:
            self.loaded.append(given[_LOADED[tag]])
        if tag == "link" and _LOADING_LINKS & set(given.get("rel", "").split()):
            self.loaded.append(given["href"])
        self.loaded += _addresses(given.get("style", ""))


def _addresses(style: str) -> list[str]:
    return [match["address"] for match in _IMPORT.finditer(style)]


def faults(site: Path) -> Iterator[str]:
    """Say what is wrong with the pages and styles below `site`, one line each."""
    pages = {path: Document(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site}: no pages"
    for path, page in pages.items():
        name = path.relative_to(site)
        yield from (f"{name}: loads {address}" for address in page.loaded if _foreign(address))
        for reference in dict.fromkeys(page.references + page.loaded):
            if not (_foreign(reference) or _resolves(reference, path, site, pages)):
                yield f"{name}: {reference} is not there"
    for style in sorted(site.rglob("*.css")):
        found = _addresses(style.read_text(encoding="utf-8"))
        yield from (f"{style.relative_to(site)}: loads {one}" for one in found if _foreign(one))


def _foreign(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp")


def _resolves(reference: str, page: Path, site: Path, pages: dict[Path, Document]) -> bool:
    parts = urlsplit(reference)
    if parts.scheme in ("data", "mailto", "javascript"):
        return True
    path = unquote(parts.path)
    target = page if not path else (site / path.lstrip("/") if path.startswith("/") else page.parent / path)
    target = target.resolve()
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return False
    fragment = unquote(parts.fragment)
    # Material's own: they say what a click does.
    known = {page.resolve(): one for page, one in pages.items()}.get(target)
    return not fragment or known is None or fragment in known.ids or fragment.startswith("__")


def main() -> None:
    """Check the folder that is named."""
    site = Path(sys.argv[1])
    found = list(faults(site))
    if found:
        sys.exit("\n".join(found))
    count = sum(1 for _ in site.rglob("*.html"))
    print(f"{count} pages: every reference resolves, nothing comes from a network")


if __name__ == "__main__":
    main()
