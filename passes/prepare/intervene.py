"""Teacher Intervention: let the student read the teacher's value at a point of its blocks or layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch.fx import GraphModule, Node

from ti_fx.errors import PostconditionError, PreconditionError, SelectionError
from ti_fx.find import points
from ti_fx.find.points import POINTS, Place
from ti_fx.ir import blends, roles
from ti_fx.ir.edit import erase, replace_input
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED
from ti_fx.passes.prepare.read_teacher import Reading, consumers, read_teacher


@dataclass(frozen=True)
class Intervene(Pass):
    """Student consumers of a point read the teacher's value instead, or a blend of it with their own.

    before:  %map = softmax(%scores)        #student     after:  %map = softmax(%scores)    #student  (a tap)
             %ctx = matmul(%map, %v)        #student             %ctx = matmul(%map_t, %v)  #student

    1. whatever intervention the selected blocks have is undone
    2. every student consumer of the point reads the twin; losses and the model's returned outputs keep the tap
    3. the inputs of the projections that feed the tap are detached: Q and K under ``map``, Q, K and V under
       ``context`` and ``output``; nothing under ``layer`` and ``ffn``
    4. under ``map``, a projection that makes V together with Q and K runs twice, once on the detached input
    5. ``blend``: each consumer reads ``blend(%map, %map_t, %share)``, the share λ a buffer of the graph. What is
       detached is detached by λ, too: of the gradient, the part 1 - λ passes. At λ = 1 that is the intervention
       without a blend, at λ = 0 none, in every bit of values and gradients (a gradient that there is not, is zero)

    Sources: arXiv 2302.11812, sections 3.1 to 3.3: TI-M, TI-C, TI-O. Rows or tokens drawn at random: QDrop, arXiv
    2203.05740, there of activations' quantisers.

    Attributes:
        at: the point: ``map``, ``context``, ``output`` (of attention), ``ffn`` (a feed-forward block's output, before
            dropout and residual), ``layer`` (the residual stream that a layer reads), ``node:NAME`` (a value by the
            name of its node), or several of them, ``layer+ffn``; None for no intervention (plain quantisation-aware
            training).
        layers, stack, kind: the blocks that are selected; None selects all. A layer is of the kinds of its attention.
        keep_encoder_gradient: in cross-attention, don't detach the encoder's output.
        blend: read the share λ of the teacher's value (True), or the whole of it by rows or tokens that are drawn with
            the probability λ. λ is 1 until something moves it: ``ti_fx.ir.blends``, or a phase's curves.
    """

    takes = (CAPTURED, PREPARED)
    gives = PREPARED

    at: str | None = None
    layers: tuple[int, ...] | None = None
    stack: int | None = None
    kind: Literal["self", "cross"] | None = None
    keep_encoder_gradient: bool = False
    blend: bool | Literal["rows", "tokens"] = False

    def requires(self, gm: GraphModule) -> None:
        """A teacher, unless nothing is to be intervened; blocks in which the point is a node."""
        if unknown := points.unknown(self.at):
            raise SelectionError(f"intervene can't act at {unknown}")
        if self.at is None and self.blend:
            raise SelectionError("intervene{blend} needs a point to blend at; give at=, or leave out blend")
        if not any(roles.is_teacher(node) for node in gm.graph.nodes):
            if self.at is None:
                return  # nothing is intervened at
            raise PreconditionError("intervene needs a teacher to read from", missing="duplicate-teacher")
        self._require_places(gm)
        for place in self.select(gm) if self.at is not None else ():
            self._require_tap(gm, place)

    def _require_places(self, gm: GraphModule) -> None:
        """Raise SelectionError unless the options select something."""
        names = points.names(self.at)
        own = next((name for name in names if name not in POINTS), None)
        if own is not None and (self.layers, self.stack, self.kind) != (None, None, None):
            raise SelectionError(
                f"{self}: layers, stack and kind select blocks, and {own} is one value; leave them out"
            )
        found = self.select(gm)
        for name in names or ("map",):
            if not any(place.point == name for place in found):
                known = len(points.places(gm, name))
                raise SelectionError(
                    f"{self} selects none of the graph's {known} {POINTS[name].blocks}; "
                    "print ti_fx.find_attention(gm)"
                )
        if missing := set(self.layers or ()) - {place.layer for place in found}:
            raise SelectionError(
                f"{self}: no selected block has layer {min(missing)}; print ti_fx.find_attention(gm)"
            )

    def _require_tap(self, gm: GraphModule, place: Place) -> None:
        """Raise PreconditionError unless a selected place has a node that can be read as the options say."""
        if place.block is not None and place.block.map is None:
            raise PreconditionError(
                f"attention is one fused node in {place.where} (%{place.block.context.name})",
                missing="decompose-attention",
            )
        if place.tap is None:
            context = "" if place.block is None else f"%{place.block.context.name}"
            lacking = POINTS[place.point].lacking.format(context=context)
            raise PreconditionError(f"{place.where} has no {place.point}: {lacking}")
        if self.blend == "rows" and not _has_rows(gm, place.tap):
            raise PreconditionError(
                f"%{place.tap.name} ({place.where}) has no dimension of rows, so none can be drawn; give blend=tokens"
            )

    def apply(self, gm: GraphModule) -> None:
        """Undo, rewire, detach, place by place."""
        teacher = roles.twin_of(gm.graph)
        held = {share.tap: share.value for share in blends.shares(gm)}
        undo(gm, self._covers)
        for tap, place in self._taps(gm).items():
            how = Reading(self.blend, self.keep_encoder_gradient, held.get(tap.name))
            read_teacher(gm, place, teacher[tap], how)

    def ensures(self, gm: GraphModule) -> None:
        """Each selected place is intervened, and nothing else in the selected blocks."""
        wanted = {tap: place.point for tap, place in self._taps(gm).items()}
        found = {node: point for node in gm.graph.nodes if (point := _point(node)) and self._covers(node)}
        for node in {**wanted, **found}:
            if wanted.get(node) != found.get(node):
                raise PostconditionError(f"intervene left %{node.name} intervened at {found.get(node)}")

    def select(self, gm: GraphModule) -> list[Place]:
        """Return the selected places, point by point; of no intervention, the selected attention blocks."""
        return [
            place
            for name in points.names(self.at) or ("map",)
            for place in points.places(gm, name)
            if place.point not in POINTS or self._selects(place.stack, place.layer, place.kinds)
        ]

    def _selects(self, stack: int, layer: int, kinds: tuple[str, ...]) -> bool:
        return (
            (self.layers is None or layer in self.layers)
            and (self.stack is None or stack == self.stack)
            and (self.kind is None or self.kind in kinds)
        )

    def _covers(self, node: Node) -> bool:
        """Whether the place that an intervened node records is a selected one."""
        stack, layer, kinds = roles.fact(node, "place") or (-1, -1, ())
        return self._selects(stack, layer, kinds)

    def _taps(self, gm: GraphModule) -> dict[Node, Place]:
        """Return what is to be intervened; a value that inputs alone decide is the teacher's already."""
        if self.at is None or not any(roles.is_teacher(node) for node in gm.graph.nodes):
            return {}
        teacher, found = roles.twin_of(gm.graph), dict[Node, Place]()
        for place in self.select(gm):
            if place.tap is not None and place.tap in teacher:
                found.setdefault(place.tap, place)
        return found


