"""Read each stored tensor once, right before its first use."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ti_fx.ir.edit import erase, rename
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED


@dataclass(frozen=True)
class OneReadEach(Pass):
    """A stored tensor is read by one node, which stands where it is first needed and is called by its name.

    before:  %p_layer_0_weight = layer.0.weight    after:  %h = relu(%x)
             %h = relu(%x)                                 %layer_weight = layer.0.weight
             %y = linear(%h, %p_layer_0_weight)            %y = linear(%h, %layer_weight)

    1. of several reads of a tensor the first is kept
    2. its name is made of the last two parts of the tensor's path, numbers left out
    3. it comes right before its first reader
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Merge, name, move."""
        reads: dict[str, Node] = {}
        for node in gm.graph.find_nodes(op="get_attr"):
            if node.target in reads:
                node.replace_all_uses_with(reads[node.target])
                erase(node)
            else:
                reads[node.target] = node
                rename(node, "_".join([part for part in node.target.split(".") if not part.isdigit()][-2:]))
        moved: set[Node] = set()
        for node in list(gm.graph.nodes):
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in moved:
                    moved.add(source)
                    node.prepend(source)
