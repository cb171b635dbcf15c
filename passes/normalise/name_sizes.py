"""Call a node that reads a dynamic size by the size's name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from ti_fx.ir.edit import aten_name, rename
from ti_fx.ir.facts import facts
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED


@dataclass(frozen=True)
class NameSizes(Pass):
    """A read of a dynamic size has that size's name.

    before:  %sym_size_int_3 = sym_size.int(%x, 0)    after:  %batch = sym_size.int(%x, 0)

    What each is called is a fact of the graph (``sizes.names``).
    """

    takes = (CAPTURED,)

    def apply(self, gm: GraphModule) -> None:
        """Rename each read; a second one of the same size gets a number."""
        names = facts(gm).sizes.names
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and str(value) in names and aten_name(node) == "sym_size":
                rename(node, names[str(value)])
