"""Each node has a place in the model: its stack, its layer, and the part of that layer.

The residual stream is the ruler. Each block ends at a node of the stream (``X_0 .. X_L`` and the values after each
attention block), and a node belongs to the block that everything it feeds belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ti_fx.find.attention import AttentionSite, block_outputs, find_attention, streams
from ti_fx.ir import roles

PARTS = ("query", "key", "value", "scores", "map", "context", "output", "residual")


@dataclass(frozen=True)
class Place:
    """A part of the model.

    Attributes:
        stack, layer: as in AttentionSite; None before the first and after the last layer.
        kind: ``self`` or ``cross`` inside that attention block, ``feed-forward`` in the rest of a layer,
            ``before`` and ``after`` outside of the layers.
    """

    stack: int | None
    layer: int | None
    kind: str

    def __str__(self) -> str:
        if self.layer is None:
            return f"{self.kind} the layers"
        return f"stack {self.stack}, layer {self.layer} ({self.kind})"


BEFORE = Place(None, None, "before")
AFTER = Place(None, None, "after")


def places(gm: GraphModule) -> dict[Node, Place]:
    """Return the place of every node that has one; what several layers read (masks, sizes) has none."""
    sites = find_attention(gm)
    teacher = roles.twin_of(gm.graph)
    ends = {teacher.get(node, node): place for node, place in _block_ends(gm, sites).items()}
    role: roles.Role = "teacher" if teacher else "student"
    place_of: dict[Node, Place | None] = {}
    for node in reversed(gm.graph.nodes):
        if roles.role(node) != role or node.op == "output":
            continue
        read_in = {place_of[user] for user in node.users if user in place_of}
        if node in ends:
            place_of[node] = ends[node]
        elif len(read_in) <= 1:
            place_of[node] = read_in.pop() if read_in else AFTER
        else:
            place_of[node] = None
    found = {node: place for node, place in place_of.items() if place is not None}
    for twin, node in roles.twins(gm.graph).items():
        if twin in found:
            found[node] = found[twin]
    return found | _inserted(gm, found)


def parts(sites: list[AttentionSite]) -> dict[Node, tuple[str, ...]]:
    """Return what each node of a site is: ``query``, ``map``, ...; one linear for Q, K and V is all three."""
    found: dict[Node, tuple[str, ...]] = {}
    for site in sites:
        for part in PARTS:
            node = getattr(site, part)
            if node is not None:
                found[node] = (*found.get(node, ()), part)
    return found


def _block_ends(gm: GraphModule, sites: list[AttentionSite]) -> dict[Node, Place]:
    ends: dict[Node, Place] = {}
    for stack, stream in streams(gm, sites).items():
        for index, node in enumerate(stream):
            ends[node] = Place(stack, index - 1, "feed-forward") if index else BEFORE
    for site, end in zip(sites, block_outputs(gm, sites), strict=True):
        ends.setdefault(end or site.output or site.context, Place(site.stack, site.layer, site.kind))
    return ends


def _inserted(gm: GraphModule, known: dict[Node, Place]) -> dict[Node, Place]:
    """Place what has no twin: quantisers and detaches where they are read, dropout and losses where they read."""
    found: dict[Node, Place] = {}
    missing = [
        node for node in gm.graph.nodes if node not in known and roles.role(node) in ("student", "loss")
    ]

    def only_place(nodes: Iterable[Node]) -> Place | None:
        around = {place for node in nodes if (place := known.get(node, found.get(node)))}
        return around.pop() if len(around) == 1 else None

    for node in reversed(missing):
        is_inserted = roles.role(node) == "student" and node.op in ("get_attr", "call_function")
        if is_inserted and (place := only_place(node.users)):
            found[node] = place
    for node in missing:
        if (
            node not in found
            and node.op in ("call_function", "call_module")
            and (place := only_place(node.all_input_nodes))
        ):
            found[node] = place
    return found
