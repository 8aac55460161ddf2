"""Pages: one file without network that hostile names cannot break, whose figures are those of the report."""

import base64
import copy
import json
import math
import re
import struct
import sys
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import eckart
from eckart import ConfigError, StoreError, reporting
from eckart.cli import app
from eckart.pages import documents, facts, fronts, page, pictures, scales, spectra
from eckart.pages.notebook import plain
from eckart.pages.parts import Curve, Grid, Point, Spectra
from eckart.survey import Survey

from . import browser

SMALL: dict[str, Any] = {"tokens": 1024, "gradient_tokens": 512, "seq_len": 64}
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\u2028"
_LACKING = browser.lacking()
in_browser = pytest.mark.skipif(_LACKING is not None, reason=str(_LACKING))
VOID = {"br", "hr", "img", "input", "link", "meta"}
CURVE: dict[str, Any] = {
    "source": "m", "architecture": "LlamaForCausalLM", "method": "eckart", "bytes": 2_000_000,
    "dense": {"perplexity": 20.0, "predicted": 100, "seq_len": 64}, "warnings": [],
    "rows": [
        {
            "keep": keep, "keep_linears": keep, "keep_model": keep, "parameters": 1000,
            "bytes": int(2e6 * keep),
            "predicted_increase": rise, "predicted_perplexity": 20 * math.exp(rise),
            "corrected_increase": 1.2 * rise, "corrected_perplexity": 20 * math.exp(1.2 * rise),
            "measured_increase": measured, "measured_perplexity": measured and 20 * math.exp(measured),
        }
        for keep, rise, measured in ((1.0, 0.0, None), (0.8, 0.1, 0.12), (0.5, 0.6, None))
    ],
}  # fmt: skip
SWEEP: dict[str, Any] = {
    "source": "m", "protocol": {"seq_len": 64},
    "rows": [
        {"method": method, "keep": keep, "storage": "float",
         "perplexity": 20 / keep * factor, "increase": factor / keep,
         "predicted_increase": 0.5 / keep, "bytes": int(2e6 * keep)}
        for method, factor in (("svd", 3.0), ("eckart", 1.0))
        for keep in (0.9, 0.5)
    ],
}  # fmt: skip


