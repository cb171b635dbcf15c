"""Find attention by data flow alone: no table of architectures, no names of modules.

From each softmax, forward to the context, backward to scores and projections, onward to the output projection and
the residual add. A prepared graph is read on its teacher subgraph, which no pass rewires, and mapped back to the
student through the twins.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.fx import GraphModule, Node

from ti_fx import leaves, roles
from ti_fx.dataflow import ELEMENTWISE, NORM, Walk, operands, projection_input, rank, source_of
from ti_fx.graph import aten_name

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
    prepared = any(roles.is_teacher(node) for node in gm.graph.nodes)
    finder = _Finder(gm, "teacher" if prepared else "student")
    sites = _number(finder, finder.sites())
    if not prepared:
        return sites
    student = roles.twins(gm.graph)
    return [_mapped(site, student) for site in sites]


def _mapped(site: AttentionSite, student: dict[Node, Node]) -> AttentionSite:
    """Return the site with each node replaced by its student twin."""
    nodes: dict[str, Any] = {
        name: student.get(node, node) for name, node in vars(site).items() if isinstance(node, Node)
    }
    return replace(site, **nodes)


def layer_outputs(gm: GraphModule, sites: list[AttentionSite]) -> list[Node]:
    """Return the residual stream entering each self-attention layer and leaving the last, per stack, in order.

    That is the embeddings' output (before dropout, which a teacher has not) and every layer's output (before a final
    norm, which belongs to no layer): ``X_0 .. X_L`` of the paper. Nodes of the student.
    """
    prepared = any(roles.is_teacher(node) for node in gm.graph.nodes)
    finder = _Finder(gm, "teacher" if prepared else "student")
    student = roles.twins(gm.graph)
    teacher = {node: twin for twin, node in student.items()}
    found: list[Node] = []
    for stack in sorted({site.stack for site in sites}):
        tower = [site for site in sites if site.stack == stack]
        first = {site.layer: site for site in reversed(tower)}
        found += [
            finder.before_dropout(site.stream) for _, site in sorted(first.items()) if site.stream is not None
        ]
        last = tower[-1].residual
        if last is not None:
            leaving = finder.layer_end(teacher.get(last, last))
            found.append(student.get(leaving, leaving))
    return list(dict.fromkeys(found))


def block_output(gm: GraphModule, site: AttentionSite) -> Node | None:
    """Return the residual stream after the attention block: past the norm where the block is post-norm."""
    if site.residual is None:
        return None
    prepared = any(roles.is_teacher(node) for node in gm.graph.nodes)
    finder = _Finder(gm, "teacher" if prepared else "student")
    student = roles.twins(gm.graph)
    teacher = {node: twin for twin, node in student.items()}
    after = finder.stream_after(teacher.get(site.residual, site.residual))
    return student.get(after, after)


class _Finder(Walk):
    """The attention blocks of one role."""

    def sites(self) -> list[AttentionSite]:
        found = []
        for node in list(self.gm.graph.nodes):
            if roles.role(node) != self.role:
                continue
            if aten_name(node) in ("softmax", "_softmax"):
                site = self.from_softmax(node)
            elif self.is_fused(node):
                site = self.from_fused(node)
            else:
                continue
            if site is not None:
                found.append(site)
        return found

    def from_softmax(self, node: Node) -> AttentionSite | None:
        context = self.forward(
            node,
            self.is_activation_product,
            lambda user: self.is_transparent(user) or aten_name(user) in ("mul", "add"),
        )
        if context is None:
            return None
        scores = node.args[0]
        assert isinstance(scores, Node)
        left, right = operands(context)
        from_map = self.reaches_back(left, node)
        value = self.projection(right if from_map else left)
        products = self.backward(
            scores,
            self.is_activation_product,
            lambda part: (
                self.is_transparent(part) or aten_name(part) in ELEMENTWISE or part.target is leaves.add_mask
            ),
        )
        if not products:
            return None
        value_source = None if value is None else source_of(projection_input(value))
        pairs = [tuple(self.projection(operand) for operand in operands(product)) for product in products]
        matching = [
            (query, key)
            for query, key in pairs
            if key is not None and source_of(projection_input(key)) is value_source
        ]
        query, key = (matching or pairs)[0]
        return self.complete(query, key, value, scores, node, context)

    def from_fused(self, node: Node) -> AttentionSite:
        query, key, value = (self.projection(operand) for operand in node.all_input_nodes[:3])
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
        output = self.forward(
            context, self.is_projection, lambda user: self.is_transparent(user) or aten_name(user) == "mul"
        )
        residual = stream = None
        if output is not None:
            residual = self.forward(output, self.is_residual_add, self.is_after_output)
        if residual is not None and output is not None:
            stream = self.other_operand(residual, output)
        sources = {source_of(projection_input(part)) for part in (query, key) if part is not None}
        kind: Literal["self", "cross"] = "self" if len(sources) == 1 or stream is None else self.kind(sources)
        return AttentionSite(0, 0, kind, query, key, value, scores, map_, context, output, residual, stream)

    def kind(self, sources: set[Node]) -> Literal["self", "cross"]:
        """Compare what Q and K are made from, past norms and shape ops."""
        roots = {self.root(source) for source in sources}
        return "self" if len(roots) == 1 else "cross"

    def is_after_output(self, user: Node) -> bool:
        if self.is_transparent(user) or aten_name(user) in NORM:
            return True
        return aten_name(user) in ("mul", "add", "div") and not self.is_residual_add(user)

    def is_residual_add(self, node: Node) -> bool:
        terms = [item for item in node.args[:2] if isinstance(item, Node)]
        return (
            aten_name(node) == "add"
            and len(terms) == 2
            and all(item in self.active for item in terms)
            and all(rank(item) == rank(node) for item in terms)
        )

    def other_operand(self, add: Node, output: Node) -> Node | None:
        left, right = (item for item in add.args[:2] if isinstance(item, Node))
        ours = self.forward(output, lambda user: user is add, self.is_after_output, last=True)
        assert ours is not None
        return right if ours is left else left

    def before_dropout(self, node: Node) -> Node:
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
        queue = deque([node])
        seen: set[Node] = set()
        while queue:
            part = queue.popleft()
            for user in self.users(part):
                if user in seen:
                    continue
                seen.add(user)
                if self.is_residual_add(user):
                    return user
                if self.is_transparent(user):
                    queue.append(user)
        return None


def _number(finder: _Finder, sites: list[AttentionSite]) -> list[AttentionSite]:
    """Give each site its stack and layer: a site continues the tower whose residual its own stream comes from."""
    owner: dict[Node, int] = {}
    heights: list[int] = []
    numbered: list[AttentionSite] = []
    residuals: set[Node | None] = {site.residual for site in sites if site.residual is not None}
    for site in sites:
        start = site.stream if site.stream is not None else site.query
        stack = _tower(finder, start, residuals, owner)
        if stack is None:
            stack = len(heights)
            heights.append(-1)
        if site.kind == "self" or heights[stack] < 0:
            heights[stack] += 1
        numbered.append(replace(site, stack=stack, layer=heights[stack]))
        if site.residual is not None:
            owner[site.residual] = stack
    return numbered


def _tower(
    finder: _Finder, start: Node | None, residuals: set[Node | None], owner: dict[Node, int]
) -> int | None:
    if start is None:
        return None
    queue, seen = deque([start]), {start}
    while queue:
        node = queue.popleft()
        if node in residuals:
            return owner.get(node)
        for source in node.all_input_nodes:
            if source not in seen and source in finder.active:
                seen.add(source)
                queue.append(source)
    return None
