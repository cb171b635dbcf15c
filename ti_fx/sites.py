"""Find attention by data flow alone: no table of architectures, no names of modules.

From each softmax, forward to the context, backward to scores and projections, onward to the output projection and
the residual add. A prepared graph is read on its teacher subgraph, which no pass rewires, and mapped back to the
student through the twins.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx import encodings, leaves, numerics, roles
from ti_fx.graph import aten_name

Point = str
POINTS: tuple[Point, ...] = ("map", "context", "output")

_SHAPE = frozenset(
    """view reshape _unsafe_view transpose t permute contiguous clone expand expand_as unsqueeze squeeze flatten
    unflatten slice select split split_with_sizes chunk unbind narrow repeat repeat_interleave alias view_as
    movedim roll pad constant_pad_nd index_select""".split()
)
_CAST = frozenset("to _to_copy type_as".split())
_ELEMENTWISE = frozenset(
    "mul div add sub neg tanh where masked_fill clamp maximum minimum nan_to_num rsub cat".split()
)
_NORM = frozenset("layer_norm rms_norm group_norm pow mean rsqrt".split())
_MATMUL = frozenset("matmul bmm mm einsum baddbmm".split())
_PROJECTION = frozenset("linear addmm mm matmul conv1d conv2d convolution".split())
_QUANTISERS = frozenset(
    encoding.fake_quant for encoding in encodings.ENCODINGS.values() if encoding.fake_quant
)


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
    return [
        replace(
            site,
            **{name: student.get(node, node) for name, node in vars(site).items() if isinstance(node, Node)},
        )
        for site in sites
    ]


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


def projection_weight(node: Node) -> Node | None:
    """Return the get_attr node of the weight that a projection reads, through its quantiser if it has one."""
    position = {"linear": 1, "addmm": 2, "mm": 1, "matmul": 1, "conv1d": 1, "conv2d": 1, "convolution": 1}
    index = position.get(aten_name(node))
    argument = node.args[index] if index is not None and index < len(node.args) else None
    while isinstance(argument, Node) and argument.op != "get_attr":
        transparent = argument.target in (numerics.ternary, encodings.unpack_ternary) or aten_name(
            argument
        ) in (
            "t",
            "transpose",
            "to",
            "_to_copy",
        )
        argument = argument.args[0] if transparent else None
    return argument if isinstance(argument, Node) else None


def projection_input(node: Node) -> Node:
    """Return the activation that a projection reads."""
    argument = node.args[1 if aten_name(node) == "addmm" else 0]
    assert isinstance(argument, Node)
    return argument


def is_ours(node: Node) -> bool:
    """Whether a node is an activation quantiser or a detach that a pass inserted."""
    return node.op == "call_function" and (node.target in _QUANTISERS or node.target is numerics.detach)


def source_of(node: Node) -> Node:
    """Return what a pass's quantisers and detaches stand before: the node itself, or what they were inserted after."""
    while is_ours(node):
        (argument,) = node.all_input_nodes
        node = argument
    return node


