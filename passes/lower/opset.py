"""Which ONNX opset a graph is lowered for: what an older one lacks stays as it is."""

from __future__ import annotations

from torch.fx import GraphModule

from ti_fx.ir.facts import facts
from ti_fx.numerics.encodings import NEWEST_OPSET

FUSED_OPSET = (
    25  # what runs INT2 weights, a type of this opset, runs norms, rotary positions and attention, too
)


def opset_of(gm: GraphModule) -> int:
    """Return the opset that the graph is lowered for; the newest unless its facts say another."""
    opset = facts(gm).opset
    return NEWEST_OPSET if opset is None else opset


def has_fused_operators(gm: GraphModule) -> bool:
    """Whether the opset has norms, rotary positions and attention in one node each, and the runtime computes them."""
    return opset_of(gm) >= FUSED_OPSET
