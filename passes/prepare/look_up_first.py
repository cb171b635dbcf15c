"""Quantise only the rows of a word embedding that a batch looks up."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.ir.edit import aten_name, erase
from ti_fx.ir.inserted import weight_quantiser_of
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PHASE, PREPARED


@dataclass(frozen=True)
class LookUpFirst(Pass):
    """Rows are looked up, then quantised; values and gradients stay bit-equal.

    before:  %w_q = ternary(%w, granularity=row)       after:  %rows = ternary_embedding(%w, %ids)
             %rows = embedding(%w_q, %ids)

    For the fork of one phase: the table is the largest weight, and a step reads few of its rows. A table with other
    readers (tied to a head) is left, and one by a method that learns tensors.
    """

    takes = (PREPARED, PHASE)

    def apply(self, gm: GraphModule) -> None:
        """Rewrite each look-up in a table of its own."""
        for node in [node for node in gm.graph.nodes if aten_name(node) == "embedding"]:
            quantiser, found = node.args[0], weight_quantiser_of(node.args[0])
            if found is None or found.learned or not isinstance(quantiser, Node):
                continue
            if len(quantiser.users) > 1 or quantiser.kwargs.get("granularity") != "row":
                continue
            is_twn = quantiser.target is numerics.ternary
            method = {} if is_twn else {"method": found.name}
            node.args = (*quantiser.args, *node.args[1:])
            node.kwargs = {**node.kwargs, **method, "clip": quantiser.kwargs["clip"]}
            node.target = numerics.ternary_embedding if is_twn else numerics.quantised_embedding
            erase(quantiser)
