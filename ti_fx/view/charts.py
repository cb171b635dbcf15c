"""Matplotlib draws charts as inline SVG; their colours are CSS, so that a chart follows a page into dark mode."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from ti_fx.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = 6  # colours in report.css: --series-1 .. --series-6

# matplotlib knows no CSS: these stand for CSS colours until the SVG is written.
_INK = "#010203"
_SERIES = tuple(f"#0102{10 + index:02x}" for index in range(SERIES))
_DASHES = ("-", "--", ":", "-.")


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    description: str,
    log_scale: bool = False,
) -> str:
    """Return an SVG with one line a series: name -> (x values, y values).

    ``log_scale`` makes the y axis logarithmic where the values span a factor of two.

    Raises:
        MissingExtra: matplotlib is not installed.
    """

    def draw(axes: Axes) -> None:
        for index, (name, (x, y)) in enumerate(series.items()):
            marker = "o" if len(x) < 30 else ""
            style = _DASHES[index % len(_DASHES)]
            axes.plot(x, y, style, color=_SERIES[index % SERIES], marker=marker, markersize=3, label=name)
        positive = [value for _, y in series.values() for value in y if value > 0]
        if log_scale and positive and max(positive) >= 2 * min(positive):
            _logarithmic(axes, max(positive) / min(positive))

    return _drawn(draw, x_label, y_label, description, legend=len(series) > 1)


def bar_chart(
    labels: Sequence[str], series: Mapping[str, Sequence[float]], x_label: str, y_label: str, description: str
) -> str:
    """Return an SVG with a group of bars a label, one bar a series; NaN leaves a bar out.

    Raises:
        MissingExtra: matplotlib is not installed.
    """

    def draw(axes: Axes) -> None:
        width = 0.8 / max(len(series), 1)
        for index, (name, values) in enumerate(series.items()):
            left = [position - 0.4 + width * (index + 0.5) for position in range(len(labels))]
            axes.bar(left, values, width * 0.9, color=_SERIES[index % SERIES], label=name)
        axes.set_xticks(range(len(labels)), labels)

    return _drawn(draw, x_label, y_label, description, legend=len(series) > 1)


def _logarithmic(axes: Axes, span: float) -> None:
    """Mark the y axis with plain numbers: with several a decade where there are few decades."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if span < 100 else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _drawn(draw: Any, x_label: str, y_label: str, description: str, legend: bool) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("charts need matplotlib; run `pip install 'ti_fx[view]'`") from None
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ti_fx",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _INK,
        "grid.alpha": 0.15,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if legend:
            figure.legend(loc="outside upper center", ncols=4)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _finished(buffer.getvalue(), description)


def _finished(drawn: str, description: str) -> str:
    """Make matplotlib's SVG fit for a page: an accessible name, CSS colours, and ids that are unique on the page."""
    prefix = "c" + hashlib.sha256((drawn + description).encode()).hexdigest()[:8]
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', drawn)
    drawn = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{prefix}-", drawn)
    drawn = drawn.replace(_INK, "currentColor")
    for index, colour in enumerate(_SERIES):
        drawn = drawn.replace(colour, f"var(--series-{index + 1})")
    drawn = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", drawn, count=1, flags=re.DOTALL)
    drawn = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", drawn, count=1, flags=re.DOTALL)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" class="chart" ', 1)
