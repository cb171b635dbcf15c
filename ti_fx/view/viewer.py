"""The viewer is one self-contained HTML page of a graph, or of what each pass did to it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch.fx import GraphModule

from ti_fx.errors import InputError
from ti_fx.find.attention import find_attention
from ti_fx.ir import roles
from ti_fx.view.report import GraphDump, GraphSteps, Report, Section, Table, write_report
from ti_fx.view.steps import Step


def html(gm_or_steps: GraphModule | Sequence[Step], path: str | os.PathLike[str], title: str = "") -> None:
    """Write a graph, or the steps from :func:`ti_fx.view.follow`, as one HTML file that needs no network.

    The page holds the attention blocks, each pass with its picture and diff, and the (last) graph's dump with roles in
    colour, folded by layer, with a search box.

    Raises:
        InputError: there is no step, or the file can't be written.
        MissingExtra: there are steps to draw, and Graphviz is not installed.
    """
    steps = [] if isinstance(gm_or_steps, GraphModule) else list(gm_or_steps)
    if not steps and not isinstance(gm_or_steps, GraphModule):
        raise InputError(
            "there is no step to show; give a graph, or the steps that ti_fx.view.follow returns"
        )
    gm = gm_or_steps if isinstance(gm_or_steps, GraphModule) else steps[-1].after
    sections: list[Section] = [site_table(gm)]
    if steps:
        sections.append(GraphSteps("What each pass did", steps))
    sections.append(GraphDump("The graph", gm, "A node a line: its name, operation, type, module and role."))
    counts = {role: sum(roles.role(node) == role for node in gm.graph.nodes) for role in roles.ROLES}
    counted = ", ".join(f"{count} {role}" for role, count in counts.items() if count)
    write_report(
        Report(title or "The graph of a model", sections, f"{len(gm.graph.nodes)} nodes: {counted}."), path
    )


def site_table(gm: GraphModule) -> Table:
    """Return the attention blocks as a table, a row a block, with the names of their nodes."""
    parts = ("query", "key", "value", "scores", "map", "context", "output", "residual")
    rows = []
    for site in find_attention(gm):
        names = [node.name if (node := getattr(site, part)) is not None else None for part in parts]
        rows.append((f"stack {site.stack}, layer {site.layer}", site.kind, *names))
    return Table("Attention blocks", ("block", "kind", *parts), rows)
