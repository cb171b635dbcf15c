"""Find attention by data flow alone: no table of architectures, no names of modules.

From each softmax, forward to the context, backward to scores and projections, onward to the output projection and
the residual add. A prepared graph is read on its teacher subgraph, which no pass rewires, and mapped back to the
student through the twins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ti_fx.find.towers import Towers
from ti_fx.find.walk import CONVOLUTION, SOFTMAX, Walk, is_float, operands, projection_input, rank
from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name
from ti_fx.ir.inserted import source_of

Point = str
POINTS: tuple[Point, ...] = ("map", "context", "output")


@dataclass(frozen=True)
class AttentionSite:
    """The nodes of one attention block.

    Attributes:
        stack: which tower, in graph order. layer: the block's layer within it. kind: ``self`` or ``cross``.
        query, key, value: the projections (one node three times when Q, K, V are one linear), None if there is none.
        scores: the input of softmax. map: softmax(scores). Both None while attention is one fused node.
        context: map times V, before the heads are merged.
        output: the output projection's result, None if there is no such projection.
        residual: the add that joins the output to the residual stream; stream: the other operand of that add.
    """

    stack: int
    layer: int
    kind: Literal["self", "cross"]
    query: Node | None
    key: Node | None
    value: Node | None
    scores: Node | None
    map: Node | None
    context: Node
    output: Node | None
    residual: Node | None
    stream: Node | None

    def at(self, point: Point) -> Node | None:
        """Return the node at a point: ``map``, ``context`` or ``output``."""
        node: Node | None = getattr(self, point)
        return node

    @property
    def where(self) -> str:
        """Say which block this is: ``stack 0, layer 3 (self)``."""
        return f"stack {self.stack}, layer {self.layer} ({self.kind})"

    def __str__(self) -> str:
        names = {
            name: node.name
            for name in ("query", "key", "value", "scores", "map", "context", "output", "residual")
            if (node := getattr(self, name)) is not None
        }
        return f"{self.where}: " + " ".join(f"{key}=%{name}" for key, name in names.items())


def find_attention(gm: GraphModule) -> list[AttentionSite]:
    """Return every attention block of the graph, in execution order.

    On a prepared graph the sites hold the student's nodes.
    """
    finder, student, _ = _view(gm)
    sites = _number(finder, finder.sites())
    if finder.role == "student":
        return sites
    return [_mapped(site, student) for site in _renumbered([one for one in sites if one.context in student])]


def _renumbered(sites: list[AttentionSite]) -> list[AttentionSite]:
    """Number a student's layers from 0, where it has not all of its teacher's."""
    layers: dict[int, list[int]] = {}
    for site in sites:
        layers.setdefault(site.stack, []).append(site.layer)
    numbers = {stack: list(dict.fromkeys(own)) for stack, own in layers.items()}
    return [replace(site, layer=numbers[site.stack].index(site.layer)) for site in sites]


def _mapped(site: AttentionSite, student: dict[Node, Node]) -> AttentionSite:
    """Return the site with each node replaced by its student twin."""
    nodes: dict[str, Any] = {
        name: student.get(node, node) for name, node in vars(site).items() if isinstance(node, Node)
    }
    return replace(site, **nodes)


def layer_outputs(gm: GraphModule, sites: list[AttentionSite]) -> list[Node]:
    """Return the layer outputs of every stack, one stack after the other; see :func:`streams`."""
    return list(dict.fromkeys(node for stream in streams(gm, sites).values() for node in stream))


def streams(gm: GraphModule, sites: list[AttentionSite]) -> dict[int, list[Node]]:
    """Return, per stack, the residual stream entering each layer and leaving the last, in order.

    That is the embeddings' output (before dropout, which a teacher has not) and every layer's output (before a final
    norm, which belongs to no layer): ``X_0 .. X_L`` of the paper. Nodes of the student.
    """
    finder, student, teacher = _view(gm)
    found: dict[int, list[Node]] = {}
    for stack in sorted({site.stack for site in sites}):
        tower = [site for site in sites if site.stack == stack]
        first = {site.layer: site for site in reversed(tower)}
        nodes = [
            finder.before_dropout(site.stream) for _, site in sorted(first.items()) if site.stream is not None
        ]
        last = tower[-1].residual
        if last is not None:
            leaving = finder.layer_end(teacher.get(last, last))
            nodes.append(student.get(leaving, leaving))
        found[stack] = list(dict.fromkeys(nodes))
    return found


def layer_inputs(gm: GraphModule, sites: list[AttentionSite]) -> dict[tuple[int, int], Node | None]:
    """Return, by stack and layer, the residual stream that the layer reads, before dropout; None where it has none."""
    finder, _, _ = _view(gm)
    first = {(site.stack, site.layer): site.stream for site in reversed(sites)}
    streams = {place: None if node is None else finder.before_dropout(node) for place, node in first.items()}
    return dict(sorted(streams.items()))


def block_outputs(gm: GraphModule, sites: list[AttentionSite]) -> list[Node | None]:
    """Return, per site, the residual stream after the block: past the norm where the block is post-norm, or None."""
    finder, student, teacher = _view(gm)
    found: list[Node | None] = []
    for site in sites:
        if site.residual is None:
            found.append(None)
            continue
        after = finder.stream_after(teacher.get(site.residual, site.residual))
        found.append(student.get(after, after))
    return found


def _view(gm: GraphModule) -> tuple[_Finder, dict[Node, Node], dict[Node, Node]]:
    """Return a walk over the subgraph that is never rewired, its nodes' student twins, and the reverse."""
    prepared = any(roles.is_teacher(node) for node in gm.graph.nodes)
    student = roles.twins(gm.graph)
    return _Finder(gm, "teacher" if prepared else "student"), student, roles.twin_of(gm.graph)


