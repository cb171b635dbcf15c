"""``follow`` runs a pipeline and keeps the graph before and after each pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase

from ti_fx.errors import InputError
from ti_fx.ir import text
from ti_fx.ir.edit import fork
from ti_fx.ir.pipeline import PassReport, Pipeline
from ti_fx.view.drawing import svg_diff


@dataclass(frozen=True)
class Step:
    """One pass: what it is called, what it changed, and forks of the graph from before and after."""

    report: PassReport
    before: GraphModule
    after: GraphModule
    layer: int = 0
    stack: int = 0

    @property
    def name(self) -> str:
        """Return the pass as text."""
        return self.report.name

    @cached_property
    def diff(self) -> list[tuple[str, str]]:
        """Return the lines of the diff, each with its kind: ``added``, ``removed``, ``gap`` or ``same``."""
        kinds = {"+": "added", "-": "removed", "@": "gap"}
        return [
            (kinds.get(line[:1], "same"), line) for line in text.diff(self.before, self.after).splitlines()
        ]

    @cached_property
    def picture(self) -> str | None:
        """Return one layer before and after as SVG, or None if the graph has no such layer.

        Raises:
            MissingExtra: Graphviz is not installed.
        """
        try:
            return svg_diff(self.before, self.after, self.layer, self.stack, ("before", f"after {self.name}"))
        except InputError:
            return None


def follow(gm: GraphModule, *passes: PassBase, layer: int = 0, stack: int = 0) -> list[Step]:
    """Run passes on ``gm`` in place, as a Pipeline does, and keep a fork of the graph before and after each.

    The forks share the graph's tensors; ``layer`` and ``stack`` say which layer the pictures show.
    """
    steps = []
    before = fork(gm)
    for one in passes:
        (report,) = Pipeline(one)(gm).passes
        after = fork(gm)
        steps.append(Step(report, before, after, layer, stack))
        before = after
    return steps
