"""One site's readers come to read the teacher's value: it alone, or a blend of it with the student's own.

A blend is inserted for each reader, right before it, and a partial detach for each projection: at a share of 0 the
gradients of the tap then add up in the order in which they do without an intervention, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.find.attention import AttentionSite
from ti_fx.find.points import POINTS, Place, detached
from ti_fx.find.walk import projection_input
from ti_fx.ir import blends, leaves, roles
from ti_fx.ir.edit import (
    ancestors,
    call,
    call_module,
    get_attr,
    insert_copy,
    origin,
    replace_input,
    written_arguments,
)
from ti_fx.ir.outputs import is_container

aten = torch.ops.aten


@dataclass(frozen=True)
class Reading:
    """How the teacher's value is read at a site.

    Attributes:
        blend: False: it alone. True: a share of it, the same everywhere; ``rows``, ``tokens``: it alone by those that
            are drawn.
        keep_encoder_gradient: in cross-attention, don't detach the encoder's output.
        share: of the blend, where the tap had one already.
    """

    blend: bool | str
    keep_encoder_gradient: bool
    share: Tensor | None


def read_teacher(gm: GraphModule, place: Place, twin: Node, how: Reading) -> None:
    """Let the student's readers of a tap read its twin, and detach what feeds the tap; record both."""
    tap = place.tap
    assert tap is not None
    readers, feeding = consumers(tap), _feeding(place, how.keep_encoder_gradient)
    reads = list(_reads(gm, tap))
    share: Node | None = None
    if how.blend and reads:
        first = min([*(reader for reader, _ in reads), *feeding])
        name = blends.add_share(gm, tap, how.share)
        share = _inserted(tap, get_attr(first, name, f"{tap.name}_share", "student"))
        drawn = share
        if isinstance(how.blend, str):
            heads = place.point in POINTS and POINTS[place.point].heads
            target = blends.add_draws(gm, tap, how.blend, heads)
            first = min(reader for reader, _ in reads)
            drawn = _inserted(tap, call_module(first, target, (tap, share), f"{tap.name}_drawn", "student"))
        for reader, own in reads:
            name = f"{tap.name}_for_{reader.name}"
            made = call(reader, numerics.blend, (own, twin, drawn), name, "student")
            replace_input(reader, own, _inserted(tap, made))
    else:
        for reader in readers:
            replace_input(reader, tap, _twin_for(tap, twin, reader))
    names = _detach(place, tap, feeding, share)
    roles.record(
        tap,
        intervened=place.point,
        detaches=names,
        place=[place.stack, place.layer, list(place.kinds)],
        blended=how.blend if share is not None else None,
    )


def consumers(tap: Node) -> list[Node]:
    """Return the student nodes that read a point, the model's returned outputs excepted, in the order of execution."""
    return sorted(
        user
        for user in tap.users
        if roles.is_student(user) and user.op != "output" and not is_container(user)
    )


def _reads(gm: GraphModule, value: Node) -> Iterator[tuple[Node, Node]]:
    """Yield each reader of a value with what it reads: the value, or the same tensor behind an idle dropout."""
    for reader in consumers(value):
        if leaves.is_idle_dropout(gm, reader):
            yield from _reads(gm, reader)
        else:
            yield reader, value


def _inserted(tap: Node, node: Node) -> Node:
    roles.record(node, intervention=tap.name)
    return node


def _twin_for(tap: Node, twin: Node, reader: Node) -> Node:
    """Return what a reader reads in the place of a tap: the twin, or where it writes into that, a copy."""
    if not _writes(reader, tap):
        return twin
    copied = call(reader, aten.clone.default, (twin,), f"{twin.name}_for_{reader.name}", "student")
    return _inserted(tap, copied)


def _writes(reader: Node, value: Node) -> bool:
    """Whether a reader writes into a value, or into a view that it makes of it."""
    if value in written_arguments(reader):
        return True
    is_view = origin(reader) is origin(value)
    return is_view and any(_writes(user, reader) for user in reader.users if roles.is_student(user))