def undo(gm: GraphModule, covers: Callable[[Node], bool] = lambda node: True) -> None:
    """Let consumers read the student's own values again and remove what interventions inserted.

    Args:
        gm: the graph.
        covers: which of the intervened nodes; all unless given.
    """
    taps = [node for node in gm.graph.nodes if _point(node) and covers(node)]
    teacher = roles.twin_of(gm.graph) if taps else {}
    by_name = {node.name: node for node in gm.graph.nodes}
    inserted: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if name := roles.fact(node, "intervention"):
            inserted.setdefault(str(name), []).append(node)
    for tap in taps:
        own = inserted.get(tap.name, [])
        for node in own:
            original = by_name.get(str(roles.fact(node, "clone_of")))
            if (
                original is not None or node.op == "call_function"
            ):  # else a share, or draws: only blends read it
                node.replace_all_uses_with(original if original is not None else node.all_input_nodes[0])
        for node in reversed(own):
            erase(node)
        for user in consumers(teacher[tap]):
            replace_input(user, teacher[tap], tap)
        if roles.fact(tap, "blended") is not None:
            blends.drop_share(gm, tap.name)
        roles.record(tap, intervened=None, detaches=None, place=None, blended=None)


def _point(node: Node) -> str | None:
    point: str | None = roles.fact(node, "intervened")
    return point


def _has_rows(gm: GraphModule, tap: Node) -> bool:
    """Whether the first dimension of a value is that of an input."""
    value = tap.meta["val"]
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    rows = {str(one.shape[0]) for one in inputs if getattr(one, "dim", int)()}
    return bool(value.dim()) and str(value.shape[0]) in rows
