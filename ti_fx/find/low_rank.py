"""A low-rank adapter is found by data flow: two projections in a row, through few features, beside a layer's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch.fx import GraphModule, Node

from ti_fx.find.walk import Walk, projection_input, projection_weight
from ti_fx.ir.edit import aten_name

_SCALES = ("mul", "mul_", "div", "div_")
_SUMS = ("add", "add_")
_OF_WEIGHT = {"linear": 1, "mm": 1, "matmul": 1, "embedding": 0}  # which argument is the weight


def low_rank_adapters(gm: GraphModule, projections: list[Node]) -> dict[Node, str]:
    """Return the weights of low-rank adapters (LoRA), each with the name of the weight that it is added to.

    before:  %base = linear(%x, %w)                  w: [out, in]
             %few = linear(%x, %a)                   a: [rank, in], past dropout and casts
             %more = linear(%few, %b)                b: [out, rank]
             %y = add(%base, mul(%more, scale))      rank · (in + out) < in · out

    The layer and the first projection may be look-ups of the same indices, too.

    Args:
        gm: a captured or prepared graph.
        projections: the student's.
    """
    walk = Walk(gm, "student")
    found: dict[Node, str] = {}
    for up in projections:
        down = _origin(walk, projection_input(up))
        outer, inner = projection_weight(up), _weight(walk, down)
        if outer is None or inner is None or down is up:
            continue
        base = next(_bases(walk, up, down), None)
        if base is not None and _is_low_rank(up, down, inner):
            found |= {inner: base, outer: base}
    return found


def makes_weight(product: Node, constant: Collection[Node]) -> bool:
    """Whether a product of stored tensors is, or is added to, the weight of a layer: an adapter within the weight.

    Args:
        product: a node.
        constant: the nodes that are computed from stored tensors alone.
    """
    if product not in constant:
        return False
    queue, seen = [product], {product}
    for node in queue:
        for user in node.users:
            if user in constant:
                queue += [] if user in seen else [user]
                seen.add(user)
            elif _is_weight(node, user):
                return True
    return False


def _is_weight(node: Node, user: Node) -> bool:
    """Whether a layer reads a matrix as its weight."""
    index = _OF_WEIGHT.get(aten_name(user))
    return index is not None and user.args[index] is node and node.meta["val"].dim() == 2


def _weight(walk: Walk, node: Node) -> Node | None:
    """Return the stored tensor that a projection or a look-up reads, through its quantiser if it has one."""
    if aten_name(node) != "embedding":
        return projection_weight(node)
    table = walk.before_views(node.all_input_nodes[0])
    return table if table.op == "get_attr" else None


def _input(node: Node) -> Node:
    if aten_name(node) != "embedding":
        return projection_input(node)
    indices = node.args[1]
    assert isinstance(indices, Node)
    return indices


def _is_low_rank(up: Node, down: Node, inner: Node) -> bool:
    """Whether the two matrices have fewer entries than the one that they stand for."""
    rank, wide = down.meta["val"].shape[-1], up.meta["val"].shape[-1]
    taken = inner.meta["val"].numel() // rank
    return bool(rank * (taken + wide) < taken * wide)


def _bases(walk: Walk, up: Node, down: Node) -> Iterator[str]:
    """Yield the names of the weights, of what the adapter's own input goes through, that its result is added to."""
    source = _root(walk, _input(down))
    total = walk.forward(
        up,
        lambda user: aten_name(user) in _SUMS,
        lambda user: walk.is_transparent(user) or aten_name(user) in _SCALES,
    )
    if not total:
        return
    (*_, before, end) = total
    others = [term for term in end.all_input_nodes if term is not before]
    queue, seen = others, set(others)
    while queue:
        node = queue.pop()
        weight = _weight(walk, node)
        if weight is not None and node is not down:
            if _root(walk, _input(node)) is source:
                yield str(weight.target)
            continue
        passes = walk.is_transparent(node) or aten_name(node) in (*_SCALES, *_SUMS)
        # what comes before the layer's input can't be the layer
        fresh = [
            part
            for part in (node.all_input_nodes if passes else ())
            if part not in seen and walk.position.get(part, -1) > walk.position[source]
        ]
        seen.update(fresh)
        queue += fresh


def _origin(walk: Walk, node: Node) -> Node:
    """Return what a value is made from, past what moves or drops values and factors that are no projection."""
    while True:
        node = _root(walk, node)
        if aten_name(node) not in _SCALES or not isinstance(node.args[0], Node):
            return node
        node = node.args[0]


def _root(walk: Walk, node: Node) -> Node:
    while walk.is_transparent(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
