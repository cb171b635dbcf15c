"""A residual sum is kept apart from the norm that reads it, which ONNX Runtime would fuse into a slower node."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.ir.edit import aten_name
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.passes.lower import operators


@dataclass(frozen=True)
class KeepSumsApart(Pass):
    """The sum of two tensors before a layer norm is written as ONNX Sum (see ``operators.sum_for_norm``).

    before:  %s = add(%x, %h)                        after:  %s = sum_for_norm(%x, %h)
             %y = layer_norm(%s, ...)                        %y = layer_norm(%s, ...)
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Rewrite every such sum."""
        for norm in [node for node in gm.graph.nodes if aten_name(node) == "layer_norm"]:
            total = norm.args[0]
            if isinstance(total, Node) and _is_plain_sum(total):
                total.target = operators.sum_for_norm


def _is_plain_sum(node: Node) -> bool:
    if aten_name(node) != "add" or node.kwargs or len(node.args) != 2:
        return False
    return all(isinstance(one, Node) and isinstance(one.meta.get("val"), Tensor) for one in node.args)
