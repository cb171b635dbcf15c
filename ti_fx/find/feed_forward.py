"""Find feed-forward blocks by data flow alone: two projections, a non-linearity between them, and a residual add.

One walk over the graph says of each value which projections it comes from, through what acts on each feature alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.fx import GraphModule, Node

from ti_fx.find.attention import AttentionSite, find_attention
from ti_fx.find.walk import CONVOLUTION, NORM, Walk, is_float, operands, projection_input, rank
from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name, constant_size
from ti_fx.ir.inserted import source_of


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What acts on each entry alone and is no activation function: linear, a bound, a choice, or a part of a norm.
_NO_ACTIVATION = NORM | _names(
    """add add_ sub sub_ rsub mul mul_ div div_ neg where masked_fill masked_fill_ clamp clamp_ clamp_min clamp_max
    maximum minimum nan_to_num abs sign sqrt reciprocal square clone addcmul lerp copy_"""
)
# Activation functions that torch does not mark as pointwise.
_ACTIVATIONS = _names("hardswish hardswish_ prelu _prelu_kernel log_sigmoid glu")
# What narrows a value to a part of its features: the halves of one linear that makes both up and gate.
_PARTS = _names("slice select narrow")
# How experts' results come together.
_GATHERS = _names("sum index_add index_add_ scatter_add scatter_add_")


@dataclass(frozen=True)
class FeedForwardSite:
    """The nodes of one feed-forward block.

    Attributes:
        stack, layer: those of the attention block whose residual stream it continues, -1 where there is none.
        up: the projection into the hidden features. gate: the one that the activation is applied to, where the hidden
            features are a product of two; the same node as ``up`` where one linear makes both; None where there is no
            gate. Batched weights of experts are one node.
        down: the projection back.
        hidden: what ``down`` reads, before a pass's quantiser.
        residual: the add that joins the result to the residual stream.
        output: what the block computes, before dropout, norm and scale: of experts their sum, else what ``down`` gives.
    """

    stack: int
    layer: int
    up: Node
    gate: Node | None
    down: Node
    hidden: Node
    residual: Node | None
    output: Node | None = None

    @property
    def where(self) -> str:
        """Say which block this is: ``stack 0, layer 3``."""
        return f"stack {self.stack}, layer {self.layer}"

    def __str__(self) -> str:
        names = {
            name: node.name
            for name in ("up", "gate", "down", "hidden", "residual")
            if (node := getattr(self, name)) is not None
        }
        return f"{self.where}: " + " ".join(f"{key}=%{name}" for key, name in names.items())


def find_feed_forward(gm: GraphModule) -> list[FeedForwardSite]:
    """Return every feed-forward block of the graph, in execution order.

    A block is a projection whose input comes from one or two projections through a non-linearity, and whose result
    goes on to a residual add. Heads have no residual add and routers no second projection, so they are none. A
    convolution over neighbours counts only in the stream of an attention block, as of speech and time series.
    On a prepared graph the sites hold the student's nodes.
    """
    student = roles.twins(gm.graph)
    teacher = {twin: node for node, twin in reversed(student.items())}
    finder = _Finder(gm, "teacher" if teacher else "student", find_attention(gm), teacher)
    sites = finder.sites()
    if teacher:
        sites = [site for site in sites if site.down in student]  # else of a layer that the student has not
    return [_mapped(site, student, finder) for site in sites]


def _mapped(site: FeedForwardSite, student: dict[Node, Node], finder: _Finder) -> FeedForwardSite:
    """Return the site with each node replaced by its student twin; the student reads its own hidden features."""
    nodes = {name: student.get(node, node) for name, node in vars(site).items() if isinstance(node, Node)}
    place = site.down.all_input_nodes.index(finder.reads(site.down))
    nodes["hidden"] = source_of(nodes["down"].all_input_nodes[place])
    return replace(site, **nodes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Way:
    """What lies between a projection and a value: an activation function; a convolution over neighbours."""

    active: bool = False
    spatial: bool = False


# The projections (or parts of one) that a value comes from, each with the way from there to the value. _MANY stands
# for a value that comes from more projections than are counted, or from something that is no projection.
_Sources = dict[tuple[Node, Node | None], _Way]
_MANY: _Sources = {}


class _Finder(Walk):
    """The feed-forward blocks of one role."""

    def __init__(
        self, gm: GraphModule, role: roles.Role, attention: list[AttentionSite], teacher: dict[Node, Node]
    ) -> None:
        super().__init__(gm, role)
        self.taken: set[Node] = set()
        self.layers: dict[Node, tuple[int, int]] = {}
        for site in attention:
            own = (site.query, site.key, site.value, site.output)
            self.taken |= {teacher.get(node, node) for node in own if node is not None}
            end = site.residual or site.output or site.context
            self.layers[teacher.get(end, end)] = (site.stack, site.layer)
        self.sources: dict[Node, _Sources] = {}
        self.ahead: dict[Node, Node | None] = {}
        for node in self.position:
            if node in self.active and is_float(node):
                found = self.trace(node)
                if found is not None:
                    self.sources[node] = found

    def sites(self) -> list[FeedForwardSite]:
        """Return the blocks in graph order."""
        found = (self.site(node) for node in self.position if roles.role(node) == self.role)
        sites = [site for site in found if site is not None]
        beside: dict[Node | None, list[Node]] = {}  # the projections of all experts of a block
        for site in sites:
            beside.setdefault(site.residual, []).extend((site.up, site.down))
        return [replace(site, output=self.output(site, beside[site.residual])) for site in sites]

    def output(self, site: FeedForwardSite, beside: list[Node]) -> Node:
        """Return what the block computes: past the adds of experts and adapters, and a router's weights."""
        found = site.down
        path = self.forward(site.down, lambda user: user is site.residual, self.leads_on)
        for before, node in pairwise(path[:-1]):
            others = [
                part
                for part in node.all_input_nodes
                if part is not before and part in self.active and is_float(part)
            ]
            if self.is_norm(node) or not (others or aten_name(node) in _GATHERS):
                continue
            if self.is_sum(node) and not any(self.reaches(one, part) for one in beside for part in others):
                break  # another branch of the layer, as in parallel blocks
            found = node
        return found

    def site(self, down: Node) -> FeedForwardSite | None:
        """Return the block that ends with a projection, None if none does."""
        if down in self.taken or down not in self.active or not self.multiplies(down):
            return None
        hidden = source_of(self.reads(down))
        sources = self.sources.get(hidden, _MANY)
        ways = list(sources.values())
        if not any(way.active for way in ways) or any(node in self.taken for node, _ in sources):
            return None
        residual = self.residual(down)
        if residual is None:
            return None
        stack, layer = self.place(residual, down)
        if self.is_spatial(down, sources) and stack < 0:
            return None
        if aten_name(down) in CONVOLUTION and any(way.spatial for way in ways):
            return None  # a depthwise convolution between two pointwise ones: a convolution block
        up, gate = _up_and_gate(sources)
        return FeedForwardSite(stack, layer, up, gate, down, hidden, residual)

    def is_spatial(self, down: Node, sources: _Sources) -> bool:
        """Whether one of the block's projections is a convolution over neighbours."""
        return any(self.is_convolution(node) for node in (down, *(node for node, _ in sources)))

    # ---- where values come from

    def trace(self, node: Node) -> _Sources | None:
        """Return where a floating-point value comes from, None if it holds no features of its own (a bias, a mask)."""
        if self.multiplies(node):
            if not self.is_depthwise(node):
                return {(node, None): _Way()}
            return _changed(self.sources.get(source_of(self.reads(node)), _MANY), spatial=True)
        if node.op == "placeholder":
            return _MANY
        if self.is_view(node):
            found = self.sources.get(node.all_input_nodes[0])
            is_part = aten_name(node) in _PARTS or (not aten_name(node) and node.op == "call_function")
            return {(key, node): way for (key, _), way in found.items()} if found and is_part else found
        if aten_name(node) == "glu":
            found = self.sources.get(node.all_input_nodes[0], _MANY)
            return _union(_changed({(key, node): way for (key, _), way in found.items()}, active=True), found)
        if self.is_transparent(node) or (self.is_norm(node) and not _is_pointwise(node)):
            return self.sources.get(node.all_input_nodes[0], _MANY)
        if not _is_pointwise(node) and aten_name(node) not in _ACTIVATIONS:
            return _MANY
        return self.combine(node)

    def combine(self, node: Node) -> _Sources | None:
        """Return where the value of a pointwise operation comes from."""
        terms = [part for part in node.all_input_nodes if part in self.sources and not _is_spread(part, node)]
        if not terms:
            return None
        parts = [self.sources[part] for part in terms]
        if any(not part for part in parts):
            return _MANY
        if len(parts) == 2 and self.is_sum(node) and not parts[0].keys() & parts[1].keys():
            # two paths side by side (a low-rank adapter) stand for the first; past a residual add all begins anew
            return _MANY if self.branch(node) is not None else parts[0]
        found = _union(*parts)
        is_activation = aten_name(node) not in _NO_ACTIVATION
        return _changed(found, active=True) if is_activation else found

    def multiplies(self, node: Node) -> bool:
        """Whether the node multiplies by a stored weight, also by those of several experts at once."""
        return self.is_projection(node) or self.weight_place(node) is not None

    def weight_place(self, node: Node) -> int | None:
        """Return whether the first or the second operand is a stored weight; experts' may stand on either side."""
        is_call = isinstance(node.target, torch._ops.OpOverload) and len(node.args) >= 2
        if not is_call or _is_pointwise(node) or self.is_view(node) or not is_float(node):
            return None
        for place, other in ((1, 0), (0, 1)):
            weight, activation = node.args[place], node.args[other]
            if (
                not isinstance(weight, Node)
                or not isinstance(activation, Node)
                or activation not in self.active
            ):
                continue
            is_stored = rank(weight) >= 2 and self.before_views(weight).op == "get_attr"
            if is_stored and is_float(weight) and is_float(activation):
                return place
        return None

    def reads(self, node: Node) -> Node:
        """Return the activation that a projection reads."""
        if not self.is_projection(node) and self.weight_place(node) == 0:
            found = node.args[1]
            assert isinstance(found, Node)
            return found
        return projection_input(node)

    def is_convolution(self, node: Node) -> bool:
        """Whether the node is a convolution over more than one position."""
        if aten_name(node) not in CONVOLUTION:
            return False
        return any(size != 1 for size in operands(node)[1].meta["val"].shape[2:])

    def is_depthwise(self, node: Node) -> bool:
        """Whether the node is a convolution of each feature by itself."""
        if not self.is_convolution(node):
            return False
        weight = operands(node)[1].meta["val"].shape
        features = operands(node)[0].meta["val"].shape[1]
        return bool(weight[1] == 1 and weight[0] == constant_size(features))

    # ---- where a result goes

    def residual(self, down: Node) -> Node | None:
        """Return the residual add that a projection's result goes on to, past adds of what runs beside it."""

        def ends(user: Node) -> bool:
            return user in self.ahead or (self.is_sum(user) and self.branch(user) is not None)

        path = self.forward(down, ends, self.leads_on)
        if not path:
            return None
        last = path[-1]
        found = self.ahead[last] if last in self.ahead else last if self.branch(last) is path[-2] else None
        self.ahead |= dict.fromkeys(path[:-1], found)
        return found

    def leads_on(self, user: Node) -> bool:
        """Whether a node may lie between a block's last projection and its residual add."""
        is_linear = _is_pointwise(user) and aten_name(user) in _NO_ACTIVATION
        return is_linear or self.is_transparent(user) or self.is_norm(user) or aten_name(user) in _GATHERS

    def branch(self, add: Node) -> Node | None:
        """Return the operand of a residual add that is computed from the other, None if it is no residual add.

        Or from what the other was added up from: of ``x + attention(x) + feed_forward(x)`` the last.
        """
        terms = [part for part in add.args[:2] if isinstance(part, Node)]
        for stream, branch in (terms, terms[::-1]):
            start = self.root(stream)
            parts = [self.root(part) for part in operands(start)] if self.is_sum(start) else []
            if any(self.reaches(part, branch) for part in (start, *parts) if part is not branch):
                return branch
        return None

    def place(self, residual: Node, down: Node) -> tuple[int, int]:
        """Return the stack and layer of the attention block before, (-1, -1) if there is none."""
        others = [part for part in residual.all_input_nodes if part in self.computed]
        near = self.layers.get(residual)
        if near is None:
            found = self.backward_from(others)
            near = self.layers[found[0]] if found else (-1, -1)
        self.layers[residual] = near
        return near

    def backward_from(self, starts: Iterable[Node]) -> list[Node]:
        """Return the nearest ends of blocks before, along the stream."""

        def through(part: Node) -> bool:
            moves = self.is_transparent(part) or self.is_norm(part) or _is_pointwise(part)
            return part in self.computed and is_float(part) and moves

        return [
            end for start in starts for end in self.backward(start, lambda part: part in self.layers, through)
        ]


