"""A Walk follows one role's nodes up and down the graph, past what only moves values, to what projects."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.ir import leaves, roles
from ti_fx.ir.edit import aten_name
from ti_fx.ir.inserted import is_blend, is_ours, reads_weight, weight_quantiser_of


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SHAPE = _names(
    """view reshape _unsafe_view transpose t permute contiguous clone expand expand_as unsqueeze squeeze flatten
    unflatten slice select split split_with_sizes chunk unbind narrow repeat repeat_interleave tile alias view_as
    reshape_as movedim moveaxis swapaxes swapdims roll pad constant_pad_nd index_select index gather as_strided
    unfold diagonal flip T numpy_T mT detach lift_fresh_copy stack"""
)
CAST = _names("to _to_copy type_as float")
WEIGHT_VIEWS = CAST | _names(
    "t transpose T numpy_T permute"
)  # what may lie between a weight and its projection
ELEMENTWISE = _names(
    """mul mul_ div div_ add add_ sub sub_ neg rsub cat concat tanh tanh_ where masked_fill masked_fill_ clamp clamp_
    clamp_min clamp_max maximum minimum max min nan_to_num masked_scatter index_put index_put_ scatter copy_
    slice_scatter select_scatter exp exp_ log sigmoid relu softplus"""
)
NORM = _names(
    "layer_norm rms_norm group_norm pow mean rsqrt linalg_vector_norm norm native_layer_norm instance_norm batch_norm"
)
_SPREAD = _names("rsqrt sqrt linalg_vector_norm norm clamp_min")  # what a written-out norm divides by
POOL = _names(
    "max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool2d interpolate upsample_nearest2d amax"
)
MATMUL = _names("matmul bmm mm einsum baddbmm")
CONVOLUTION = _names("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d")
PROJECTION = _names("linear addmm") | MATMUL | CONVOLUTION
SOFTMAX = _names("softmax _softmax _safe_softmax")
# What a walk towards a projection must not follow: rotary tables, look-ups, another attention's map.
_ENDS = _names("cos sin embedding arange cumsum topk argmax sort polar outer") | SOFTMAX


def projection_weight(node: Node) -> Node | None:
    """Return the get_attr node of the weight that a projection reads, through its quantiser if it has one."""
    chain = _weight_chain(node)
    return chain[-1] if chain and chain[-1].op == "get_attr" else None


def reads_ternary(node: Node) -> bool:
    """Whether a projection reads its weight through a ternary quantiser."""
    return any(weight_quantiser_of(part) is not None for part in _weight_chain(node))


def _weight_chain(node: Node) -> list[Node]:
    """Return the weight operand of a projection, and what it is moved, cast or quantised from, to the stored tensor."""
    name = aten_name(node)
    if name not in PROJECTION:
        return []
    index = 2 if name in ("addmm", "baddbmm") else 1
    factors = operands(node)
    argument = factors[-1] if name == "einsum" else node.args[index] if index < len(node.args) else None
    chain: list[Node] = []
    while isinstance(argument, Node):
        chain.append(argument)
        passed = reads_weight(argument) or aten_name(argument) in WEIGHT_VIEWS
        argument = argument.args[0] if passed else None
    return chain


def projection_input(node: Node) -> Node:
    """Return the activation that a projection reads."""
    argument = operands(node)[0]
    return argument


def before_moves(node: Node) -> Node:
    """Return what a chain of nodes that only move or cast values begins with."""
    while aten_name(node) in SHAPE | CAST and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def is_float(node: Node) -> bool:
    """Whether the node's value is a floating-point tensor, or several values of which the first is."""
    value = node.meta.get("val")
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return isinstance(value, torch.Tensor) and value.is_floating_point()


