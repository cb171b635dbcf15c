"""Dropout goes, which does nothing outside training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from ti_fx.ir.leaves import is_dropout
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED


@dataclass(frozen=True)
class DropDropout(Pass):
    """What reads dropout reads what dropout reads.

    before:  %d = Dropout{p=0.1}(%x)          after:  %h = linear(%x, %w)
             %h = linear(%d, %w)
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Take every dropout out, stochastic depth included."""
        for node in [node for node in gm.graph.nodes if is_dropout(gm, node)]:
            source: Any = node.args[0]
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
