"""Casts to the same type and slices of everything go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.ir.edit import aten_name
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.passes.lower.opset import has_fused_operators
from ti_fx.passes.lower.patterns import EVERYTHING


@dataclass(frozen=True)
class DropIdentities(Pass):
    """What does nothing goes, so that what is fused next stands together.

    before:  %t = to(%x, f32)  f32[2, 3]             after:  %z = relu(%x)
             %y = slice(%t, 0, 0, end)
             %z = relu(%y)

    1. a slice of everything   2. ``to`` of the same type that is no copy

    Below opset 25 nothing is fused, and this pass does nothing.
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Let readers read what comes before."""
        if not has_fused_operators(gm):
            return
        for node in list(gm.graph.nodes):
            if _does_nothing(node):
                source: Any = node.args[0]
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)


def _does_nothing(node: Node) -> bool:
    name = aten_name(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), Tensor):
        return False
    if name == "slice":
        given: tuple[Any, ...] = node.args[1:]
        _, start, end, step = given + (0, None, None, 1)[len(given) :]
        whole = end is None or (isinstance(end, int) and end >= EVERYTHING)
        return start in (0, None) and whole and step == 1
    options = (*node.args[1:], *node.kwargs.values())
    is_copy = any(option is True for option in options)
    return name == "to" and not is_copy and node.meta["val"].dtype == source.meta["val"].dtype
