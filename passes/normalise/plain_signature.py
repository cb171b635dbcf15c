"""Let a graph take the model's keywords and return the model's own structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import map_arg

from ti_fx.ir import outputs
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED


@dataclass(frozen=True)
class PlainSignature(Pass):
    """Inputs are the tensors that the model takes by keyword, and the result is what the model returns.

    before:  %w = w                              after:  %x = input
             %x = input                                  %w = w
             %flag = input                               %h = linear(%x, %w)
             %h = linear(%x, %w)                         %outputs = ModelOutput(logits=%h)
             return [%h]                                 return %outputs

    1. a tensor among the inputs stays an input, ahead of everything; other values are constants of the graph already
    2. torch.export returns a flat list and notes beside it what the model made of it (a tuple, a dict, a ModelOutput);
       the graph makes that itself

    The graph is a new one: what torch.export notes beside it (how to flatten inputs and outputs) is part of the old.
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Build the new graph and put it in the place of the old; one that is plain already is left.

        Raises:
            CaptureError: the model returns a container that a graph can't make.
        """
        codegen = gm.graph._codegen
        if not isinstance(codegen, _PyTreeCodeGen):
            return
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in gm.graph.find_nodes(op="placeholder"):
            if isinstance(node.meta.get("val"), Tensor):
                copies[node] = graph.node_copy(node)
        for node in gm.graph.nodes:
            if node.op not in ("placeholder", "output"):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        flat: Any = map_arg(gm.graph.output_node().args[0], copies.__getitem__)
        spec = codegen.pytree_info.out_spec
        assert spec is not None
        graph.output(outputs.build(graph, spec, flat))
        gm.graph = graph
