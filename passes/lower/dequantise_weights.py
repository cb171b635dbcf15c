"""A packed weight that neither a look-up nor a quantised product took becomes codes times scale."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ti_fx.errors import PostconditionError
from ti_fx.find.packed import packed_weights
from ti_fx.ir.edit import call, supersede
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.passes.lower import operators
from ti_fx.passes.lower.stored import (
    int8_codes,
    known_codes,
    marked_groups,
    marked_scale,
    require_layouts,
)


@dataclass(frozen=True)
class DequantiseWeights(Pass):
    """What is left of the packed weights is stored packed, and multiplied in floating point.

    before:  %w = unpack_ternary(%codes, %scale)     after:  %c = packed(%codes)
                                                             %s = packed(%scale)
                                                             %w = dequantised_weight(%c, %s)
    """

    takes = (PACKED,)

    def requires(self, gm: GraphModule) -> None:
        """Every packed weight has a layout."""
        require_layouts(gm, self.name())

    def apply(self, gm: GraphModule) -> None:
        """Replace every packed weight."""
        known = known_codes(gm.graph)
        for weight in list(packed_weights(gm)):
            node = weight.node
            codes, scale = int8_codes(gm, weight, False, known), marked_scale(gm, node, weight)
            parts = (codes, scale, *marked_groups(gm, node, weight))
            supersede(node, call(node, operators.dequantised_weight, parts))
        gm.graph.eliminate_dead_code()

    def ensures(self, gm: GraphModule) -> None:
        """No packed weight is left."""
        for weight in packed_weights(gm):
            raise PostconditionError(f"{self.name()} left %{weight.node.name}")
