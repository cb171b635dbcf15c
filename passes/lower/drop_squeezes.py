"""Squeezes of a dimension that is not 1 go: in PyTorch they do nothing, and ONNX refuses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from ti_fx.ir.edit import constant_size
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED


@dataclass(frozen=True)
class DropSqueezes(Pass):
    """What reads a squeeze that does nothing reads what it squeezes.

    before:  %s = squeeze.dim(%x, 1)  f32[b, 4]          after:  %y = relu(%x)
             %y = relu(%s)
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Take every squeeze out whose dimension is not 1 for certain; torch.export writes it so, too."""
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim):
            source, dim = node.args
            if constant_size(source.meta["val"].shape[dim]) != 1:
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)