def _feeding(place: Place, keep_encoder_gradient: bool) -> dict[Node, bool]:
    """Return the projections whose inputs are detached at a place, and whether each is for the scores alone."""
    parts = detached(place.point)
    site = place.block
    if site is None:
        return {}
    if site.kind == "cross" and keep_encoder_gradient:
        parts = tuple(part for part in parts if part == "query")
    found: list[Node | None] = [getattr(site, part) for part in parts]
    return {node: node is site.value and "value" not in parts for node in found if node is not None}


def _detach(place: Place, tap: Node, feeding: dict[Node, bool], share: Node | None) -> list[str]:
    """Detach the inputs of the projections that feed the tap; return the names of the detached readers."""
    split: set[Node] = set()
    readers = []
    for node, is_for_scores in feeding.items():
        if is_for_scores:
            assert place.block is not None
            node = _split(place.block, node, tap, share)
            split.add(node)
        readers.append(node)
    made: dict[Node, Node] = {}
    for reader in sorted(readers):  # the first to read an input comes after its detach: nothing is moved
        source = projection_input(reader)
        if share is not None and reader not in split:
            own = call(reader, numerics.detach_by, (source, share), _name(reader, place.point), "student")
            replace_input(reader, source, _inserted(tap, own))
            continue
        if source not in made:
            own = call(reader, numerics.detach, (source,), _name(reader, place.point), "student")
            made[source] = _inserted(tap, own)
        replace_input(reader, source, made[source])
    return [reader.name for reader in readers]


def _name(reader: Node, point: str) -> str:
    """Return a name for what a reader reads, that undoing and redoing gives again."""
    plain = f"{reader.name}_input"
    taken = any(node.name == plain for node in reader.graph.nodes) if _is_detached(reader) else False
    return f"{plain}_{point}" if taken else plain


def _is_detached(reader: Node) -> bool:
    """Whether another point of the block detached a reader's input already."""
    return roles.fact(projection_input(reader), "intervention") is not None


def _split(site: AttentionSite, projection: Node, tap: Node, share: Node | None) -> Node:
    """Copy a fused projection, and what lies between it and the separate Q, K and V, for Q and K alone.

    Under a blend the scores read the projection's own result, and its copy gets the share of their gradient.
    """
    assert site.scores is not None

    def is_outside(node: Node) -> bool:
        """Nothing before the projection reads it, so a walk back ends there."""
        return node is site.map or not projection < node

    for_scores = ancestors([site.scores], stop=is_outside)
    own = [node for node in site.context.all_input_nodes if node is not site.map]
    for_value = ancestors([node for node in own if not roles.is_teacher(node)], stop=is_outside)
    mixed = [projection]
    for node in sorted(for_scores & for_value):
        is_value = isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
        if is_value and not set(mixed).isdisjoint(node.all_input_nodes):
            mixed.append(node)
    clones: dict[Node, Node] = {}
    copied: dict[Node, Node] = {}
    for node in mixed:
        clone = insert_copy(node.next, node, _reading(clones), f"{node.name}_scores")
        clone.meta[roles.KEY] = {"role": "student", "clone_of": node.name, "intervention": tap.name}
        copied[node] = clones[node] = clone
        if node is projection and share is not None:
            arguments = (projection, clone, share)
            routed = call(clone.next, numerics.route, arguments, f"{projection.name}_routed", "student")
            clones[node] = _inserted(tap, routed)
    for node in mixed:
        for user in list(node.users):
            made = user in clones.values() or user in copied.values()
            if user in for_scores and user not in mixed and not made:
                replace_input(user, node, clones[node])
    return copied[projection]


def _reading(clones: dict[Node, Node]) -> Callable[[Node], Node]:
    return lambda source: clones.get(source, source)
