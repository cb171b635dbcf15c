"""Let a graph take inputs whose values are constants of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ti_fx.ir.edit import input_names, insert
from ti_fx.ir.facts import facts
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.shapes import fake_mode
from ti_fx.ir.stages import EXPORTED


@dataclass(frozen=True)
class TakeBakedInputs(Pass):
    """An input that steers Python in the model is taken and not read: the graph has its values as constants.

    before:  %x = input                          after:  %lengths = input
             %h = slice(%x, 0, 3)                        %x = input
                                                         %h = slice(%x, 0, 3)

    Which ones is a fact of the graph (``baked``), by which other values are refused at every call.
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Insert each input that is not there yet ahead of everything, its sizes those of the values."""
        mode = fake_mode(gm)
        first = next(iter(gm.graph.nodes))
        for name, value in facts(gm).baked.items():
            if name not in input_names(gm):
                node = insert(first, "placeholder", name)
                node.meta["val"] = mode.from_tensor(value, static_shapes=True)