def _up_and_gate(sources: _Sources) -> tuple[Node, Node | None]:
    """The gate is what the activation is applied to; where it is applied to both, the one that runs later."""
    (first, way), *others = [(node, way) for (node, _), way in sources.items()]
    if not others:
        return first, None
    ((second, _),) = others
    return (second, first) if way.active and not others[0][1].active else (first, second)


def _changed(sources: _Sources, *, active: bool = False, spatial: bool = False) -> _Sources:
    """Return the sources after an activation function or a convolution on all ways."""
    return {key: _Way(way.active or active, way.spatial or spatial) for key, way in sources.items()}


def _union(*sources: _Sources) -> _Sources:
    """Return the sources of a value made from several; more than two projections are MANY."""
    found: _Sources = {}
    for part in sources:
        for key, way in part.items():
            known = found.get(key, way)
            found[key] = _Way(known.active or way.active, known.spatial or way.spatial)
    return found if len(found) <= 2 else _MANY


def _is_pointwise(node: Node) -> bool:
    """Whether torch says that the operation computes each entry from the same entry of its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags or aten_name(node) in _NO_ACTIVATION - NORM
    )


def _is_spread(part: Node, node: Node) -> bool:
    """Whether an operand has one number for all features: a norm's factor, a router's weight."""
    whole, value = node.meta["val"], part.meta["val"]
    if value.dim() == 0:
        return True
    return constant_size(value.shape[-1]) == 1 and constant_size(whole.shape[-1]) != 1
