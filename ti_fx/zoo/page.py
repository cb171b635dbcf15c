"""Results are shown as one self-contained page: bars by stage, a table to sort and search, what is left out."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path

import jinja2

from ti_fx._version import __version__
from ti_fx.files import atomic_write
from ti_fx.zoo.results import WITH_ATTENTION, Run
from ti_fx.zoo.summary import by_reason, parts

# The numbers with a column of their own, by the name in ``Outcome.numbers``; the others are in each row's details.
_COLUMNS = {
    "captured": "captured graph",
    "replaced": "uniform map",
    "float runtime": "runtime, float",
    "int8-tensor runtime": "runtime, int8",
}


def render(run: Run) -> str:
    """Return the page as HTML text, with everything it needs inside."""
    return _template().render(
        run=run,
        parts=parts(run),
        rows=run.with_verdict(*WITH_ATTENTION),
        shown=[(verdict, len(run.with_verdict(verdict))) for verdict in WITH_ATTENTION],
        without=by_reason(run.with_verdict("no attention")),
        unbuilt=by_reason(run.with_verdict("not built")),
        columns=_COLUMNS,
        version=__version__,
    )


def write_page(run: Run, path: Path) -> None:
    """Write :func:`render`'s page.

    Raises:
        InputError: the file can't be written; a file that was there stays as it was.
    """
    atomic_write(path, render(run))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = _number
    return environment.get_template("page.jinja")


def _source(name: str) -> str:
    """Return a file of the page: the style is the reports' own, and what is of this page alone lies here."""
    folder = files("ti_fx.view") if name == "report.css" else files("ti_fx.zoo")
    return folder.joinpath(name).read_text(encoding="utf-8")


def _number(value: float | None) -> str:
    """Return a number in the fewest signs; zero is exact and a dash is no number."""
    if value is None:
        return "–"
    if math.isfinite(value) and value == int(value):
        return f"{int(value):,}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4g}"
