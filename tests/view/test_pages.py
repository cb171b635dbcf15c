"""The pages, as headless Chromium sees them: sections, search, charts, no error in the console, nothing fetched."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest
from models import Tiny

from ti_fx.errors import InputError, MissingExtra
from ti_fx.passes import DuplicateTeacher, Intervene
from ti_fx.view import Step, follow, html
from ti_fx.view import report as reports

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="the program `chromium` is not installed (make install says how), so no page can be looked at",
)


@dataclass
class Page(HTMLParser):
    """What a test asks of a page's DOM."""

    text: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """Return the attributes of every such tag; ``class_`` matches one of its classes."""
        return [
            attributes
            for name, attributes in self.tags
            if name == tag
            and all(value in (attributes.get(key.rstrip("_")) or "").split() for key, value in wanted.items())
        ]


def seen(path: Path, query: str = "") -> Page:
    """Load a page, run its script, and return its DOM; fail if its console holds an error."""
    assert CHROMIUM is not None, "CI needs chromium"
    profile = path.parent / "profile"
    options = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000"
    )
    command = [
        CHROMIUM,
        *options.split(),
        f"--user-data-dir={profile}",
        "--dump-dom",
        f"file://{path}{query}",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    console = [line for line in run.stderr.splitlines() if ":CONSOLE" in line]
    assert not console
    return Page(run.stdout)


@pytest.fixture(scope="module")
def steps(bert: Tiny) -> list[Step]:
    return follow(bert.fork(), DuplicateTeacher(), Intervene(at="map"), Intervene(at="map"), layer=1)


@pytest.fixture(scope="module")
def viewer(steps: list[Step], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("viewer") / "viewer.html"
    html(steps, path, title="BERT & its teacher")
    return path


@pytest.fixture(scope="module")
def report(steps: list[Step], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    curve = ([float(step) for step in range(100)], [math.exp(-step / 30) for step in range(100)])
    sections: list[reports.Section] = [
        reports.Text("In short", ["a < b & c"]),
        reports.Table(
            "Results", ("model", "accuracy"), [("full precision", 0.956), ("TI-G", None)], "n = 545"
        ),
        reports.LineChart("Loss", {"TernaryBERT": curve, "TI-G": curve}, "step", "loss", log_scale=True),
        reports.BarChart(
            "Error", ["0", "1"], {"map": [0.1, math.nan], "output": [0.2, 0.3]}, "layer", "error"
        ),
        reports.GraphSteps("Passes", steps),
        reports.environment({"seed": 7}),
    ]
    reports.write_report(reports.Report("A <report>", sections, "of a test"), path)
    return path


def assert_accessible(page: Page) -> None:
    """Language, one h1, headers in every table, a name for every picture and region, unique ids, links that resolve."""
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert page.all("meta", name="viewport")
    tables = len(page.all("table"))
    assert len(page.all("caption")) == len(page.all("thead")) == tables > 0
    assert all(header.get("scope") in ("col", "row") for header in page.all("th"))
    assert all(picture.get("role") == "img" and picture.get("aria-label") for picture in page.all("svg"))
    assert all(region.get("aria-label") for region in page.all("div", role="region"))
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = [link["href"] or "" for link in page.all("a") if "href" in link]
    assert {link.removeprefix("#") for link in links} <= set(ids)


def assert_self_contained(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text)
    assert not re.findall(r"url\((?!#|&quot;#)[^)]*\)|@import", text)


@needs_chromium
def test_the_viewer_shows_passes_and_the_graph(viewer: Path) -> None:
    page = seen(viewer)
    assert_accessible(page)
    assert_self_contained(viewer)
    assert "<h1>BERT &amp; its teacher</h1>" in page.text
    assert len(page.all("details", class_="step")) == 3
    assert "The graph is the same as before." in page.text
    assert len(page.all("svg", class_="ti-fx-graph")) == 2
    groups = re.findall(r'class="group".*?<h3>(.*?)</h3>', page.text, re.DOTALL)
    assert groups[:2] == ["Inputs, masks and what several layers share", "Before the layers"]
    assert "Stack 0, layer 1" in groups
    assert page.all("li", class_="teacher")
    assert page.all("li", class_="shared")


@needs_chromium
def test_the_search_keeps_the_lines_that_hold_every_word(viewer: Path) -> None:
    page = seen(viewer, "?search=LAYER.1+softmax.int")
    kept = [line for line in page.all("li") if "id" in line and "hidden" not in line]
    assert sorted(str(line["id"]) for line in kept) == ["n-softmax_1", "n-softmax_1_t"]
    assert "2 nodes found" in page.text
    shown = [fold for fold in page.all("details", class_="group") if "hidden" not in fold]
    assert len(shown) == 1
    assert "open" in shown[0]


@needs_chromium
def test_the_report_has_its_sections(report: Path) -> None:
    page = seen(report)
    assert_accessible(page)
    assert_self_contained(report)
    assert "<title>A &lt;report&gt;</title>" in page.text
    assert [section["id"] for section in page.all("section")] == [
        "in-short",
        "results",
        "loss",
        "error",
        "passes",
        "environment",
    ]
    assert "<p>a &lt; b &amp; c</p>" in page.text
    assert [chart["aria-label"] for chart in page.all("svg", class_="chart")] == ["Loss", "Error"]
    assert "currentColor" in page.text
    assert "var(--series-2)" in page.text
    assert '<td class="number">0.956</td>' in page.text
    assert '<th scope="row">seed</th><td class="number">7</td>' in page.text


def test_a_long_curve_is_listed_by_some_of_its_points(report: Path) -> None:
    numbers = report.read_text(encoding="utf-8").split('id="loss"')[1].split("</section>")[0]
    assert 20 <= numbers.count('<th scope="row">') <= 25


def test_a_page_is_the_same_for_the_same_report(steps: list[Step]) -> None:
    made = reports.Report("R", [reports.GraphSteps("Passes", steps)])
    assert reports.render(made) == reports.render(made)


@pytest.mark.parametrize(("last", "mark"), [(1.5, "1.2"), (9.9, "7"), (1000.0, "100")])
def test_a_logarithmic_axis_is_marked_with_plain_numbers(last: float, mark: str) -> None:
    chart = reports.LineChart("Loss", {"a": ([0.0, 1.0], [1.0, last])}, "step", "loss", log_scale=True)
    drawn = reports.render(reports.Report("R", [chart]))
    assert "mathdefault" not in drawn
    assert f">{mark}</text>" in drawn


def test_no_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no step to show"):
        html([], tmp_path / "x.html")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    chart = reports.LineChart("Loss", {"a": ([0.0], [1.0])}, "step", "loss")
    with pytest.raises(MissingExtra, match=r"pip install 'ti_fx\[view\]'"):
        reports.render(reports.Report("R", [chart]))
