"""Passes insert quantisers of activations and weights, detaches and blends into the student: recognised here."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.ir import roles
from ti_fx.numerics import weight_quantisers
from ti_fx.numerics.quantiser import Quantiser
from ti_fx.numerics.quantisers import BY_FUNCTION
from ti_fx.numerics.weight_quantiser import WeightQuantiser


def quantiser_of(argument: object) -> Quantiser | None:
    """Return the quantiser whose fake-quantiser a node calls; None for any other node, and for what is no node."""
    if not isinstance(argument, Node) or argument.op != "call_function":
        return None
    return BY_FUNCTION.get(argument.target)


def weight_quantiser_of(argument: object) -> WeightQuantiser | None:
    """Return the quantiser of weights that a node calls; None for any other node, and for what is no node."""
    if not isinstance(argument, Node) or argument.op != "call_function":
        return None
    return weight_quantisers.BY_FUNCTION.get(argument.target)


def reads_weight(node: Node) -> bool:
    """Whether a node gives the values of a ternary weight: quantised from the Parameter, or unpacked."""
    return node.target is numerics.unpack_ternary or weight_quantiser_of(node) is not None


def quantised_weights(gm: GraphModule) -> list[Node]:
    """Return the student's nodes that call a quantiser of weights, in graph order; the weight is the first argument."""
    return [
        node for node in gm.graph.nodes if weight_quantiser_of(node) is not None and roles.is_student(node)
    ]


DETACHES = (numerics.detach, numerics.detach_by)  # what stops a gradient: all of it, or the share of a blend


def is_ours(node: Node) -> bool:
    """Whether a node is an activation quantiser or a detach that a pass inserted."""
    passes_on = node.target in DETACHES or node.target is numerics.route
    return node.op == "call_function" and (passes_on or node.target in BY_FUNCTION)


def is_blend(node: Node) -> bool:
    """Whether a node blends a tap with the teacher's value."""
    return node.op == "call_function" and node.target is numerics.blend


def source_of(node: Node) -> Node:
    """Return what a pass's quantisers and detaches stand before: the node itself, or what they were inserted after."""
    while is_ours(node):
        node = node.all_input_nodes[0]
    return node
