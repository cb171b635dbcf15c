"""Tells which nodes' values may share memory, and what writes into a value after it was computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from ti_fx.ir.edit import aten_name, gives_its_input, written_arguments

# What may return its input itself, beside views and what writes in place.
_MAY_RETURN_INPUT = frozenset(
    ["reshape", "contiguous", "to", "detach", "alias", "flatten", "type_as", "dropout"]
)


def shares_with(node: Node) -> Node | None:
    """Return the node whose memory a node's value is, or may be; None: it is new."""
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    shares = gives_its_input(node) or aten_name(node) in _MAY_RETURN_INPUT or node.op == "call_module"
    return source if shares else None


def overwritten(node: Node) -> Iterator[Node]:
    """Yield what writes into a value in place, or into a view of it, after it was computed."""
    family, queue = {node}, [node]
    while queue:
        for user in queue.pop().users:
            if any(one in family for one in written_arguments(user)):
                yield user
            if user not in family and shares_with(user) in family:
                family.add(user)
                queue.append(user)
