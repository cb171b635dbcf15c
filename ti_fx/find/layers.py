"""Find layers by the residual stream that each reads and leaves: what lies between is the layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ti_fx.errors import PreconditionError
from ti_fx.find.attention import find_attention, layer_inputs, streams
from ti_fx.find.walk import is_float
from ti_fx.ir import roles
from ti_fx.ir.edit import ancestors


@dataclass(frozen=True)
class Layer:
    """One layer of a stack.

    Attributes:
        stack, number: as in AttentionSite.
        start: the stream that it reads, before dropout.
        end: the stream that it leaves.
        nodes: the student's, computed from ``start`` and leading to ``end``, both excepted.
        is_last: whether no layer of the stack follows.
    """

    stack: int
    number: int
    start: Node
    end: Node
    nodes: frozenset[Node]
    is_last: bool

    @property
    def where(self) -> str:
        """Say which layer this is: ``stack 0, layer 3``."""
        return f"stack {self.stack}, layer {self.number}"

    def read_outside(self) -> Iterator[tuple[Node, Node]]:
        """Yield what is computed within the layer and read elsewhere, with its reader."""
        for node in sorted(self.nodes):
            for user in node.users:
                inside = user in self.nodes or user is self.end
                if is_float(node) and not inside and (roles.is_student(user) or user.op == "output"):
                    yield node, user


def find_layers(gm: GraphModule) -> list[Layer]:
    """Return every layer of every stack of attention blocks, in order.

    Raises:
        PreconditionError: a layer can't be told apart from its neighbours; names it.
    """
    sites = find_attention(gm)
    starts, found = layer_inputs(gm, sites), list[Layer]()
    for stack, stream in streams(gm, sites).items():
        own = [start for (one, _), start in starts.items() if one == stack]
        ends = [*own[1:], stream[-1] if len(stream) == len(own) + 1 else None]
        for number, (start, end) in enumerate(zip(own, ends, strict=True)):
            nodes = _between(start, end) if start is not None and end is not None else frozenset()
            if start is None or end is None or not nodes:
                raise PreconditionError(
                    f"stack {stack}, layer {number}: no residual stream that it alone reads and leaves, by which it "
                    "could be told from the layers beside it; keep all layers of this stack"
                )
            if str(start.meta["val"].shape) != str(end.meta["val"].shape):
                raise PreconditionError(
                    f"stack {stack}, layer {number} makes {tuple(end.meta['val'].shape)} of "
                    f"{tuple(start.meta['val'].shape)}, so none can be left out; keep all layers of this stack"
                )
            found.append(Layer(stack, number, start, end, nodes, end is ends[-1]))
    return found


def _between(start: Node, end: Node) -> frozenset[Node]:
    """Return the student's nodes that are computed from one node and lead to another; none if that does not."""
    before = ancestors([end], stop=lambda node: node is start)
    if start not in before:
        return frozenset()
    inside: set[Node] = set()
    queue = [start]
    while queue:
        for user in queue.pop().users:
            if user in before and user not in inside:
                inside.add(user)
                queue.append(user)
    return frozenset(node for node in inside - {end} if roles.is_student(node))
