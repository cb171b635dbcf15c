"""What is stored in half precision is marked, or the exporter would cast it and store the result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from ti_fx.ir.edit import aten_name, call, replace_input, tensor
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.passes.lower import operators


@dataclass(frozen=True)
class MarkHalves(Pass):
    """A marker stands between a tensor in half precision and its cast to float32.

    before:  %b = to(%bias_half, f32)                after:  %m = packed(%bias_half)
                                                             %b = to(%m, f32)
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Mark every float16 tensor that is cast."""
        for node in gm.graph.find_nodes(op="get_attr"):
            name = str(node.target)
            value = tensor(gm, name)
            if value.dtype != torch.float16:
                continue
            arguments = (node, name, "constant", value.shape, value.dtype)
            for reader in [reader for reader in node.users if aten_name(reader) == "to"]:
                replace_input(reader, node, call(reader, operators.packed, arguments))
