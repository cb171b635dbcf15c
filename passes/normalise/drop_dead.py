"""Drop what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ti_fx.ir.edit import erase_dead, prune
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PHASE, PREPARED


@dataclass(frozen=True)
class DropDead(Pass):
    """Nodes that nobody reads go, and the tensors that only they read.

    before:  %unread = dropout(%h)               after:  %y = relu(%h)
             %y = relu(%h)                               return %y
             return %y

    1. nodes without a reader that change nothing, last first   2. unread tensors

    After the comparison of a captured graph with its model, never before: a dropout that nobody reads draws from the
    random numbers of the next. A prepared graph keeps its dead nodes; its fork for one phase has none.

    Attributes:
        keep_tensors: tensors and modules stay, for a fork that shares their containers with other graphs.
    """

    takes = (CAPTURED, PREPARED, PHASE)

    keep_tensors: bool = False

    def apply(self, gm: GraphModule) -> None:
        """Erase the nodes, then let go of the tensors."""
        erase_dead(gm.graph.nodes)
        if not self.keep_tensors:
            prune(gm)
