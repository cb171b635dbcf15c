"""An embedding of a packed table becomes a look-up that leaves the table packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ti_fx.find.packed import PackedWeight, looked_up
from ti_fx.ir.edit import call, supersede
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.numerics.layouts import UINT2
from ti_fx.passes.lower import operators
from ti_fx.passes.lower.stored import (
    code_table,
    layout_of,
    marked_bytes,
    marked_groups,
    marked_scale,
    require_layouts,
)


@dataclass(frozen=True)
class LookUpPacked(Pass):
    """Rows of a packed table are unpacked as they are looked up.

    before:  %w = unpack_ternary(%codes, %scale)     after:  %s = packed(%scale)
             %e = embedding(%w, %ids)                        %c = packed(%codes)
                                                             %e = look_up_by_table(%c, %s, %table, %ids, columns)

    1. a table that a product reads, too, two bits a code: GatherBlockQuantized   2. any other: by a table of bytes
    """

    takes = (PACKED,)

    def requires(self, gm: GraphModule) -> None:
        """Every packed weight has a layout."""
        require_layouts(gm, self.name())

    def apply(self, gm: GraphModule) -> None:
        """Replace every embedding of a packed table."""
        for node in list(gm.graph.nodes):
            table = looked_up(node)
            if table is not None:
                _look_up(gm, node, table)
        gm.graph.eliminate_dead_code()


def _look_up(gm: GraphModule, node: Node, table: PackedWeight) -> None:
    scale, stored = marked_scale(gm, node, table), marked_bytes(gm, node, table)
    ids, (rows, columns) = node.args[1], table.shape
    if layout_of(table) is UINT2:
        codes = call(node, torch.ops.aten.reshape.default, (stored, [rows, -1]))
        supersede(node, call(node, operators.gather_ternary, (codes, scale, ids, columns)))
        return
    by_byte = code_table(gm, node, layout_of(table))
    groups = marked_groups(gm, node, table)
    supersede(node, call(node, operators.look_up_by_table, (stored, scale, by_byte, ids, columns, *groups)))
