"""Teacher Intervention: let the student read the teacher's value at a point of its attention blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.errors import PostconditionError, PreconditionError, SelectionError, did_you_mean
from ti_fx.find.attention import POINTS, AttentionSite, Point, find_attention
from ti_fx.find.walk import projection_input
from ti_fx.ir import roles
from ti_fx.ir.edit import ancestors, call, erase, insert_copy, replace_input
from ti_fx.ir.outputs import is_container
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED

# The projections whose inputs are detached, by point (published code; the residual is never detached).
DETACHED: dict[Point, tuple[str, ...]] = {
    "map": ("query", "key"),
    "context": ("query", "key", "value"),
    "output": ("query", "key", "value"),
}


@dataclass(frozen=True)
class Intervene(Pass):
    """Student consumers of an attention point read the teacher's value instead.

    before:  %map = softmax(%scores)        #student     after:  %map = softmax(%scores)    #student  (a tap)
             %ctx = matmul(%map, %v)        #student             %ctx = matmul(%map_t, %v)  #student

    1. whatever intervention the selected blocks have is undone
    2. every student consumer of the point reads the twin; losses and the model's returned outputs keep the tap
    3. the inputs of the projections that feed the tap are detached: Q and K under ``map``, Q, K and V under
       ``context`` and ``output``
    4. under ``map``, a projection that makes V together with Q and K runs twice, once on the detached input

    Source: arXiv 2302.11812, sections 3.1 to 3.3: TI-M, TI-C, TI-O.

    Attributes:
        at: the point; None for no intervention (plain quantisation-aware training).
        layers, stack, kind: the blocks that are selected; None selects all.
        keep_encoder_gradient: in cross-attention, don't detach the encoder's output.
    """

    takes = (CAPTURED, PREPARED)
    gives = PREPARED

    at: Point | None = None
    layers: tuple[int, ...] | None = None
    stack: int | None = None
    kind: Literal["self", "cross"] | None = None
    keep_encoder_gradient: bool = False

    def requires(self, gm: GraphModule) -> None:
        """A teacher, unless nothing is to be intervened; attention in which the point is a node."""
        if self.at is not None and self.at not in POINTS:
            raise SelectionError(f"intervene can't act at {self.at!r}{did_you_mean(self.at, POINTS)}")
        if not any(roles.is_teacher(node) for node in gm.graph.nodes):
            if self.at is None:
                return  # nothing is intervened at
            raise PreconditionError("intervene needs a teacher to read from", missing="duplicate-teacher")
        sites = self.select(gm)
        if not sites:
            raise SelectionError(
                f"{self} selects none of the graph's {len(find_attention(gm))} attention blocks; "
                "print ti_fx.find_attention(gm)"
            )
        if missing := set(self.layers or ()) - {site.layer for site in sites}:
            raise SelectionError(
                f"{self}: no selected block has layer {min(missing)}; print ti_fx.find_attention(gm)"
            )
        for site in sites if self.at is not None else ():
            if site.map is None:
                raise PreconditionError(
                    f"attention is one fused node in {site.where} (%{site.context.name})",
                    missing="decompose-attention",
                )
            if self.at is not None and site.at(self.at) is None:
                raise PreconditionError(
                    f"{site.where} has no {self.at}: nothing projects its context (%{site.context.name}); "
                    "intervene at map or context, or select other layers"
                )

    def apply(self, gm: GraphModule) -> None:
        """Undo, rewire, detach, block by block."""
        teacher = roles.twin_of(gm.graph)
        undo(gm, self.select(gm))
        for site in self.select(gm) if self.at is not None else ():
            assert self.at is not None
            tap = site.at(self.at)
            assert tap is not None
            for user in consumers(tap):
                replace_input(user, tap, teacher[tap])
            names = self._detach(gm, site, tap)
            roles.record(tap, intervened=self.at, detaches=names)

    def ensures(self, gm: GraphModule) -> None:
        """Each selected block is intervened at this point and at no other."""
        for site in self.select(gm):
            found = [point for point in POINTS if (node := site.at(point)) is not None and _point(node)]
            if found != ([] if self.at is None else [self.at]):
                raise PostconditionError(f"intervene left {site.where} intervened at {found}")

    def select(self, gm: GraphModule) -> list[AttentionSite]:
        """Return the selected attention blocks."""
        return [
            site
            for site in find_attention(gm)
            if (self.layers is None or site.layer in self.layers)
            and (self.stack is None or site.stack == self.stack)
            and (self.kind is None or site.kind == self.kind)
        ]

    def _detach(self, gm: GraphModule, site: AttentionSite, tap: Node) -> list[str]:
        """Detach the inputs of the projections that feed the tap; return the names of the detached readers."""
        assert self.at is not None
        parts = DETACHED[self.at]
        if site.kind == "cross" and self.keep_encoder_gradient:
            parts = tuple(part for part in parts if part == "query")
        found: list[Node | None] = [getattr(site, part) for part in parts]
        wanted = dict.fromkeys(node for node in found if node is not None)
        readers = [
            _split(gm, site, node, tap) if node is site.value and "value" not in parts else node
            for node in wanted
        ]
        made: dict[Node, Node] = {}
        for reader in sorted(
            readers
        ):  # the first to read an input comes after its detach, so nothing is moved
            source = projection_input(reader)
            if source not in made:
                made[source] = call(reader, numerics.detach, (source,), f"{reader.name}_input", "student")
                roles.record(made[source], intervention=tap.name)
            replace_input(reader, source, made[source])
        return [reader.name for reader in readers]


def consumers(tap: Node) -> list[Node]:
    """Return the student nodes that read a point, the model's returned outputs excepted."""
    return [
        user
        for user in tap.users
        if roles.is_student(user) and user.op != "output" and not is_container(user)
    ]


def undo(gm: GraphModule, sites: Iterable[AttentionSite]) -> None:
    """Let the blocks' consumers read the student's own values again and remove the blocks' detaches."""
    teacher = roles.twin_of(gm.graph)
    by_name = {node.name: node for node in gm.graph.nodes}
    inserted: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if name := roles.fact(node, "intervention"):
            inserted.setdefault(str(name), []).append(node)
    for tap in [site.at(point) for site in sites for point in POINTS]:
        if tap is None or not _point(tap):
            continue
        for user in consumers(teacher[tap]):
            replace_input(user, teacher[tap], tap)
        for node in inserted.get(tap.name, ()):
            original = by_name.get(str(roles.fact(node, "clone_of")))
            source = original if original is not None else node.args[0]
            assert isinstance(source, Node)
            node.replace_all_uses_with(source)
        for node in reversed(inserted.get(tap.name, ())):
            erase(node)
        roles.record(tap, intervened=None, detaches=None)


def _point(node: Node) -> Point | None:
    point: Point | None = roles.fact(node, "intervened")
    return point


def _split(gm: GraphModule, site: AttentionSite, projection: Node, tap: Node) -> Node:
    """Copy a fused projection, and what lies between it and the separate Q, K and V, for Q and K alone."""
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
    for node in mixed:
        clone = insert_copy(node.next, node, lambda source: clones.get(source, source), f"{node.name}_scores")
        clone.meta[roles.KEY] = {"role": "student", "clone_of": node.name, "intervention": tap.name}
        clones[node] = clone
    for node in mixed:
        for user in list(node.users):
            if user in for_scores and user not in mixed and user not in clones.values():
                replace_input(user, node, clones[node])
    return clones[projection]
