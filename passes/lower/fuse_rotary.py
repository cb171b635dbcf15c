"""Rotary positions become ONNX's own node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name, call, constant_size, supersede
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.passes.lower import operators
from ti_fx.passes.lower.opset import has_fused_operators
from ti_fx.passes.lower.patterns import EVERYTHING, called, rank, split_view

_UNARY = ("cos", "sin", "to", "mul", "unsqueeze")


@dataclass(frozen=True)
class FuseRotary(Pass):
    """The rotation of a query or a key becomes RotaryEmbedding.

    before:  %t = cat([neg(%x[d/2:]), %x[:d/2]], -1)          after:  %c = slice(%cos, 2, 0, d/2)
             %y = add(mul(%x, unsqueeze(%cos)),                       %s = slice(%sin, 2, 0, d/2)
                      mul(%t, unsqueeze(%sin)))                       %y = rotary(%x, %c, %s, 0)

    1. x was split from merged heads: those are rotated, and split then   2. x has its heads apart

    Below opset 25 this pass does nothing.
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Replace every rotation of this form."""
        if not has_fused_operators(gm):
            return
        halves: dict[Node, Node] = {}
        for node in list(gm.graph.nodes):
            found = _match(node)
            if found is not None:
                supersede(node, _rotated(node, found, halves))
        gm.graph.eliminate_dead_code()


@dataclass(frozen=True)
class _Rotation:
    """What is rotated, ``(batch, heads, length, size)``, and the tables of :func:`_table`."""

    source: Any
    cosine: Node
    sine: Node
    size: int


def _match(total: Any) -> _Rotation | None:
    """Match the rotation whose sum this is: x * cos + the turned x * sin."""
    if not called(total, "add") or len(total.args) != 2 or total.kwargs or rank(total) != 4:
        return None
    straight, turned = total.args
    if not called(straight, "mul") or not called(turned, "mul"):
        return None
    source, cosine = straight.args
    across, sine = turned.args
    size = constant_size(total.meta["val"].shape[-1])
    if size is None or size % 2 or not _is_turned(across, source, size):
        return None
    cosines, sines = _table(cosine), _table(sine)
    return None if cosines is None or sines is None else _Rotation(source, cosines, sines, size)


def _rotated(total: Node, found: _Rotation, halves: dict[Node, Node]) -> Node:
    """Insert the rotation before its sum; ``halves`` holds the half of each cosine and sine."""
    for table in (found.cosine, found.sine):
        if table not in halves:
            half = (table, 2, 0, found.size // 2)
            slice_of = torch.ops.aten.slice.Tensor
            halves[table] = call(table.next, slice_of, half, role=roles.role(table), like=table)
    tables = halves[found.cosine], halves[found.sine]
    view = split_view(found.source)
    if view is None:
        return call(total, operators.rotary, (found.source, *tables, 0))
    heads = total.meta["val"].shape[1]
    rotated = call(total, operators.rotary, (view.args[0], *tables, heads))
    assert callable(view.target)
    split = call(total, view.target, (rotated, *view.args[1:]), kwargs=dict(view.kwargs))
    for node in (rotated, split):
        roles.record(node, named=True)
    return call(total, torch.ops.aten.transpose.int, (split, 1, 2))


def _is_turned(node: Any, source: Any, size: int) -> bool:
    """Whether a node is ``cat([-source[d/2:], source[:d/2]], -1)``."""
    if not called(node, "cat") or len(node.args[0]) != 2 or node.args[1:] not in ((-1,), (3,)):
        return False
    negative, first = node.args[0]
    if not called(negative, "neg") or not called(negative.args[0], "slice") or not called(first, "slice"):
        return False
    last, half = negative.args[0], size // 2
    starts_at_half = last.args[:3] in ((source, 3, half), (source, -1, half)) and (
        last.args[3] in (None, size) or last.args[3] >= EVERYTHING
    )
    return starts_at_half and first.args in ((source, 3, 0, half), (source, -1, 0, half))


def _table(node: Any) -> Node | None:
    """Return the cosines or sines ``(batch, length, size)`` that are ``node`` with a dimension for heads.

    Both halves of each row have to be equal, which is so where they come from ``cat([x, x], -1)``.
    """
    if not called(node, "unsqueeze") or node.args[1] != 1 or rank(node.args[0]) != 3:
        return None
    table: Node = node.args[0]
    source: Any = table
    while called(source, *_UNARY):
        if aten_name(source) == "mul" and not isinstance(source.args[1], int | float):
            return None
        source = source.args[0]
    if not called(source, "cat") or source.args[1:] not in ((-1,), (rank(source) - 1,)):
        return None
    left, right = source.args[0] if len(source.args[0]) == 2 else (None, source)
    return table if left is right else None