class Walk:
    """Walks over the nodes of one role; every search stops at the neighbouring block, so the cost is linear.

    Attributes:
        position: each node's place in the graph.
        stored: what is made from stored tensors, and no input. bare: stored tensors that are only moved or cast (a
            weight; the learned queries of a pooling layer). computed: what is made from inputs, or computed from
            stored tensors.
    """

    def __init__(self, gm: GraphModule, role: roles.Role) -> None:
        self.gm = gm
        self.role = role
        self.position: dict[Node, int] = {}
        self.active: set[Node] = set()
        self.computed: set[Node] = set()
        self.stored: set[Node] = set()
        self.bare: set[Node] = set()
        for position, node in enumerate(gm.graph.nodes):
            self.position[node] = position
            if roles.role(node) in (role, "shared") and not _is_size(node):
                self._classify(node)

    def _classify(self, node: Node) -> None:
        sources = node.all_input_nodes
        if node.op == "placeholder" or any(source in self.active for source in sources):
            self.active.add(node)
            self.computed.add(node)
        elif node.op == "get_attr" or any(source in self.stored for source in sources):
            self.stored.add(node)
            if node.op == "get_attr" or (self.is_view(node) and sources[0] in self.bare):
                self.bare.add(node)
            else:
                self.computed.add(node)

    def users(self, node: Node) -> list[Node]:
        """Return the node's readers of this role."""
        return [user for user in node.users if roles.role(user) == self.role and user.op != "output"]

    def module(self, node: Node) -> nn.Module | None:
        """Return the leaf module that a node calls, past the teacher's wrapper."""
        if node.op != "call_module":
            return None
        module = self.gm.get_submodule(str(node.target))
        return module.leaf if isinstance(module, leaves.Frozen) else module

    def is_dropout(self, node: Node) -> bool:
        """Whether the node is dropout."""
        return isinstance(self.module(node), nn.Dropout)

    def is_fused(self, node: Node) -> bool:
        """Whether the node is fused attention."""
        return isinstance(self.module(node), leaves.ScaledDotProductAttention)

    def is_view(self, node: Node) -> bool:
        """Whether the node moves or casts values and computes none."""
        return aten_name(node) in SHAPE | CAST or node.target is operator.getitem or reads_weight(node)

    def is_transparent(self, node: Node) -> bool:
        """Whether the node only moves or casts values, drops some out, or was inserted by a pass."""
        return self.is_view(node) or is_ours(node) or is_blend(node) or self.is_dropout(node)

    def is_norm(self, node: Node) -> bool:
        """Whether the node is a norm, or a part of one that is written out."""
        if aten_name(node) in NORM or isinstance(self.module(node), leaves.BatchNorm | leaves.InstanceNorm):
            return True
        return aten_name(node) in ("mul", "div") and any(
            aten_name(self.before_views(part)) in _SPREAD for part in node.all_input_nodes
        )

    def before_views(self, node: Node) -> Node:
        """Return what a chain of views and casts begins with."""
        while self.is_view(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def mixes_alike(self, node: Node) -> bool:
        """Whether a projection gives as many features as it takes: what may mix the heads of a map."""
        shape = operands(node)[1].meta["val"].shape
        return len(shape) == 2 and bool(shape[0] == shape[1])

    def is_elementwise(self, node: Node) -> bool:
        """Whether the node computes each entry from the same entry of its inputs."""
        return aten_name(node) in ELEMENTWISE or node.target in (
            leaves.add_mask,
            leaves.zero_masked_rows,
        )

    def is_projection(self, node: Node) -> bool:
        """Whether the node multiplies by a stored weight, or by one made from stored tensors (weight norm)."""
        if aten_name(node) not in PROJECTION:
            return False
        factors = operands(node)
        return len(factors) == 2 and factors[1] in (self.bare if aten_name(node) in MATMUL else self.stored)

    def is_activation_product(self, node: Node) -> bool:
        """Whether the node multiplies two activations; one of them may be computed from stored tensors alone."""
        factors = operands(node)
        return (
            aten_name(node) in MATMUL
            and len(factors) == 2
            and all(item in self.computed and is_float(item) for item in factors)
        )

    def is_query_product(self, node: Node) -> bool:
        """Whether the node multiplies stored queries, as they are, by an activation."""
        factors = operands(node)
        return (
            aten_name(node) in MATMUL
            and len(factors) == 2
            and factors[0] in self.bare
            and factors[1] in self.active
        )

    def is_sum(self, node: Node) -> bool:
        """Whether the node adds two values of one rank, no bias: a residual add, or a sum of branches."""
        terms = [item for item in node.args[:2] if isinstance(item, Node)]
        return (
            aten_name(node) in ("add", "add_")
            and len(terms) == 2
            and any(item in self.computed for item in terms)
            and all(item not in self.bare and rank(item) == rank(node) for item in terms)
        )

    def forward(
        self, start: Node, wanted: Callable[[Node], bool], through: Callable[[Node], bool]
    ) -> list[Node]:
        """Breadth-first over users: the path from ``start`` to the nearest node that is wanted, [] if there is none."""
        queue, before = deque([start]), {start: start}
        while queue:
            node = queue.popleft()
            for user in self.users(node):
                if user in before:
                    continue
                before[user] = node
                if wanted(user):
                    return _path(user, before)
                if through(user):
                    queue.append(user)
        return []

    def backward(
        self, start: Node, wanted: Callable[[Node], bool], through: Callable[[Node], bool]
    ) -> list[Node]:
        """Breadth-first over inputs: the nodes that are wanted, nearest first."""
        queue, seen, found = deque([start]), {start}, []
        while queue:
            node = queue.popleft()
            if wanted(node):
                found.append(node)
            elif through(node):
                fresh = [source for source in node.all_input_nodes if source not in seen]
                seen.update(fresh)
                queue.extend(fresh)
        return found

    def reaches(self, ancestor: Node, node: Node, stop: Callable[[Node], bool] = lambda node: False) -> bool:
        """Whether ``node`` depends on ``ancestor``; a node for which ``stop`` holds is not passed.

        Looks at what lies between the two in the graph's order, so the cost is that of the distance.
        """
        first = self.position[ancestor]
        return bool(
            self.backward(
                node,
                lambda part: part is ancestor,
                lambda part: self.position[part] > first and (part is node or not stop(part)),
            )
        )

    def projection(self, operand: Node, product: Node) -> Node | None:
        """Return the projection that makes an operand of an attention product, None if it is not projected.

        The nearest one upstream from which nothing but attention is computed: what goes on to another projection is
        a part of a longer chain (low-rank projections), or another block.
        """
        candidates = self.backward(
            operand,
            self.is_projection,
            lambda part: (
                is_float(part)
                and part not in self.bare
                and aten_name(part) not in _ENDS
                and not self.is_activation_product(part)
            ),
        )
        return next((node for node in candidates if not self._feeds_projection(node, product)), None)

    def _feeds_projection(self, start: Node, product: Node) -> bool:
        last = self.position[product]
        # a product with a stored table (relative positions) is a part of the scores
        return bool(
            self.forward(
                start,
                lambda user: self.is_projection(user) and aten_name(user) not in MATMUL,
                lambda user: self.position[user] < last and not self.is_activation_product(user),
            )
        )

    def root(self, node: Node) -> Node:
        """Return what a node is made from, past norms, pooling, shape ops, biases and factors."""
        while True:
            sources = [part for part in node.all_input_nodes if part in self.computed and is_float(part)]
            if self.is_norm(node):
                sources = [part for part in sources if aten_name(self.before_views(part)) not in _SPREAD]
            moves = self.is_transparent(node) or self.is_norm(node) or aten_name(node) in POOL
            if not sources or not (moves or (self.is_elementwise(node) and len(sources) == 1)):
                return node
            node = sources[0]


def _path(end: Node, before: dict[Node, Node]) -> list[Node]:
    path = [end]
    while before[path[-1]] is not path[-1]:
        path.append(before[path[-1]])
    return path[::-1]


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def operands(node: Node) -> tuple[Node, ...]:
    """Return the two factors of a matrix product, in the order written; of an einsum, a stored one last."""
    name = aten_name(node)
    # what baddbmm and addmm take first is added, not multiplied
    arguments: Iterable[object] = node.args[1:3] if name in ("baddbmm", "addmm") else node.args[:2]
    if name == "einsum":
        factors = node.args[1] if isinstance(node.args[1], tuple | list) else ()
        stored_first = len(factors) == 2 and isinstance(factors[0], Node) and factors[0].op == "get_attr"
        arguments = reversed(factors) if stored_first else factors
    return tuple(argument for argument in arguments if isinstance(argument, Node))


def rank(node: Node) -> int:
    """Return the number of dimensions of the node's value, -1 if it is no tensor."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1
