"""A report is one self-contained HTML page: tables, charts, graphs before and after each pass, dumps.

write_report(Report("What came out", (Table(...), LineChart(...), GraphSteps(...))), "report.html")
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
from torch.fx import GraphModule

from ti_fx._version import __version__
from ti_fx.files import atomic_write
from ti_fx.view.charts import bar_chart, line_chart
from ti_fx.view.dump_page import Group, dump_groups
from ti_fx.view.steps import Step

Cell: TypeAlias = str | int | float | None

_FOLDER = Path(__file__).parent
_ROWS_UNDER_A_CHART = 25
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Text:
    """A section of plain paragraphs."""

    title: str
    paragraphs: Sequence[str]
    kind = "text"


@dataclass(frozen=True)
class Table:
    """A table; the first column holds the rows' names. Numbers are aligned right, None is shown as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    kind = "table"


@dataclass(frozen=True)
class LineChart:
    """Curves over a common axis: ``series`` maps a name to its x and y values. The numbers follow as a table."""

    title: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x_label: str
    y_label: str
    note: str = ""
    log_scale: bool = False
    kind = "line-chart"


@dataclass(frozen=True)
class BarChart:
    """Bars in groups: ``series`` maps a name to one value a label, NaN for no bar. The numbers follow as a table."""

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]
    x_label: str
    y_label: str
    note: str = ""
    kind = "bar-chart"


@dataclass(frozen=True)
class GraphSteps:
    """What each pass did, from :func:`ti_fx.view.follow`: one layer before and after as a picture, and the diff."""

    title: str
    steps: Sequence[Step]
    note: str = ""
    kind = "graph-steps"


@dataclass(frozen=True)
class GraphDump:
    """A graph as text, coloured by role, foldable by layer, with a search box (one of these on a page)."""

    title: str
    gm: GraphModule
    note: str = ""
    kind = "graph-dump"


Section: TypeAlias = Text | Table | LineChart | BarChart | GraphSteps | GraphDump


@dataclass(frozen=True)
class Report:
    """A page: its title, an optional sentence under it, and its sections in order."""

    title: str
    sections: Sequence[Section]
    subtitle: str = ""


def environment(extra: Mapping[str, Cell] | None = None) -> Table:
    """Return a table of versions and of the machine, with further rows in ``extra``."""
    rows: list[tuple[Cell, ...]] = [("ti_fx", __version__), ("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            continue
    rows += [("system", f"{platform.system()} {platform.machine()}"), ("cores", str(os.cpu_count()))]
    return Table("Environment", ("what", "version"), [*rows, *(extra or {}).items()])


def render(report: Report) -> str:
    """Return the page as HTML text, with everything it needs inside.

    Raises:
        MissingExtra: a section needs Graphviz or matplotlib, which is not installed.
    """
    names = [_anchor(section.title) for section in report.sections]
    anchors = [f"{name}-{index}" if name in names[:index] else name for index, name in enumerate(names)]
    return _template().render(
        report=report,
        sections=[
            (anchor, section, _parts(section))
            for anchor, section in zip(anchors, report.sections, strict=True)
        ],
        style=(_FOLDER / "report.css").read_text(encoding="utf-8"),
        script=(_FOLDER / "report.js").read_text(encoding="utf-8"),
        version=__version__,
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write :func:`render`'s page.

    Raises:
        InputError: the file can't be written; a file that was there stays as it was.
    """
    atomic_write(path, render(report))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cell": _cell, "number": _is_number}
    return environment.get_template("report.jinja")


def _parts(section: Section) -> Any:
    """Return what the template shows for a section beside its fields."""
    match section:
        case LineChart():
            drawn = line_chart(
                section.series, section.x_label, section.y_label, section.title, section.log_scale
            )
            return {"svg": drawn, "table": _line_table(section)}
        case BarChart():
            drawn = bar_chart(section.labels, section.series, section.x_label, section.y_label, section.title)
            columns = [section.x_label, *section.series]
            rows = list(zip(section.labels, *section.series.values(), strict=True))
            return {"svg": drawn, "table": Table(section.title, columns, rows)}
        case GraphDump():
            groups: list[Group] = dump_groups(section.gm)
            return groups
        case _:
            return None


def _line_table(section: LineChart) -> Table:
    """Return some of the points, evenly spread, for readers who can't see the chart."""
    places = sorted({float(x) for xs, _ in section.series.values() for x in xs})
    if len(places) > _ROWS_UNDER_A_CHART:
        last = len(places) - 1
        places = [places[round(i * last / (_ROWS_UNDER_A_CHART - 1))] for i in range(_ROWS_UNDER_A_CHART)]
    curves = [{float(x): float(y) for x, y in zip(xs, ys, strict=True)} for xs, ys in section.series.values()]
    rows: list[tuple[Cell, ...]] = [(x, *(curve.get(x) for curve in curves)) for x in places]
    return Table(section.title, [section.x_label, *section.series], rows)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Cell) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 or value == int(value) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value
