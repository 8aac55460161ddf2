"""HTML that cannot be broken by what is put into it: text is escaped unless it is `Html` already."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_VOID = ("br", "hr", "input", "link", "meta")
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class Html(str):
    """Text that is HTML: it goes into an element as it is."""

    __slots__ = ()


Child = Html | str


def safe(text: Child) -> Html:
    """Return `text` as HTML: escaped, unless it is HTML."""
    return text if isinstance(text, Html) else Html(escape(text))


def join(children: Sequence[Child], between: str = "") -> Html:
    """Return `children` one after another, each escaped unless it is HTML."""
    return Html(between.join(map(safe, children)))


def element(name: str, attributes: Mapping[str, object] | None = None, *children: Child) -> Html:
    """Return an element; an attribute of True stands without a value, one of False or None not at all."""
    given = (attributes or {}).items()
    written = [
        f" {key}" if value is True else f' {key}="{escape(str(value))}"'
        for key, value in given
        if value is not None and value is not False
    ]
    opened = f"<{name}{''.join(written)}>"
    return Html(opened if name in _VOID else f"{opened}{join(children)}</{name}>")


def embedded(name: str, values: Any) -> Html:
    """Return `values` as JSON in a script element with the id `name`, which no text in it can end.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for letter, code in _UNSAFE.items():
        text = text.replace(letter, code)
    return Html(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def figures(value: object) -> str:
    """Return a cell as text: counts with separators, other numbers to four digits, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1e4:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.4g}"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """Return a table whose first column names its rows."""
    head = [element("th", {"scope": "col"}, column) for column in columns]
    body = [
        element(
            "tr", None,
            *(element("th" if at == 0 else "td", {"scope": "row" if at == 0 else None}, figures(cell))
              for at, cell in enumerate(row)),
        )
        for row in rows
    ]  # fmt: skip
    titled = [element("caption", None, caption)] if caption else []
    inner = (*titled, element("thead", None, element("tr", None, *head)), element("tbody", None, *body))
    return element("table", None, *inner)
