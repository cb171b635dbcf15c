"""Let a module of the graph's own compute what depends on training or evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.errors import CaptureError
from ti_fx.ir import leaves
from ti_fx.ir.edit import aten_name, erase, replace_by_leaf
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED


@dataclass(frozen=True)
class LeafModules(Pass):
    """What train() and eval() switch is a small module (``ti_fx.ir.leaves``): the trace has frozen the mode in a flag.

    before:  %y = dropout(%x, 0.1, True)                  after:  %y = Dropout{p=0.1}(%x)

    1. dropout; one that is off in a trace in training mode is off for good, and goes
    2. scaled_dot_product_attention, for the dropout within it
    3. batch_norm; the count of its batches is its source module's own and goes
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
    value, p, is_on = node.args
    assert isinstance(value, Node)
    assert isinstance(p, float | int)
    if gm.training and not is_on:
        node.replace_all_uses_with(value)
        erase(node)
        return
    replace_by_leaf(gm, node, nn.Dropout(float(p), inplace=aten_name(node) == "dropout_"), (value,))


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
    leaf = leaves.BatchNorm(float(arguments["momentum"]), float(arguments["eps"]))
    names = ("input", "weight", "bias", "running_mean", "running_var")
    replace_by_leaf(gm, node, leaf, tuple(arguments[name] for name in names))
    for update in list(gm.graph.nodes):
        counted = update.args[0] if aten_name(update) == "add_" else None
        if isinstance(counted, Node) and str(counted.target).endswith("num_batches_tracked"):
            erase(update)


def _refuse(gm: GraphModule, node: Node) -> None:
    raise CaptureError(
        f"node {node.name} calls aten.{aten_name(node)}, whose mode is frozen by the trace; use nn.Dropout"
    )


_RULES: dict[str, Callable[[GraphModule, Node], None]] = {
    "dropout": _dropout,
    "dropout_": _dropout,
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
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
