"""Graphviz draws one layer: what is student, teacher, shared and loss, and what a pass changed."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import networkx
from torch.fx import GraphModule

from ti_fx.errors import InputError, MissingExtra
from ti_fx.ir.roles import TEACHER_PREFIX
from ti_fx.ir.text import lines
from ti_fx.numerics.weight_quantisers import METHODS
from ti_fx.view.network import to_networkx

Change = Literal["added", "removed", "rewired"]

# Ops that only rearrange a tensor: an edge runs past them, so that a layer fits on a page.
_REARRANGING = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "transpose",
        "t",
        "permute",
        "contiguous",
        "clone",
        "expand",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "slice",
        "select",
        "alias",
        "view_as",
        "movedim",
        "getitem",
        "to",
        "_to_copy",
        "sym_size",
    ]
)
_QUANTISERS = {one.function.__name__ for one in METHODS.values()}  # of weights
_MARKS: dict[Change, str] = {"added": "+ ", "removed": "− ", "rewired": "~ "}
_COLOURS = {  # fill and line on a light page, fill and line on a dark one
    "student": ("#dbeafe", "#2563eb", "#1e3a5f", "#7db2ff"),
    "teacher": ("#fef0c7", "#b45309", "#4a3410", "#f5b94d"),
    "shared": ("#eeeeee", "#6b7280", "#33373d", "#a8b0bb"),
    "loss": ("#ede4fd", "#7c3aed", "#3b2a5e", "#bfa2fb"),
}
_CHANGED = {
    "added": ("#15803d", "#5fd584"),
    "removed": ("#c81e1e", "#ff8a80"),
    "rewired": ("#c2410c", "#ff9d5c"),
}
_FONT = "Helvetica,Arial,sans-serif"


@dataclass(frozen=True)
class _Panel:
    """One drawn state of a layer: the visible graph, and what changed in it."""

    title: str
    graph: networkx.DiGraph[str]
    changed: Mapping[str, Change]
    edges: Mapping[tuple[str, str], Change]


def svg(gm: GraphModule, layer: int = 0, stack: int = 0) -> str:
    """Return one layer of the graph as SVG text, which adapts to light and dark pages.

    Operations that only rearrange a tensor, stored tensors and sizes are left out; edges run past them.

    Raises:
        InputError: the graph has no such layer.
        MissingExtra: Graphviz is not installed.
    """
    panel = _Panel("", visible(gm, layer, stack), {}, {})
    return _drawn([panel], f"Layer {layer} of stack {stack} as a graph")


def svg_diff(
    before: GraphModule,
    after: GraphModule,
    layer: int = 0,
    stack: int = 0,
    titles: tuple[str, str] = ("before", "after"),
) -> str:
    """Return one layer of two graphs side by side as SVG text, changed nodes and edges marked ``+``, ``−`` and ``~``.

    Raises:
        InputError: one of the graphs has no such layer.
        MissingExtra: Graphviz is not installed.
    """
    old, new = visible(before, layer, stack), visible(after, layer, stack)
    old_lines, new_lines = lines(before), lines(after)
    rewired: dict[str, Change] = {
        name: "rewired" for name in old_lines.keys() & new_lines.keys() if old_lines[name] != new_lines[name]
    }
    removed: dict[str, Change] = dict.fromkeys(old_lines.keys() - new_lines.keys(), "removed")
    added: dict[str, Change] = dict.fromkeys(new_lines.keys() - old_lines.keys(), "added")
    left = _Panel(titles[0], old, rewired | removed, dict.fromkeys(old.edges - new.edges, "removed"))
    right = _Panel(titles[1], new, rewired | added, dict.fromkeys(new.edges - old.edges, "added"))
    return _drawn([left, right], f"Layer {layer} of stack {stack}, {titles[0]} and {titles[1]}")


def visible(gm: GraphModule, layer: int, stack: int) -> networkx.DiGraph[str]:
    """Return the part of the graph that is drawn for a layer; values that enter it have ``kind="entering"``.

    Raises:
        InputError: the graph has no such layer.
    """
    graph = to_networkx(gm)
    inside = [
        name
        for name, attributes in graph.nodes(data=True)
        if attributes.get("layer") == layer and attributes.get("stack") == stack
    ]
    if not inside:
        known = sorted(
            {(item.get("stack"), item["layer"]) for _, item in graph.nodes(data=True) if "layer" in item}
        )
        listed = ", ".join(f"layer {layer} of stack {stack}" for stack, layer in known) or "no layer at all"
        raise InputError(f"the graph has no layer {layer} in stack {stack}; it has {listed}")
    for name in list(graph):
        if _is_quiet(graph, name) or "shape" not in graph.nodes[name]:
            _bypass(graph, name, keep_path=graph.nodes[name]["op"] not in ("parameter", "buffer"))
    drawn: networkx.DiGraph[str] = networkx.DiGraph()
    kept = [name for name in inside if name in graph]
    for name in kept:
        for source in graph.predecessors(name):
            if source not in kept and not _is_bookkeeping(graph, source):
                drawn.add_node(source, **{**graph.nodes[source], "kind": "entering"})
    for name in kept:
        drawn.add_node(name, **graph.nodes[name])
    drawn.add_edges_from(edge for edge in graph.edges if edge[0] in drawn and edge[1] in kept)
    return drawn


def _is_quiet(graph: networkx.DiGraph[str], name: str) -> bool:
    attributes = graph.nodes[name]
    operation = attributes["op"].partition(".")[0]
    if attributes["op"] in ("parameter", "buffer"):
        return True
    return operation in _REARRANGING and not attributes.get("part") and attributes["role"] != "loss"


def _is_bookkeeping(graph: networkx.DiGraph[str], name: str) -> bool:
    """Whether an entering value is an index or a size rather than something the layer computes with."""
    attributes = graph.nodes[name]
    return str(attributes.get("dtype")).startswith("int") or attributes["role"] == "loss"


def _bypass(graph: networkx.DiGraph[str], name: str, keep_path: bool) -> None:
    if keep_path:
        sources, readers = list(graph.predecessors(name)), list(graph.successors(name))
        graph.add_edges_from((source, reader) for source in sources for reader in readers)
    else:
        for reader in graph.successors(name):
            graph.nodes[reader].setdefault("reads", []).append(str(graph.nodes[name]["target"]))
    graph.remove_node(name)


def _drawn(panels: list[_Panel], description: str) -> str:
    text = dot_text(panels)
    try:
        run = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MissingExtra(
            "drawing a graph needs the program `dot` of Graphviz; install the package graphviz "
            "(Debian: apt-get install graphviz, macOS: brew install graphviz)"
        ) from None
    if run.returncode:
        raise RuntimeError(f"Graphviz can't read what ti_fx wrote: {run.stderr.strip()}")
    return _finished(run.stdout, description, prefix=hashlib.sha256(text.encode()).hexdigest()[:8])


def dot_text(panels: list[_Panel]) -> str:
    """Return the picture in Graphviz's language."""
    body = [
        "digraph {",
        f'  graph [rankdir=TB, nodesep=0.25, ranksep=0.3, bgcolor=transparent, fontname="{_FONT}", fontsize=12];',
        f'  node [shape=box, style="rounded,filled", margin="0.10,0.05", height=0.3, fontname="{_FONT}", fontsize=11];',
        f'  edge [arrowsize=0.6, fontname="{_FONT}"];',
    ]
    body += _legend(panels)  # first, so that it stands at the left, where a narrow page shows it
    for index, panel in enumerate(panels):
        body += _panel_text(index, panel)
    return "\n".join([*body, "}", ""])


