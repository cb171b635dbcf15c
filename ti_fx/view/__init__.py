"""Graphs are looked at as networkx graphs, pictures of a layer, pages and reports."""

from ti_fx.view import report
from ti_fx.view.drawing import svg, svg_diff
from ti_fx.view.network import to_networkx, write_graph
from ti_fx.view.questions import QUESTIONS, Answer, ask
from ti_fx.view.steps import Step, follow
from ti_fx.view.viewer import html

__all__ = [
    "QUESTIONS",
    "Answer",
    "Step",
    "ask",
    "follow",
    "html",
    "report",
    "svg",
    "svg_diff",
    "to_networkx",
    "write_graph",
]
