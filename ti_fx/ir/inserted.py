"""Passes insert activation quantisers and detaches into the student, which are recognised here."""

from __future__ import annotations

from torch.fx import Node

from ti_fx import numerics
from ti_fx.numerics.quantiser import Quantiser
from ti_fx.numerics.quantisers import BY_FUNCTION


def quantiser_of(argument: object) -> Quantiser | None:
    """Return the quantiser whose fake-quantiser a node calls; None for any other node, and for what is no node."""
    if not isinstance(argument, Node) or argument.op != "call_function":
        return None
    return BY_FUNCTION.get(argument.target)


def is_ours(node: Node) -> bool:
    """Whether a node is an activation quantiser or a detach that a pass inserted."""
    return node.op == "call_function" and (node.target is numerics.detach or node.target in BY_FUNCTION)


def source_of(node: Node) -> Node:
    """Return what a pass's quantisers and detaches stand before: the node itself, or what they were inserted after."""
    while is_ours(node):
        (argument,) = node.all_input_nodes
        node = argument
    return node