def _panel_text(index: int, panel: _Panel) -> list[str]:
    indent = "    "
    frame = f"label={_quoted(panel.title)}, style=rounded" if panel.title else 'label="", style=invis'
    body = [f"  subgraph cluster_{index} {{", f"    graph [{frame}, fontsize=15, class=panel, margin=12];"]
    groups: dict[tuple[str, str] | None, list[str]] = {}
    for name, attributes in panel.graph.nodes(data=True):
        key = None if attributes["kind"] == "entering" else (attributes["role"], attributes["kind"])
        groups.setdefault(key, []).append(name)
    prefix = _common_module(panel.graph)
    for number, (key, names) in enumerate(groups.items()):
        nodes = [f"{indent}  {_node(index, name, panel, prefix)}" for name in names]
        if key is None:
            body += nodes
            continue
        label = (
            f"{key[0]} · {'attention' if key[1] == 'self' else key[1].replace('cross', 'cross-attention')}"
        )
        body += [
            f"{indent}subgraph cluster_{index}_{number} {{",
            f'{indent}  graph [label={_quoted(label)}, class="group {key[0]}", style=rounded, labeljust=l, margin=8];',
            *nodes,
            f"{indent}}}",
        ]
    for source, reader in panel.graph.edges:
        change = panel.edges.get((source, reader))
        teacher = (
            panel.graph.nodes[source]["role"] == "teacher" and panel.graph.nodes[reader]["role"] == "student"
        )
        kinds = [change or "plain", *(["intervention"] if teacher else [])]
        width = ", penwidth=2.4" if change or teacher else ""
        dashed = ", style=dashed" if change == "removed" else ""
        loose = ", constraint=false" if teacher else ""
        body.append(
            f'{indent}{_id(index, source)} -> {_id(index, reader)} [class="{" ".join(kinds)}"{width}{dashed}{loose}];'
        )
    return [*body, "  }"]


