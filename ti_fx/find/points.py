"""A point is a place in a block or layer at which the student may read the teacher's value: the table of all points.

An entry says how the point is found, and which projections train on a detached input there. A further point is one
entry. A user's own point is ``node:NAME``: any value of the student that is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ti_fx.errors import PreconditionError, SelectionError, did_you_mean
from ti_fx.find.attention import AttentionSite, find_attention, layer_inputs
from ti_fx.find.feed_forward import find_feed_forward
from ti_fx.find.walk import is_float, rank
from ti_fx.ir import roles

NODE = "node:"  # before the name of a user's own point


@dataclass(frozen=True)
class Place:
    """Where one point is in one block or layer.

    Attributes:
        point: its name.
        stack, layer: of the block or layer; -1 where it belongs to none.
        kinds: of attention: the block's own, or those of the layer's blocks.
        tap: the student's own value there, None where the block has none.
        where: the block or layer, for people.
        block: the attention block whose projections may be detached; None of any other.
    """

    point: str
    stack: int
    layer: int
    kinds: tuple[str, ...]
    tap: Node | None
    where: str
    block: AttentionSite | None = None


@dataclass(frozen=True)
class Point:
    """A kind of place.

    Attributes:
        find: returns every place of a graph, in order of execution.
        blocks: what has such a place, for people.
        detached: the projections of the block whose inputs carry no gradient under an intervention: a loss at the tap
            trains the block and nothing below it. Empty: the teacher's value alone keeps gradients in.
        lacking: what a block without the place lacks, and what to do; ``{context}`` is the block's.
        heads: whether its values are those of heads, ``(..., heads, tokens, features)``.
    """

    find: Callable[[GraphModule], list[Place]]
    blocks: str
    detached: tuple[str, ...] = ()
    lacking: str = ""
    heads: bool = False


def _attention(point: str) -> Callable[[GraphModule], list[Place]]:
    def find(gm: GraphModule) -> list[Place]:
        return [
            Place(point, site.stack, site.layer, (site.kind,), site.at(point), site.where, site)
            for site in find_attention(gm)
        ]

    return find


def _layers(gm: GraphModule) -> list[Place]:
    sites = find_attention(gm)
    kinds = _kinds(sites)
    return [
        Place("layer", stack, layer, kinds[stack, layer], tap, f"stack {stack}, layer {layer}")
        for (stack, layer), tap in layer_inputs(gm, sites).items()
    ]


def _feed_forward(gm: GraphModule) -> list[Place]:
    kinds = _kinds(find_attention(gm))
    return [
        Place("ffn", site.stack, site.layer, kinds.get((site.stack, site.layer), ()), site.output, site.where)
        for site in find_feed_forward(gm)
    ]


def _kinds(sites: list[AttentionSite]) -> dict[tuple[int, int], tuple[str, ...]]:
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    for site in sites:
        found[site.stack, site.layer] = (*found.get((site.stack, site.layer), ()), site.kind)
    return found


# Source of what is detached at map, context and output: the published code; the residual is never detached.
POINTS: dict[str, Point] = {
    "map": Point(_attention("map"), "attention blocks", ("query", "key"), heads=True),
    "context": Point(_attention("context"), "attention blocks", ("query", "key", "value"), heads=True),
    "output": Point(
        _attention("output"),
        "attention blocks",
        ("query", "key", "value"),
        "nothing projects its context ({context}); intervene at map or context, or select other layers",
    ),
    "layer": Point(_layers, "layers", lacking="no residual add joins its attention; select other layers"),
    "ffn": Point(_feed_forward, "feed-forward blocks"),
}


def names(at: str | None) -> tuple[str, ...]:
    """Return the points that a text names (``layer+ffn``, ``node:add_7``): in the table's order, own ones last."""
    asked = [] if at is None else at.split("+")
    return (*(name for name in POINTS if name in asked), *sorted({*asked} - POINTS.keys()))


def unknown(at: str | None) -> str:
    """Return the first name in a text that is no point, with the near ones; nothing where all are."""
    for name in names(at):
        if name not in POINTS and not (name.startswith(NODE) and name != NODE):
            return f"{name!r}{did_you_mean(name, [*POINTS, NODE + 'NAME'])}"
    return ""


def detached(point: str) -> tuple[str, ...]:
    """Return which projections of a block train on a detached input under an intervention at a point."""
    return POINTS[point].detached if point in POINTS else ()


def places(gm: GraphModule, point: str) -> list[Place]:
    """Return every place of one point, in order of execution.

    Raises:
        SelectionError: there is no node of the user's name. PreconditionError: it is none that a teacher has.
    """
    return POINTS[point].find(gm) if point in POINTS else [_own(gm, point)]


def _own(gm: GraphModule, point: str) -> Place:
    name = point.removeprefix(NODE)
    known = {node.name: node for node in gm.graph.nodes}
    tap = known.get(name)
    if tap is None:
        near = [other for other, node in known.items() if roles.is_student(node)]
        raise SelectionError(f"no node is called {name!r}{did_you_mean(name, near)}; print ti_fx.dump(gm)")
    is_value = roles.is_student(tap) and tap.op not in ("get_attr", "output")
    if not (is_value and is_float(tap) and rank(tap) >= 0):
        raise PreconditionError(
            f"%{name} is no value that the student computes ({roles.role(tap)} {tap.op}); name one whose line in the "
            "dump ends with #student"
        )
    if tap not in roles.twin_of(gm.graph):
        raise PreconditionError(
            f"the teacher has no value for %{name}, which a pass inserted or which is dropout; name what it reads"
        )
    return Place(point, -1, -1, (), tap, f"%{name}")
