"""Read a tensor that has several names in the model under the first of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ti_fx.ir.edit import erase
from ti_fx.ir.facts import facts
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED


@dataclass(frozen=True)
class MergeTiedNames(Pass):
    """A tied tensor is one tensor: a head that is tied to the word embedding reads the word embedding.

    before:  %embed_weight = embed.weight        after:  %embed_weight = embed.weight
             %head_weight = head.weight                  %rows = embedding(%embed_weight, %ids)
             %rows = embedding(%embed_weight, %ids)      %logits = linear(%rows, %embed_weight)
             %logits = linear(%rows, %head_weight)

    Which names a tensor has is a fact of the graph (``tied``).
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Keep the earliest read of each tied tensor, under the tensor's first name."""
        tied = facts(gm).tied
        first = {name: own for own, others in tied.items() for name in (own, *others)}
        reads: dict[str, Node] = {}
        for node in gm.graph.find_nodes(op="get_attr"):
            if node.target not in first:
                continue
            node.target = first[node.target]
            kept = reads.setdefault(node.target, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                erase(node)