def _node(index: int, name: str, panel: _Panel, prefix: str) -> str:
    attributes = panel.graph.nodes[name]
    change = panel.changed.get(name)
    classes = f"{attributes['role']}{' ' + change if change else ''}"
    if attributes["kind"] == "entering":
        classes += " entering"
    label = _MARKS[change] if change else ""
    label += "\\n".join(_label(name, attributes, prefix))
    style = (
        "rounded,filled,dashed"
        if attributes["kind"] == "entering" or change == "removed"
        else "rounded,filled"
    )
    width = 2.6 if change else 1.6 if attributes.get("point") else 0.8
    look = f'class="{classes}", style="{style}", penwidth={width}'
    return f'{_id(index, name)} [label="{label}", tooltip={_quoted(name)}, {look}];'


def _label(name: str, attributes: dict[str, Any], prefix: str) -> list[str]:
    operation = (
        re.sub(r"\{.*", "", attributes["op"]).removesuffix(".int").replace("Frozen", "fused attention")
    )
    if attributes["kind"] == "entering" and attributes["op"] != "input":
        module = attributes.get("module", operation).rpartition(".")[2]
        operation = "mask" if attributes["role"] == "shared" else f"from {module}"
    if tap := attributes.get("intervened"):
        operation = f"{operation} (tap of {tap})"
    if attributes.get("part"):
        first = f"{attributes['part']} = {operation}"
    elif operation in _QUANTISERS and attributes.get("reads"):
        first = f"{operation} {_short(attributes['reads'][0], prefix)}"
    elif attributes.get("reads") and operation in ("linear", "addmm", "matmul"):
        first = f"{operation} {_short(attributes.get('module', ''), prefix)}"
    elif attributes["role"] == "loss":
        return [name, operation]
    else:
        first = operation
    return [first.strip().replace('"', "'"), _shape(attributes)]


def _common_module(graph: networkx.DiGraph[str]) -> str:
    paths = [
        item["module"].split(".")
        for _, item in graph.nodes(data=True)
        if item.get("module") and item["kind"] != "entering" and item["role"] != "loss"
    ]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _short(path: str, prefix: str) -> str:
    inner = path.removeprefix(TEACHER_PREFIX).removeprefix(prefix).lstrip(".").removesuffix(".weight")
    return ".".join(inner.split(".")[-2:])


