"""Nodes lose their roles: a lowered graph has nothing to train."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ti_fx.ir import roles
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED


@dataclass(frozen=True)
class ForgetRoles(Pass):
    """Every node is as good as any other.

    before:  %h = linear(%x, %w)  #student           after:  %h = linear(%x, %w)
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Take every role away."""
        for node in gm.graph.nodes:
            roles.record(node, role=None)
