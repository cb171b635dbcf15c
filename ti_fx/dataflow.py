"""Walks over one role's part of the graph: what projects, what only moves values, what lies up and down stream."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx import encodings, leaves, numerics, roles
from ti_fx.graph import aten_name

SHAPE = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "transpose",
        "t",
        "permute",
        "contiguous",
        "clone",
        "expand",
        "expand_as",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "narrow",
        "repeat",
        "repeat_interleave",
        "alias",
        "view_as",
        "movedim",
        "roll",
        "pad",
        "constant_pad_nd",
        "index_select",
    ]
)
CAST = frozenset(["to", "_to_copy", "type_as"])
ELEMENTWISE = frozenset(
    [
        "mul",
        "div",
        "add",
        "sub",
        "neg",
        "tanh",
        "where",
        "masked_fill",
        "clamp",
        "maximum",
        "minimum",
        "nan_to_num",
        "rsub",
        "cat",
    ]
)
NORM = frozenset(["layer_norm", "rms_norm", "group_norm", "pow", "mean", "rsqrt"])
MATMUL = frozenset(["matmul", "bmm", "mm", "einsum", "baddbmm"])
PROJECTION = frozenset(["linear", "addmm", "mm", "matmul", "conv1d", "conv2d", "convolution"])
_QUANTISERS = frozenset(
    encoding.fake_quant for encoding in encodings.ENCODINGS.values() if encoding.fake_quant
)


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


class Walk:
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
        """Return the node's readers of this role."""
        return [user for user in node.users if roles.role(user) == self.role and user.op != "output"]

    def is_dropout(self, node: Node) -> bool:
        """Whether the node is dropout."""
        return node.op == "call_module" and isinstance(self.gm.get_submodule(str(node.target)), nn.Dropout)

    def is_fused(self, node: Node) -> bool:
        """Whether the node is fused attention."""
        if node.op != "call_module":
            return False
        module = self.gm.get_submodule(str(node.target))
        module = module.leaf if isinstance(module, leaves.Frozen) else module
        return isinstance(module, leaves.ScaledDotProductAttention)

    def is_transparent(self, node: Node) -> bool:
        """Whether the node only moves or casts values, drops some out, or was inserted by a pass."""
        return (
            aten_name(node) in SHAPE | CAST
            or node.target is operator.getitem
            or is_ours(node)
            or self.is_dropout(node)
        )

    def is_projection(self, node: Node) -> bool:
        """Whether the node multiplies by a stored weight."""
        return aten_name(node) in PROJECTION and projection_weight(node) is not None

    def is_activation_product(self, node: Node) -> bool:
        """Whether the node multiplies two activations."""
        factors = operands(node)
        return (
            aten_name(node) in MATMUL and len(factors) == 2 and all(item in self.active for item in factors)
        )

    def root(self, node: Node) -> Node:
        """Return what a node is made from, past norms and shape ops."""
        while self.is_transparent(node) or aten_name(node) in NORM:
            node = node.all_input_nodes[0]
        return node

    def projection(self, operand: Node) -> Node | None:
        """Return the nearest projection upstream of an operand of an attention product."""
        found = self.backward(
            operand,
            self.is_projection,
            lambda part: self.is_transparent(part) or aten_name(part) in ELEMENTWISE | NORM,
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
        """Breadth-first over inputs: the nodes that are wanted, nearest first."""
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
        """Whether ``wanted`` is upstream of ``start``, with nothing but shape ops and scaling between."""
        return bool(
            self.backward(
                start,
                lambda node: node is wanted,
                lambda node: self.is_transparent(node) or aten_name(node) in ("mul", "add"),
                only_first=True,
            )
        )


def operands(node: Node) -> tuple[Node, ...]:
    """Return the two factors of a matrix product (baddbmm's first argument is added, not multiplied)."""
    arguments: Iterable[object] = node.args[1:3] if aten_name(node) == "baddbmm" else node.args[:2]
    if aten_name(node) == "einsum":
        arguments = node.args[1] if isinstance(node.args[1], tuple | list) else ()
    return tuple(argument for argument in arguments if isinstance(argument, Node))


def rank(node: Node) -> int:
    """Return the number of dimensions of the node's value, -1 if it is no tensor."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1