def _shape(attributes: dict[str, Any]) -> str:
    return f"[{', '.join(_dimension(size) for size in attributes.get('shape', ()))}]"


def _dimension(size: int | str) -> str:
    """Write the two dimensions that nearly every model has by their first letters; the legend says so."""
    return re.sub(r"\bbatch\b", "B", re.sub(r"\bsequence\b", "S", str(size)))


def _legend(panels: list[_Panel]) -> list[str]:
    roles = {item["role"] for panel in panels for _, item in panel.graph.nodes(data=True)}
    changes = {change for panel in panels for name, change in panel.changed.items() if name in panel.graph}
    entries = [(role, role, "") for role in _COLOURS if role in roles]
    entries += [
        (f"{mark}{change}", f"plain {change}", ", penwidth=2.6")
        for change, mark in _MARKS.items()
        if change in changes
    ]
    entries.append(("B = batch, S = sequence", "note", ", penwidth=0"))
    body = [
        "  subgraph cluster_legend {",
        '    graph [label="", class=legend, style=invis];',
        "    rank=same;",
    ]
    for number, (label, classes, extra) in enumerate(entries):
        body.append(
            f'    legend{number} [label={_quoted(label)}, tooltip="legend", class="{classes}"{extra}];'
        )
    numbers = range(len(entries) - 1)
    body += [f"    legend{number} -> legend{number + 1} [style=invis];" for number in numbers]
    return [*body, "  }"]


def _id(index: int, name: str) -> str:
    return _quoted(f"p{index}_{name}")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _finished(drawn: str, description: str, prefix: str) -> str:
    """Make Graphviz's SVG fit for a page: an accessible name, colours by class, and ids that are unique on the page."""
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r'\bid="([^"]+)"', rf'id="g{prefix}-\1"', drawn)
    drawn = re.sub(
        r"<title>p\d+_[^<]*</title>|<title>[^<]*(?:cluster|legend|&#45;&gt;|%)[^<]*</title>\n?", "", drawn
    )
    opening = f'<svg role="img" aria-label="{description}" class="ti-fx-graph" '
    return drawn.replace("<svg ", opening, 1).replace(">", f">\n{_style()}", 1)


def _style() -> str:
    return f"<style>{_rules(0)}@media (prefers-color-scheme: dark){{{_rules(1)}}}</style>"


def _rules(dark: int) -> str:
    ink, faint = ("#111827", "#9ca3af") if not dark else ("#e8eaed", "#7d8590")
    scope = "svg.ti-fx-graph "
    rules = [
        f"{scope}text{{fill:{ink}}}",
        f"{scope}.edge path{{stroke:{faint}}}{scope}.edge polygon{{fill:{faint};stroke:{faint}}}",
        f"{scope}.cluster path{{fill:none;stroke:{faint}}}{scope}.node.plain path,{scope}.node.note path{{fill:none}}",
        f"{scope}.node.note path{{stroke:none}}",
    ]
    for role, colours in _COLOURS.items():
        fill, line = colours[2 * dark : 2 * dark + 2]
        rules.append(
            f"{scope}.node.{role} path{{fill:{fill};stroke:{line}}}{scope}.cluster.{role} path{{stroke:{line}}}"
        )
    rules.append(
        f"{scope}.edge.intervention path{{stroke:{_COLOURS['teacher'][2 * dark + 1]}}}"
        f"{scope}.edge.intervention polygon{{fill:{_COLOURS['teacher'][2 * dark + 1]};stroke:none}}"
    )
    for change, colours2 in _CHANGED.items():
        line = colours2[dark]
        rules.append(
            f"{scope}.node.{change} path,{scope}.edge.{change} path{{stroke:{line}}}"
            f"{scope}.edge.{change} polygon{{fill:{line};stroke:{line}}}"
        )
    return "".join(rules)
