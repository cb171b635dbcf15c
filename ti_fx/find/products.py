"""The products of a ternary weight are found: what each reads, what its teacher gives, its bias and its residual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.find.walk import CAST, SHAPE, projection_weight
from ti_fx.find.weights import projections
from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name, tensor
from ti_fx.ir.inserted import quantised_weights
from ti_fx.ir.leaves import is_dropout


@dataclass(frozen=True)
class Product:
    """One linear projection by a ternary weight.

    Attributes:
        node: the student's projection.
        source: the activation that it multiplies.
        teacher: the teacher's projection.
        transposed: whether the stored weight is ``(inputs, outputs)``.
        bias: the node that reads its bias; None if it has none.
        residual: the student's value that is added to the result, and the teacher's sum; None if nothing is.
    """

    node: Node
    source: Node
    teacher: Node
    transposed: bool
    bias: Node | None
    residual: tuple[Node, Node] | None


@dataclass(frozen=True)
class TernaryWeight:
    """A weight that the student reads through a ternary quantiser.

    Attributes:
        weight: the node that reads the Parameter.
        quantiser: the node that makes it ternary.
        products: in graph order; empty where something keeps it from being seen as products alone.
        reason: what that is.
    """

    weight: Node
    quantiser: Node
    products: tuple[Product, ...]
    reason: str = ""


def ternary_weights(gm: GraphModule) -> list[TernaryWeight]:
    """Return every ternary weight of the student, by its first product, in graph order; then those without products."""
    teachers = roles.twin_of(gm.graph)
    multiplied: dict[Node, list[Node]] = {}
    for node in projections(gm):
        if (weight := projection_weight(node)) is not None:
            multiplied.setdefault(weight, []).append(node)
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    found = []
    for quantiser in quantised_weights(gm):
        weight = quantiser.all_input_nodes[0]
        nodes = multiplied.get(weight, [])
        reason = _reason(gm, quantiser, nodes, teachers)
        products = () if reason else tuple(_product(gm, node, teachers) for node in nodes)
        found.append(TernaryWeight(weight, quantiser, products, reason))
    return sorted(found, key=lambda one: position[one.products[0].node] if one.products else len(position))


def _reason(gm: GraphModule, quantiser: Node, nodes: list[Node], teachers: Mapping[Node, Node]) -> str:
    """Say why a weight can't be calibrated by its products."""
    readers = _readers(quantiser)
    if any(aten_name(reader) == "embedding" for reader in readers):
        return "a word embedding" + (", tied to a projection" if nodes else "")
    others = [reader for reader in readers if reader not in nodes]
    if others or not nodes:
        return f"read by {aten_name(others[0]) or others[0].target}" if others else "no product reads it"
    for node in nodes:
        if node not in teachers:
            return "the teacher has no such product"
        if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
            return "its product is scaled"
    biases = {_bias(node) for node in nodes}
    if len(biases) > 1 or any(bias is not None and bias.op != "get_attr" for bias in biases):
        return "its products have several biases, or one that is computed"
    if not isinstance(tensor(gm, str(quantiser.all_input_nodes[0].target)), nn.Parameter):
        return "a buffer"
    return ""


def _readers(quantiser: Node) -> list[Node]:
    """Return who computes with a quantised weight, past casts and transposes."""
    found: list[Node] = []
    queue = list(quantiser.users)
    while queue:
        node = queue.pop()
        if roles.role(node) != "student":
            continue
        if aten_name(node) in CAST | SHAPE:
            queue += list(node.users)
        else:
            found.append(node)
    return found


def _product(gm: GraphModule, node: Node, teachers: Mapping[Node, Node]) -> Product:
    name = aten_name(node)
    first = 1 if name == "addmm" else 0
    source, factor = node.args[first], node.args[first + 1]
    assert isinstance(source, Node)
    assert isinstance(factor, Node)
    weight = projection_weight(node)
    assert weight is not None
    is_moved = factor.meta["val"].stride() != weight.meta["val"].stride()
    return Product(
        node,
        source,
        teachers[node],
        transposed=is_moved if name == "linear" else not is_moved,
        bias=_bias(node),
        residual=_residual(gm, node, teachers),
    )


def _bias(node: Node) -> Node | None:
    name = aten_name(node)
    bias = (
        node.args[0] if name == "addmm" else node.args[2] if name == "linear" and len(node.args) > 2 else None
    )
    return bias if isinstance(bias, Node) else None


def _residual(gm: GraphModule, node: Node, teachers: Mapping[Node, Node]) -> tuple[Node, Node] | None:
    """Return what is added to a projection's result, and the teacher's sum; only views and dropout lie between."""
    at = node
    while len(users := [user for user in at.users if roles.is_student(user)]) == 1:
        (user,) = users
        if aten_name(user) in ("add", "add_"):
            terms = user.args[:2]
            other = terms[1] if terms[0] is at else terms[0]
            fits = isinstance(other, Node) and user in teachers and user.kwargs.get("alpha", 1) == 1
            if not fits or not isinstance(other, Node) or other is at:
                return None
            same = [str(size) for size in other.meta["val"].shape] == [
                str(size) for size in user.meta["val"].shape
            ]
            return (other, teachers[user]) if same and roles.is_student(other) else None
        if not (is_dropout(gm, user) or aten_name(user) in ("view", "reshape", "_unsafe_view", "clone")):
            return None
        at = user
    return None
