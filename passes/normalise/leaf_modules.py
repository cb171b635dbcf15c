"""Let a module of the graph's own compute what depends on training or evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.errors import CaptureError
from ti_fx.ir import leaves
from ti_fx.ir.edit import aten_name, erase, get_attr, replace_by_leaf
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED

# The momentum that a trace sees where there is none and all batches count alike: no model has it.
AVERAGE = -1.0
_NORMALISED = ("input", "weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class LeafModules(Pass):
    """What train() and eval() switch is a small module (``ti_fx.ir.leaves``): the trace has frozen the mode in a flag.

    before:  %y = dropout(%x, 0.1, True)                  after:  %y = Dropout{p=0.1}(%x)

    1. dropout; one that is off in a trace in training mode is off for good, and goes
    2. scaled_dot_product_attention, for the dropout within it
    3. batch_norm and instance_norm with running statistics, and the count of batches; one that has stopped for good in
       a trace in training mode stays as it is
    4. any other operator that has a flag for the mode is refused
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Replace each such call, in graph order.

        Raises:
            CaptureError: an operator of another kind follows the mode; names the node.
        """
        for node in list(gm.graph.nodes):
            replace = _RULES.get(aten_name(node))
            if replace is not None:
                replace(gm, node)


def _dropout(gm: GraphModule, node: Node) -> None:
    arguments: tuple[Any, ...] = node.args
    value, probability, active = arguments[:3]
    if gm.training and not active:
        node.replace_all_uses_with(value)
        erase(node)
        return
    leaf = nn.Dropout(float(probability), inplace=aten_name(node) == "dropout_")
    replace_by_leaf(gm, node, leaf, (value,))


def _attention(gm: GraphModule, node: Node) -> None:
    arguments = _bound(node)
    leaf = leaves.ScaledDotProductAttention(
        float(arguments["dropout_p"]),
        arguments["is_causal"],
        arguments["scale"],
        arguments["enable_gqa"],
    )
    operands = (arguments["query"], arguments["key"], arguments["value"], arguments["attn_mask"])
    node._rename("attention")
    replace_by_leaf(gm, node, leaf, operands if operands[3] is not None else operands[:3])


def _batch_norm(gm: GraphModule, node: Node) -> None:
    arguments = _bound(node)
    if gm.training and not arguments["training"]:
        return
    momentum = float(arguments["momentum"])
    leaf = leaves.BatchNorm(None if momentum == AVERAGE else momentum, float(arguments["eps"]))
    operands = [arguments[name] for name in _NORMALISED]
    count = _count_of_batches(gm, arguments["running_mean"])
    replace_by_leaf(gm, node, leaf, (*operands, count) if count is not None else tuple(operands))


def _count_of_batches(gm: GraphModule, mean: Any) -> Node | None:
    """Return the read of the count beside a running mean, which its leaf moves; None if there is none."""
    if not isinstance(mean, Node) or mean.op != "get_attr":
        return None
    target = f"{str(mean.target).rpartition('.')[0]}.num_batches_tracked".removeprefix(".")
    if not gm.training:
        return get_attr(mean, target) if target in dict(gm.named_buffers()) else None
    for count in [node for node in gm.graph.find_nodes(op="get_attr") if node.target == target]:
        updates = _updates(count)
        for update in reversed(updates):
            erase(update)
        if updates or any(user.op == "call_module" for user in count.users):
            return count
    return None


def _updates(count: Node) -> list[Node]:
    """Return what adds to a count in place: a norm that is called twice adds to what the first call gave."""
    found = [user for user in count.users if aten_name(user) == "add_"]
    return found + [later for one in found for later in _updates(one)]


def _instance_norm(gm: GraphModule, node: Node) -> None:
    arguments = _bound(node)
    stops = gm.training and not arguments["use_input_stats"]
    if arguments["running_mean"] is None or stops:
        return
    leaf = leaves.InstanceNorm(float(arguments["momentum"]), float(arguments["eps"]))
    replace_by_leaf(gm, node, leaf, tuple(arguments[name] for name in _NORMALISED))


def _refuse(gm: GraphModule, node: Node) -> None:
    raise CaptureError(
        f"node {node.name} calls aten.{aten_name(node)}, whose mode is frozen by the trace; use nn.Dropout"
    )


_RULES: dict[str, Callable[[GraphModule, Node], None]] = {
    "dropout": _dropout,
    "dropout_": _dropout,
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    **dict.fromkeys(("native_dropout", "alpha_dropout", "feature_dropout", "rrelu"), _refuse),
}


def _bound(node: Node) -> dict[str, Any]:
    """Return an ATen call's arguments by name, defaults included."""
    values: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if index < len(node.args):
            values[argument.name] = node.args[index]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values
