"""Take the teacher and the losses out again: what is left is the student, with the model's own signature."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ti_fx.errors import PostconditionError
from ti_fx.ir import phased, roles
from ti_fx.ir.edit import erase, erase_dead, prune
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PACKED, PREPARED
from ti_fx.passes.prepare import distill, intervene


@dataclass(frozen=True)
class Strip(Pass):
    """Losses, interventions, the teacher and its tensors go; the student stays, quantisers included.

    before:  %loss = weighted(...)  #loss            after:  %h = linear(%x, %w_q)  #student
             %h_t = linear(%x, %w_t)  #teacher               return %outputs
             %h = linear(%x, %w_q)  #student
             return {loss: %loss, losses: {...}, outputs: %outputs}

    1. losses   2. what is phased in   3. interventions and detaches   4. teacher nodes   5. nodes nobody reads any more
    6. unread tensors

    Attributes:
        keep_tensors: tensors and modules stay, for a fork that shares their containers with graphs in training.
    """

    takes = (CAPTURED, PREPARED, PACKED)

    keep_tensors: bool = False

    def apply(self, gm: GraphModule) -> None:
        """Remove what only training needs."""
        distill.remove(gm)
        phased.undo(gm)
        if any(roles.is_teacher(node) for node in gm.graph.nodes):
            intervene.undo(gm)
        for node in reversed(list(gm.graph.nodes)):
            if roles.is_teacher(node):
                erase(node)
        for node in gm.graph.nodes:
            roles.record(node, stands_for=None)
        erase_dead(gm.graph.nodes)
        if not self.keep_tensors:
            prune(gm)

    def ensures(self, gm: GraphModule) -> None:
        """No teacher and no loss is left."""
        for node in gm.graph.nodes:
            if roles.role(node) in ("teacher", "loss"):
                raise PostconditionError(f"strip left {roles.role(node)} %{node.name}")
