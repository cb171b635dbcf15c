"""Passes insert activation quantisers and detaches into the student, which are recognised here."""

from __future__ import annotations

from torch.fx import Node

from ti_fx import numerics
from ti_fx.numerics import encodings

_QUANTISERS = frozenset(
    encoding.fake_quant for encoding in encodings.ENCODINGS.values() if encoding.fake_quant
)


def is_ours(node: Node) -> bool:
    """Whether a node is an activation quantiser or a detach that a pass inserted."""
    return node.op == "call_function" and (node.target in _QUANTISERS or node.target is numerics.detach)


def source_of(node: Node) -> Node:
    """Return what a pass's quantisers and detaches stand before: the node itself, or what they were inserted after."""
    while is_ours(node):
        (argument,) = node.all_input_nodes
        node = argument
    return node