class Nested(HTMLParser):
    """Checks that every element that is opened is closed, in order; keeps attributes, ids and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "action", "data", "srcset"):
                self.loads.append(value or "")
            if key == "id":
                self.ids.append(value or "")
            if key.startswith("on"):
                self.handlers.append(key)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Nested:
    """Parse a page and check what holds of all of them."""
    found = Nested()
    found.feed(text)
    found.close()
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert all(place.startswith(("#", "data:")) for place in found.loads), found.loads
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|\beval\(", text)
    assert "img" not in found.names
    assert found.handlers == []
    assert len(text.encode()) <= page.LIMIT
    return found


@pytest.fixture(scope="module")
def survey(llama_folder: Path, text_file: Path) -> Survey:
    return eckart.spectrum(llama_folder, text=text_file, **SMALL)


@pytest.fixture(scope="module")
def report(compressed_folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((compressed_folder / "eckart.json").read_text())
    return found


def embedded(text: str) -> dict[str, Any]:
    """Return the data of the first slider of a page."""
    found = re.search(r'<script type="application/json" id="[^"]*-data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = json.loads(found[1])
    return values


def floats(text: str) -> list[float]:
    raw = base64.b64decode(text)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def test_every_kind_of_report_makes_a_page(report: dict[str, Any], survey: Survey) -> None:
    for values in (report, plain(survey.document()), plain(survey.values_dict()), CURVE, SWEEP):
        found = checked(page.page([("a", values)]))
        assert "main" in found.names
    whole = checked(page.page([("a", report), ("b", report), ("c", plain(survey.document())), ("d", CURVE)]))
    assert whole.names.count("section") > 6


def test_what_is_embedded_is_the_spectrum(survey: Survey) -> None:
    data = embedded(page.page([("a", plain(survey.values_dict()))]))
    for found, matrix in zip(data["matrices"], survey.matrices, strict=True):
        assert found["name"] == matrix.name
        for metric, values in matrix.whole.values.items():
            own = found["metrics"][metric]
            assert data["stops"][str(len(values))] == list(range(1, len(values) + 1))
            assert floats(own["values"]) == pytest.approx(values.tolist(), rel=1e-6, abs=1e-30)
            tails = values.square().flip(0).cumsum(0).flip(0)
            left = torch.cat([tails[1:], tails.new_zeros(1)]).div(tails[0]).sqrt()
            assert floats(own["errors"]) == pytest.approx(left.tolist(), rel=1e-5, abs=1e-7)
            assert floats(own["errors"]) != pytest.approx(floats(own["values"]), rel=1e-2)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40).map(lambda found: sorted(found, reverse=True)))
def test_errors_fall_to_nothing_and_are_those_of_eckart_and_young(values: list[float]) -> None:
    found = spectra.errors(values)
    assert found[-1] == 0
    assert all(after <= before + 1e-12 for before, after in pairwise(found))
    whole = math.fsum(value**2 for value in values)
    if whole > 0:
        for rank, error in enumerate(found, 1):
            assert error == pytest.approx(math.sqrt(math.fsum(v**2 for v in values[rank:]) / whole), abs=1e-9)


@given(st.integers(1, 20_000), st.integers(24, 400))
def test_sliders_stop_at_both_ends_and_not_too_often(count: int, wanted: int) -> None:
    found = spectra.stops(count, wanted)
    assert (found[0], found[-1]) == (1, count)
    assert found == sorted(set(found))
    assert len(found) == count if count <= wanted else len(found) <= wanted


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), st.booleans())
def test_axes_hold_all_values_with_ticks_inside(values: list[float], log: bool) -> None:
    scale = scales.Scale.over(values, 10, 90, log)
    assert all(10 - 1e-6 <= scale(value) <= 90 + 1e-6 for value in values)
    ticks = scale.ticks()
    assert len(ticks) >= 2
    assert all(10 - 1e-3 <= scale(tick) <= 90 + 1e-3 for tick in ticks)


def test_logarithmic_axes_refuse_what_they_cannot_show() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        scales.Scale.over([0.0, 1.0], 0, 1, log=True)


def test_hostile_names_stay_text(report: dict[str, Any], survey: Survey) -> None:
    bad = copy.deepcopy(report)
    bad["modules"][0]["name"] = f"layers.0.{HOSTILE}"
    bad["source"] = bad["recipe"]["model"] = HOSTILE
    bad["warnings"] = [HOSTILE]
    values = plain(survey.document())
    values["spectra"]["matrices"][0]["name"] = values["matrices"][0]["name"] = HOSTILE
    values["spectra"]["matrices"][0]["kind"] = HOSTILE
    text = page.page([(HOSTILE, bad), ("b", values)])
    checked(text)
    assert escape(HOSTILE) in text
    assert embedded(text)["matrices"][0]["name"] == HOSTILE
    assert "<img" not in page.fragment(documents.sections(bad, "a"))


def test_paths_of_the_machine_are_cut(report: dict[str, Any]) -> None:
    folder = str(Path(report["recipe"]["text"][0]).parent)
    assert folder.startswith("/")
    assert folder not in page.page([("a", report)])
    assert facts.short({"a": ["/x/y/z.txt", "wiki=2"]}) == {"a": ["z.txt", "wiki=2"]}


def test_large_models_fit(survey: Survey) -> None:
    values = torch.logspace(2, -3, 4096, dtype=torch.float64).tolist()
    curves = [
        Curve(f"layers.{at}.q", "q", (4096, 11008), {"plain": values, "two-sided": values})
        for at in range(224)
    ]
    made = Spectra("spectra", {"plain": "", "two-sided": ""}, curves)
    text = spectra.section(made, "x", spectra.POINTS)
    assert 1_000_000 < len(text) < page.LIMIT
    with pytest.raises(ConfigError, match="give fewer reports at once"):
        page.page([("a", {**CURVE, "warnings": ["long " * 1_200_000]})])


def test_grids_add_up(report: dict[str, Any]) -> None:
    kept, loss = (part for part in documents.drawn(documents.sections(report, "a")) if isinstance(part, Grid))
    module = report["modules"][0]
    cell = kept.cells["q_proj", "0"]
    assert module["name"].endswith("0.self_attn.q_proj")
    assert cell.value == pytest.approx(module["after"] / module["before"])
    total = sum(one["loss"] for one in report["modules"])
    assert sum(one.value for one in loss.cells.values()) == pytest.approx(total)


def test_nothing_beats_the_front() -> None:
    generator = torch.Generator().manual_seed(0)
    points = [Point(x, y, "") for x, y in torch.rand(60, 2, generator=generator).tolist()]
    best = fronts.front(points)
    for point in points:
        beaten = any(other.x <= point.x and other.y <= point.y and other != point for other in points)
        assert (point in best) is not beaten


def test_what_is_no_report_is_refused(tmp_path: Path, report: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"not a report that is known: it holds a\. Give an eckart\.json"):
        page.page([("x", {"a": 1})])
    broken = copy.deepcopy(report)
    del broken["before"]["model"]
    with pytest.raises(
        StoreError, match=r"x lacks what this version shows \(KeyError: 'model'\): make it again"
    ):
        page.page([("x", broken)])
    with pytest.raises(ConfigError, match="no report: give at least one"):
        page.page([])
    with pytest.raises(StoreError, match="no such file or folder; give a report in JSON"):
        reporting.read(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="holds no report"):
        reporting.read(tmp_path)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(StoreError, match="holds a list: a report is an object"):
        reporting.read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(StoreError, match="is not JSON that can be read"):
        reporting.read(tmp_path / "a.json")


def test_the_command(tmp_path: Path, compressed_folder: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP))
    out, pictured = tmp_path / "report.html", tmp_path / "figures"
    sources = [str(compressed_folder), str(tmp_path / "sweep.json")]
    command = ["report", *sources, "--out", str(out), "--figures", str(pictured)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    checked(out.read_text())
    names = {str(file.relative_to(pictured)) for file in pictured.rglob("*.*")}
    assert {"small/kept.png", "small/kept.svg", "sweep.json/front.png", "sweep.json/front.svg"} <= names
    again = CliRunner().invoke(app, command)
    assert (again.exit_code, "choose another --out" in again.output) == (2, True)
    assert CliRunner().invoke(app, [*command, "--overwrite", "--json"]).exit_code == 0
    nothing = CliRunner().invoke(app, ["report", *sources])
    assert (nothing.exit_code, "nothing to write" in nothing.output) == (2, True)


def test_pages_beside_compress_and_spectrum(tmp_path: Path, llama_folder: Path) -> None:
    made = tmp_path / "c.html"
    command = [
        "compress",
        str(llama_folder),
        "--keep",
        "0.8",
        "--method",
        "svd",
        "--out",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(app, [*command, "--html", str(made)])
    assert done.exit_code == 0, done.output
    checked(made.read_text())
    done = CliRunner().invoke(app, ["spectrum", str(llama_folder), "--html", str(made)])
    assert (done.exit_code, "choose another --html" in done.output) == (2, True)
    done = CliRunner().invoke(app, ["spectrum", str(llama_folder), "--html", str(made), "--overwrite"])
    assert done.exit_code == 0, done.output
    assert embedded(made.read_text())["matrices"]


def test_results_show_themselves(survey: Survey, tmp_path: Path, llama: Any) -> None:
    _, result = eckart.compress(llama, keep=0.8, method="svd")
    for shown in (result, survey):
        assert shown._repr_html_().count("<table>") >= 1
        shown.plot().savefig(tmp_path / "a.png")
        checked(shown.to_html())
    frame = result.to_frame()
    assert list(frame["name"]) == [module.name for module in result.modules]
    assert list(frame["kept"]) == pytest.approx([module.after / module.before for module in result.modules])
    assert len(survey.to_frame()) == len(survey.matrices) * len(survey.metrics)


def test_what_is_missing_is_named(survey: Survey, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nothing to draw"):
        pictures.figure([])
    for name in ("pandas", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"data frames need pandas: pip install 'eckart\[report\]'"):
        survey.to_frame()
    with pytest.raises(ConfigError, match=r"figures need matplotlib: pip install 'eckart\[report\]'"):
        survey.plot()


@in_browser
def test_the_slider_moves_the_numbers(tmp_path: Path, survey: Survey, report: dict[str, Any]) -> None:
    path = tmp_path / "page.html"
    values = plain(survey.document())
    values["spectra"]["matrices"][1]["name"] = HOSTILE
    path.write_text(page.page([("a", values), ("b", report), ("c", SWEEP), ("d", CURVE)]), encoding="utf-8")
    matrix = survey.matrices[0]
    m, n = matrix.whole.shape
    with browser.opened(path, viewport={"width": 390, "height": 800}, color_scheme="dark") as (shown, wrong):
        slider = shown.locator("input[type=range]")
        figure = shown.locator("[data-out=error]")
        for metric, found in matrix.whole.values.items():
            shown.select_option("select[id$=-metric]", metric)
            for rank in (1, len(found) // 2):
                slider.fill(str(rank - 1))
                error = math.sqrt(float(found[rank:].square().sum() / found.square().sum()))
                assert float(figure.inner_text()) == pytest.approx(error, rel=6e-3)
                cell = shown.locator("[data-out=pivoted-parameters]").inner_text()
                assert int(cell.replace(",", "")) == rank * (m + n - rank)
                assert slider.get_attribute("aria-valuetext").startswith(f"rank {rank} of {len(found)}")
        before = figure.inner_text()
        slider.press("ArrowLeft")
        assert float(figure.inner_text()) > float(before)
        shown.select_option("select[id$=-matrix]", "1")
        assert HOSTILE in shown.locator("[data-out=said]").inner_text()
        shown.locator("path.mark[tabindex]").first.focus()
        assert shown.locator("#tip").inner_text()
        dark = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        shown.emulate_media(color_scheme="light")
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        assert shown.evaluate("document.documentElement.scrollWidth") <= 390
        assert wrong == []
