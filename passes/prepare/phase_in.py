"""Phase the quantisation of weights in: of each a share is quantised, and the share moves from step to step."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ti_fx.errors import PostconditionError, PreconditionError
from ti_fx.ir import phased
from ti_fx.ir.inserted import quantised_weights
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED


@dataclass(frozen=True)
class PhaseIn(Pass):
    """Readers of a quantised weight read ``W + λ (Q(W) - W)``; λ is one buffer of the graph, 1 until it is moved.

    before:  %w_q = ternary(%w, granularity=tensor)  after:  %w_q = ternary(%w, granularity=tensor)
             %h = linear(%x, %w_q)                           %w_in = phase_in(%w, %w_q, %phase_in_share)
                                                             %h = linear(%x, %w_in)

    At λ = 1 values and gradients are those of the quantised weight, at λ = 0 those of the weight itself, in every bit.
    A phase with ``phase_in`` runs it on its own graph and moves λ by its curve. Activations are quantised as they are.
    Strip takes it out: the student's weights are quantised wholly.
    """

    takes = (CAPTURED, PREPARED)

    def requires(self, gm: GraphModule) -> None:
        """Quantised weights."""
        if not quantised_weights(gm):
            raise PreconditionError("phase-in needs weights that are quantised", missing="ternarize")

    def apply(self, gm: GraphModule) -> None:
        """Insert a node behind each quantiser that has none."""
        phased.phase_in(gm)

    def ensures(self, gm: GraphModule) -> None:
        """Each quantiser is read through one node."""
        for node in quantised_weights(gm):
            if not all(map(phased.is_phase_in, node.users)):
                raise PostconditionError(f"phase-in left a reader of %{node.name}")
