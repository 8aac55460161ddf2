"""Sections as one HTML file that needs nothing else: no network, no folder beside it."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from ..errors import ConfigError
from . import documents, fronts, html, spectra, svg
from .html import Html, element, join
from .parts import Chart, Code, Grid, Notes, Part, Samples, Section, Spectra, Table

LIMIT = 5_000_000
"""Bytes of a page, at most."""


def page(reports: Sequence[tuple[str, Mapping[str, Any]]], title: str | None = None) -> str:
    """Return one HTML file that shows `reports`, pairs of a name and the values of their JSON.

    Raises:
        ConfigError: there are none, or the page would be larger than LIMIT bytes.
        StoreError: one is not a report, or not of this version.
    """
    if not reports:
        raise ConfigError("no report: give at least one eckart.json, folder of one, or other report in JSON")
    groups = [
        ("", fronts.overview(reports)),
        *((name, documents.sections(own, name)) for name, own in reports),
    ]
    groups = [(name, found) for name, found in groups if found]
    named = title or ", ".join(name for name, _ in reports)
    made = _document(f"{named}: eckart", named, groups)
    size = len(made.encode())
    if size > LIMIT:
        raise ConfigError(
            f"the page would have {size:,} bytes, more than {LIMIT:,}: give fewer reports at once"
        )
    return made


def _document(title: str, heading: str, groups: Sequence[tuple[str, Sequence[Section]]]) -> str:
    drawn = [
        part
        for _, found in groups
        for section in found
        for part in section.parts
        if isinstance(part, Spectra)
    ]
    points = spectra.POINTS // max(1, len(drawn))
    body: list[Html] = []
    links: list[Html] = []
    for name, found in groups:
        for section in found:
            at = f"section-{len(body)}"
            shown = f"{name}: {section.title}" if name and len(groups) > 1 else section.title
            links.append(element("li", None, element("a", {"href": f"#{at}"}, shown)))
            parts = [_part(part, f"{at}-{number}", points) for number, part in enumerate(section.parts)]
            body.append(element("section", {"id": at}, element("h2", None, shown), *parts))
    head = element(
        "head", None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("link", {"rel": "icon", "href": "data:,"}),
        element("title", None, title), Html(f"<style>{_asset('page.css')}</style>"),
    )  # fmt: skip
    nav = element("nav", {"aria-label": "Sections"}, element("ul", None, *links))
    foot = element("footer", None, "Made by eckart. This file needs no network.")
    inner = element("body", None, element("header", None, element("h1", None, heading), nav),
                    element("main", None, *body), foot,
                    Html(f"<script>{_asset('page.js')}</script>"))  # fmt: skip
    return f"<!doctype html>\n{element('html', {'lang': 'en'}, head, inner)}\n"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def fragment(found: Sequence[Section]) -> str:
    """Return tables and notes alone, without style or script: what a notebook shows of a result."""
    parts = [part for section in found for part in section.parts if isinstance(part, Notes | Table)]
    return str(join([_plain(part) for part in parts if not (isinstance(part, Table) and part.folded)]))


def _plain(part: Part) -> Html:
    if isinstance(part, Table):
        return html.table(part.caption, part.columns, part.rows)
    assert isinstance(part, Notes)
    return _notes(part)


def _notes(part: Notes) -> Html:
    return element("ul", {"class": "notes"}, *(element("li", None, line) for line in part.lines))


def _part(part: Part, name: str, points: int) -> Html:
    """Return the HTML of a part; `name` is an id for it, `points` how many ranks its sliders may stop at."""
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Notes):
        return _notes(part)
    if isinstance(part, Code):
        return join(
            [
                element("h3", None, part.caption),
                element("pre", {"tabindex": 0}, element("code", None, part.text)),
            ]
        )
    if isinstance(part, Chart):
        return _figure(part.title, svg.chart(part), svg.legend(part.series), _of_chart(part))
    if isinstance(part, Grid):
        return _figure(part.title, svg.grid(part), svg.bar(part), _of_grid(part))
    if isinstance(part, Spectra):
        return spectra.section(part, name, points)
    return _samples(part)


def _table(part: Table) -> Html:
    folded = part.folded
    made = element(
        "div", {"class": "scroll"}, html.table("" if folded else part.caption, part.columns, part.rows)
    )
    return element("details", None, element("summary", None, part.caption), made) if folded else made


def _figure(title: str, drawing: Html, key: Html, data: Html) -> Html:
    return element(
        "figure", None, element("figcaption", None, title), element("div", {"class": "scroll"}, drawing), key,
        element("details", None, element("summary", None, f"{title}: data"),
                element("div", {"class": "scroll"}, data)),
    )  # fmt: skip


def _of_chart(made: Chart) -> Html:
    rows = [
        (series.name, point.x, point.y, point.said)
        for series in made.series
        if series.marks or len(made.series) == 1
        for point in series.points
    ]
    return html.table("", ("series", made.x.label, made.y.label, ""), rows)


def _of_grid(made: Grid) -> Html:
    def cells(row: str) -> Iterator[object]:
        for column in made.columns:
            cell = made.cells.get((row, column))
            yield None if cell is None else f"{cell.value:.3g}"

    return html.table("", ("layer", *made.columns), [(row, *cells(row)) for row in made.rows])


def _samples(made: Samples) -> Html:
    rows = []
    for prompt, texts in zip(made.prompts, made.texts, strict=True):
        written = [
            element("div", {"class": "text"}, element("h4", None, name), element("p", None, text))
            for name, text in zip(made.names, texts, strict=True)
        ]
        rows.append(element("article", {"class": "sample"}, element("blockquote", None, prompt),
                            element("div", {"class": "side"}, *written)))  # fmt: skip
    return join(rows)
