"""A dump is prepared for a page: grouped by layer, with roles, and with links from a read to what is read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from markupsafe import Markup, escape
from torch.fx import GraphModule

from ti_fx.ir import roles, text
from ti_fx.view.places import Place, places


@dataclass(frozen=True)
class Line:
    """One node: its name, role and line of the dump, as HTML in which every node it reads is a link."""

    name: str
    role: str
    html: Markup


@dataclass(frozen=True)
class Group:
    """The nodes of one layer, in graph order."""

    title: str
    lines: list[Line]


def dump_groups(gm: GraphModule) -> list[Group]:
    """Return the graph's lines by layer: what is shared first, then in the order of the model."""
    where = places(gm)
    groups: dict[tuple[object, ...], Group] = {}
    written = text.lines(gm)
    for node in gm.graph.nodes:
        place = None if node.op == "output" else where.get(node)
        role = str(roles.role(node) or "student")
        title, order = _title(place, role, node.op == "output")
        group = groups.setdefault((*order, title), Group(title, []))
        group.lines.append(Line(node.name, role, _linked(node.name, written[node.name])))
    return [groups[key] for key in sorted(groups, key=lambda key: key[:3])]


def _title(place: Place | None, role: str, is_output: bool) -> tuple[str, tuple[int, int, int]]:
    if is_output:
        return "Output", (4, 0, 0)
    if place is None and role == "loss":
        return "Losses over all layers", (3, 0, 0)
    if place is None:
        return "Inputs, masks and what several layers share", (0, 0, 0)
    if place.layer is None:
        return ("Before the layers", (0, 0, 1)) if place.kind == "before" else ("After the layers", (2, 0, 0))
    assert place.stack is not None
    return f"Stack {place.stack}, layer {place.layer}", (1, place.stack, place.layer)


def _linked(name: str, line: str) -> Markup:
    def link(match: re.Match[str]) -> str:
        read = match[1]
        return f"<b>%{read}</b>" if read == name else f'<a href="#n-{read}">%{read}</a>'

    return Markup(re.sub(r"%(\w+)", link, str(escape(line))))