class _Finder:
    """One walk over the nodes of one role; every search stops at the neighbouring block, so the cost is linear."""

    def __init__(self, gm: GraphModule, role: roles.Role) -> None:
        self.gm = gm
        self.role = role
        self.active = self._depends_on_input()

    def _depends_on_input(self) -> set[Node]:
        active: set[Node] = set()
        for node in self.gm.graph.nodes:
            if roles.role(node) not in (self.role, "shared"):
                continue
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt | int):
                continue
            if node.op == "placeholder" or any(source in active for source in node.all_input_nodes):
                active.add(node)
        return active

    def users(self, node: Node) -> list[Node]:
        return [user for user in node.users if roles.role(user) == self.role and user.op != "output"]

    def is_dropout(self, node: Node) -> bool:
        return node.op == "call_module" and isinstance(self.gm.get_submodule(node.target), nn.Dropout)

    def is_fused(self, node: Node) -> bool:
        if node.op != "call_module":
            return False
        module = self.gm.get_submodule(node.target)
        module = module.leaf if isinstance(module, leaves.Frozen) else module
        return isinstance(module, leaves.ScaledDotProductAttention)

    def is_transparent(self, node: Node) -> bool:
        return (
            aten_name(node) in _SHAPE | _CAST
            or node.target is operator.getitem
            or is_ours(node)
            or self.is_dropout(node)
        )

    def is_projection(self, node: Node) -> bool:
        return aten_name(node) in _PROJECTION and projection_weight(node) is not None

    def is_activation_product(self, node: Node) -> bool:
        operands = _operands(node)
        return (
            aten_name(node) in _MATMUL
            and len(operands) == 2
            and all(item in self.active for item in operands)
        )

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
        left, right = _operands(context)
        from_map = self.reaches_back(left, node)
        value = self.projection(right if from_map else left)
        products = self.backward(
            scores,
            self.is_activation_product,
            lambda part: (
                self.is_transparent(part) or aten_name(part) in _ELEMENTWISE or part.target is leaves.add_mask
            ),
        )
        if not products:
            return None
        value_source = None if value is None else source_of(projection_input(value))
        pairs = [tuple(self.projection(operand) for operand in _operands(product)) for product in products]
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

    def root(self, node: Node) -> Node:
        while self.is_transparent(node) or aten_name(node) in _NORM:
            node = node.all_input_nodes[0]
        return node

    def is_after_output(self, user: Node) -> bool:
        if self.is_transparent(user) or aten_name(user) in _NORM:
            return True
        return aten_name(user) in ("mul", "add", "div") and not self.is_residual_add(user)

    def is_residual_add(self, node: Node) -> bool:
        operands = [item for item in node.args[:2] if isinstance(item, Node)]
        return (
            aten_name(node) == "add"
            and len(operands) == 2
            and all(item in self.active for item in operands)
            and all(_rank(item) == _rank(node) for item in operands)
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

    def projection(self, operand: Node) -> Node | None:
        found = self.backward(
            operand,
            self.is_projection,
            lambda part: self.is_transparent(part) or aten_name(part) in _ELEMENTWISE | _NORM,
            only_first=True,
        )
        return found[0] if found else None

    def forward(
        self, start: Node, wanted: Callable[[Node], bool], through: Callable[[Node], bool], last: bool = False
    ) -> Node | None:
        """Breadth-first over users; ``last`` returns the node before the one that was wanted."""
        queue, seen = deque([start]), {start}
        while queue:
            node = queue.popleft()
            for user in self.users(node):
                if user in seen:
                    continue
                seen.add(user)
                if wanted(user):
                    return node if last else user
                if through(user):
                    queue.append(user)
        return None

    def backward(
        self,
        start: Node,
        wanted: Callable[[Node], bool],
        through: Callable[[Node], bool],
        only_first: bool = False,
    ) -> list[Node]:
        queue, seen, found = deque([start]), {start}, []
        while queue:
            node = queue.popleft()
            if wanted(node):
                found.append(node)
                if only_first:
                    break
            elif node in self.active and through(node):
                for source in node.all_input_nodes:
                    if source not in seen:
                        seen.add(source)
                        queue.append(source)
        return found

    def reaches_back(self, start: Node, wanted: Node) -> bool:
        return bool(
            self.backward(
                start,
                lambda node: node is wanted,
                lambda node: self.is_transparent(node) or aten_name(node) in ("mul", "add"),
                only_first=True,
            )
        )


def _number(finder: _Finder, sites: list[AttentionSite]) -> list[AttentionSite]:
    """Give each site its stack and layer: a site continues the tower whose residual its own stream comes from."""
    owner: dict[Node, int] = {}
    heights: list[int] = []
    numbered: list[AttentionSite] = []
    residuals = {site.residual for site in sites if site.residual is not None}
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


def _operands(node: Node) -> tuple[Node, ...]:
    """Return the two factors of a matrix product (baddbmm's first argument is added, not multiplied)."""
    arguments: Iterable[object] = node.args[1:3] if aten_name(node) == "baddbmm" else node.args[:2]
    if aten_name(node) == "einsum":
        arguments = node.args[1] if isinstance(node.args[1], tuple | list) else ()
    return tuple(argument for argument in arguments if isinstance(argument, Node))


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1