class _Finder(Walk):
    """The attention blocks of one role."""

    def sites(self) -> list[AttentionSite]:
        """Return the blocks in graph order, not numbered yet."""
        found = []
        for node in self.position:
            if roles.role(node) != self.role:
                continue
            if aten_name(node) in SOFTMAX:
                site = self.from_softmax(node)
            elif self.is_fused(node):
                site = self.from_fused(node)
            else:
                continue
            if site is not None:
                found.append(site)
        return found

    def from_softmax(self, node: Node) -> AttentionSite | None:
        """Return the block of a softmax, None if no product of activations is before or no value behind it."""
        scores = node.args[0]
        assert isinstance(scores, Node)
        products = self.products(scores)
        path = self.to_context(node) if products else []
        if not path:
            return None
        context, last = path[-1], path[-2]
        value_operand = next((part for part in operands(context) if part is not last), last)
        value = self.projection(value_operand, context)
        value_source = self.source(value, value_operand)
        pairs = [tuple(self.projection(part, product) for part in operands(product)) for product in products]
        matching = [
            index
            for index, (product, (_, key)) in enumerate(zip(products, pairs, strict=True))
            if self.source(key, operands(product)[1]) is value_source
        ]
        if not matching and all(self.is_query_product(product) for product in products):
            return None  # stored weights on the left, and another source on the right: a router, no queries
        query, key = pairs[(matching or [0])[0]]
        return self.complete(query, key, value, scores, node, context)

    def products(self, scores: Node) -> list[Node]:
        """Return the products of activations that are added up in the scores, nearest first."""

        def wanted(node: Node) -> bool:
            return self.is_activation_product(node) or self.is_query_product(node)

        def through(node: Node) -> bool:
            return (
                node in self.computed
                and is_float(node)
                and not self.is_projection(node)
                and not self.is_norm(node)
                and aten_name(node) not in SOFTMAX
            )

        found = self.backward(scores, wanted, through)
        if found:
            return found
        # talking heads: one linear across the heads lies between
        mixing = self.backward(scores, self.is_projection, through)
        found = [
            part
            for node in mixing[:1]
            if self.mixes_alike(node)
            for part in self.backward(operands(node)[0], wanted, through)
        ]
        return [part for part in found if rank(part) == rank(scores) >= 4]

    def to_context(self, node: Node) -> list[Node]:
        """Return the path from a map to the product with its values, [] if there is none."""

        def through(user: Node) -> bool:
            return self.is_transparent(user) or (self.is_elementwise(user) and not self.is_sum(user))

        path = self.forward(node, self.is_activation_product, through)
        if path:
            return path
        mixing = self.forward(node, self.is_projection, through)
        if not mixing or not self.mixes_alike(mixing[-1]):
            return []
        behind = self.forward(mixing[-1], self.is_activation_product, through)
        return mixing + behind[1:] if behind else []

    def source(self, projection: Node | None, operand: Node) -> Node:
        """Return what an operand of an attention product is projected from."""
        return source_of(projection_input(projection)) if projection is not None else self.root(operand)

    def from_fused(self, node: Node) -> AttentionSite:
        """Return the block of a fused attention node."""
        # keys may be the values, too
        factors = (operand for operand in node.args[:3] if isinstance(operand, Node))
        query, key, value = (self.projection(operand, node) for operand in factors)
        return self.complete(query, key, value, None, None, node)

    def complete(
        self,
        query: Node | None,
        key: Node | None,
        value: Node | None,
        scores: Node | None,
        map_: Node | None,
        context: Node,
    ) -> AttentionSite:
        """Add what lies behind the context, and the kind."""
        output, residual, stream = self.behind(context)
        if output is not None and free_unbacked_symbols(output.meta["val"].shape):
            output = None  # of some of the tokens, as values decide: one expert's projection
        kind: Literal["self", "cross"] = "self"
        if key is not None and query is not key:
            kind = self.kind(stream, query, key)
        return AttentionSite(0, 0, kind, query, key, value, scores, map_, context, output, residual, stream)

    def behind(self, context: Node) -> tuple[Node | None, Node | None, Node | None]:
        """Return the output projection, the residual add and the stream that is added, as far as there are any."""

        def is_end(user: Node) -> bool:
            return self.is_projection(user) or self.is_residual(user, context)

        def through(user: Node) -> bool:
            return self.is_transparent(user) or self.is_norm(user) or self.is_elementwise(user)

        path = self.forward(context, is_end, through)
        if not path:
            return None, None, None
        output = path[-1] if self.is_projection(path[-1]) else None
        if output is not None:
            path = self.forward(output, lambda user: self.is_residual(user, context), through)
            if not path:
                return output, None, None
        residual = path[-1]
        left, right = (item for item in residual.args[:2] if isinstance(item, Node))
        return output, residual, right if path[-2] is left else left

    def is_residual(self, node: Node, context: Node) -> bool:
        """Whether a node adds to what comes from ``context`` something that ``context`` was computed from."""
        terms = [item for item in node.args[:2] if isinstance(item, Node)]
        if (
            aten_name(node) not in ("add", "add_")
            or len(terms) < 2
            or len({rank(item) for item in terms}) > 1
        ):
            return False
        # learned queries are a stream, too, though nothing is computed in them
        return any(
            self.position[item] < self.position[context] and self.reaches(item, context) for item in terms
        )

    def kind(self, stream: Node | None, query: Node | None, key: Node) -> Literal["self", "cross"]:
        """Self-attention's keys are computed from what its queries are, with no other attention between."""
        if query is None:
            return "cross"
        start, end = self.origin(query), self.origin(key)
        if stream is not None:
            start = self.root(source_of(stream))
        same = start is end or (start in self.computed and self.reaches(start, key, self.is_attention))
        return "self" if same or self.origin(query) is end else "cross"

    def origin(self, projection: Node) -> Node:
        """Return what a projection is made from, past norms, shape ops and the projections of a low-rank chain."""
        node = self.root(source_of(projection_input(projection)))
        while self.is_projection(node) and aten_name(node) not in CONVOLUTION:
            node = self.root(source_of(projection_input(node)))
        return node

    def is_attention(self, node: Node) -> bool:
        """Whether a node mixes tokens by attention."""
        return self.is_activation_product(node) or self.is_fused(node)

    def before_dropout(self, node: Node) -> Node:
        """Return what a chain of dropouts reads."""
        while self.is_dropout(node):
            (node,) = node.all_input_nodes
        return node

    def stream_after(self, residual: Node) -> Node:
        """Return the norm after an add where every reader of the add is that one norm, else the add."""
        users = self.users(residual)
        if len(users) == 1 and (
            aten_name(users[0]) in ("layer_norm", "rms_norm") or self.is_dropout(users[0])
        ):
            return self.stream_after(users[0]) if self.is_dropout(users[0]) else users[0]
        return residual

    def layer_end(self, residual: Node) -> Node:
        """Return the residual stream leaving the layer of a block: past the feed-forward add, and its norm if any."""
        middle = self.stream_after(residual)
        end = self.next_stream_add(middle)
        if end is None:
            return middle
        # in a pre-norm tower a norm that alone reads the last add is the model's final norm, not the layer's
        return end if middle is residual else self.stream_after(end)

    def next_stream_add(self, node: Node) -> Node | None:
        """Return the next add that reads the stream itself (through dropout and shape ops) on one side."""
        path = self.forward(node, self.is_sum, self.is_transparent)
        return path[-1] if path else None


def _number(finder: _Finder, sites: list[AttentionSite]) -> list[AttentionSite]:
    """Give each site its stack and layer.

    A site continues the tower whose block its residual stream comes from. A layer has one block of each kind: a second
    one of a kind begins the next layer.
    """
    towers = Towers(finder)
    layers: list[int] = []
    kinds: list[set[str]] = []
    numbered: list[AttentionSite] = []
    for site in sites:
        start = site.stream
        if start is None and site.query is not None:
            start = projection_input(site.query)
        stack = None if start is None else towers.of(start)
        if stack is None:
            stack = len(layers)
            layers.append(0)
            kinds.append(set())
        elif site.kind in kinds[stack]:
            layers[stack] += 1
            kinds[stack] = set()
        kinds[stack].add(site.kind)
        numbered.append(replace(site, stack=stack, layer=layers[stack]))
        towers.add(site.residual or site.output or site.context, stack)
    return numbered
