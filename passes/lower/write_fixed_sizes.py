"""A size that can be only one number is written as that number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_aggregate
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from ti_fx.ir.facts import facts
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED


@dataclass(frozen=True)
class WriteFixedSizes(Pass):
    """The number stands where a size can be only one: torch.onnx traces again, and may not find that out.

    before:  %n = sym_max(0, %k)               after:  %y = slice(%x, 0, 0)
             %y = slice(%x, 0, %n)

    (``max(0, 1 - past - sequence)`` is 0 for every past and sequence.)
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Write the number into every reader of such a size."""
        least = facts(gm).sizes.smallest
        for node in list(gm.graph.nodes):
            number = _only_value(node, least)
            for reader in list(node.users) if number is not None else ():
                reader.args, reader.kwargs = map_aggregate(
                    (reader.args, reader.kwargs), partial(_replaced, node, number)
                )
        gm.graph.eliminate_dead_code()


def _only_value(node: Node, least: Mapping[str, int]) -> int | None:
    """Return the only number that a computed size can be, None if it can be several or is no computed size."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.SymInt) or not value.node.expr.free_symbols:
        return None
    known = value.node.shape_env.var_to_range
    ranges = {
        symbol: ValueRanges(least.get(str(symbol), 1), known[symbol].upper)
        for symbol in value.node.expr.free_symbols
    }
    bounds = bound_sympy(value.node.expr, ranges)
    return int(bounds.lower) if bounds.is_singleton() else None


def _replaced(node: Node, number: int | None, argument: Argument) -> Argument:
    return number if argument is node else argument
