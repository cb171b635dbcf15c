"""Compute the shape, dtype and stride of every node again."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ti_fx.ir.pipeline import Pass
from ti_fx.ir.shapes import refresh
from ti_fx.ir.stages import EXPORTED


@dataclass(frozen=True)
class EvaluateAnew(Pass):
    """Every ``meta["val"]`` is what evaluating its node gives: torch.export's strides of views are not always that.

    before:  %v = transpose(%x, 1, 2)  f32[2, 3, 4], strides (12, 4, 1)
    after:   %v = transpose(%x, 1, 2)  f32[2, 3, 4], strides (12, 1, 3)

    The text of the graph has no strides and stays; what looks at them (a contiguous input, memory order) comes after.
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Evaluate all nodes, equal calls once."""
        refresh(gm, gm.graph.nodes)
