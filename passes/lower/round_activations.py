"""A fake-quantised activation that no product took becomes ONNX nodes of the same numerics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from ti_fx.errors import PostconditionError
from ti_fx.ir.edit import call, supersede
from ti_fx.ir.inserted import quantiser_of
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.numerics import onnx_nodes
from ti_fx.numerics.quantiser import Quantiser
from ti_fx.passes.lower.quantised import quantised


@dataclass(frozen=True)
class RoundActivations(Pass):
    """What is left of the fake-quantisers: those of attention, and those whose weight is in floating point.

    before:  %x_q = int8_tensor(%x)                  after:  %q, %s, %z = quantise_tensor(%x)
                                                             %x_q = dequantise(%q, %s, %z)
             %y_q = int8_token(%y)                           %y_q = fake_quant_token(%y)

    1. a quantiser with a form of its own in floating point   2. any other: the codes are dequantised
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Replace every fake-quantiser."""
        for node in list(gm.graph.nodes):
            quantiser = quantiser_of(node)
            if quantiser is not None:
                supersede(node, _rounded(node, quantiser))

    def ensures(self, gm: GraphModule) -> None:
        """No fake-quantiser is left."""
        for node in gm.graph.nodes:
            if quantiser_of(node) is not None:
                raise PostconditionError(f"{self.name()} left %{node.name}")


def _rounded(node: Node, quantiser: Quantiser) -> Node:
    source: Any = node.args[0]
    if quantiser.value is not None:
        return call(node, quantiser.value, (source, *quantiser.options))
    return call(node, onnx_nodes.dequantise, tuple(quantised(source, quantiser, node)))
