"""What torch.onnx would decompose is written in core operators, so that it need not trace the graph once more."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx.ir.edit import call, supersede
from ti_fx.ir.memory import shares_with
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED

aten = torch.ops.aten
_RENAMED = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.min.other: aten.minimum.default,
    aten.max.other: aten.maximum.default,
}
_IN_PLACE = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
}
_DTYPE_AT = {aten.to.dtype: 1, aten.to.device: 2}


@dataclass(frozen=True)
class WriteCoreOperators(Pass):
    """An operator that torch.onnx lacks and would decompose is the core ATen operators that it is made of.

    before:  %m = __and__(%a, %b)                    after:  %m = bitwise_and(%a, %b)
             %f = to.dtype(%m, float32)                      %f = _to_copy(%m, dtype=float32)

    1. ``__and__``, ``__or__``, ``__xor__``, ``min`` and ``max`` of two tensors get their core names
    2. a conversion, to a device or not, is ``_to_copy``
    3. ``diff`` is the difference of two slices
    4. ``adaptive_avg_pool1d`` to one value is a mean
    5. ``x += y``, where x is a result that nobody reads afterwards, is ``x + y``

    Source: torch's own decompositions of these operators.
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Rewrite every node of these operators."""
        places = {node: place for place, node in enumerate(gm.graph.nodes)}
        for node in list(gm.graph.nodes):
            target = node.target
            if target in _RENAMED:
                supersede(node, call(node, _RENAMED[target], node.args))
            elif target in _DTYPE_AT and len(node.args) > _DTYPE_AT[target]:
                _conversion(node, _DTYPE_AT[target])
            elif target is aten.diff.default:
                _difference(node)
            elif target is aten.adaptive_avg_pool1d.default and node.args[1] == [1]:
                supersede(node, call(node, aten.mean.dim, (node.args[0], [-1], True)))
            elif target in _IN_PLACE and _is_last(node, places):
                supersede(node, call(node, _IN_PLACE[target], node.args, kwargs=dict(node.kwargs)))


def _conversion(node: Node, at: int) -> None:
    supersede(node, call(node, aten._to_copy.default, (node.args[0],), kwargs={"dtype": node.args[at]}))


def _difference(node: Node) -> None:
    """Subtract each entry from the next one.

    before:  %d = diff(%x, 1, -1, %first)            after:  %j = cat((%first, %x), -1)
                                                             %d = %j[..., 1:] - %j[..., :-1]
    """
    given: list[Any] = [*node.args, *(None, 1, -1, None, None)[len(node.args) :]]
    source, times, dim, front, back = given
    if times != 1 or node.kwargs or node.meta["val"].dtype == torch.bool:
        return
    parts = [part for part in (front, source, back) if part is not None]
    joined = parts[0] if len(parts) == 1 else call(node, aten.cat.default, (parts, dim))
    later = call(node, aten.slice.Tensor, (joined, dim, 1))
    earlier = call(node, aten.slice.Tensor, (joined, dim, 0, -1))
    supersede(node, call(node, aten.sub.Tensor, (later, earlier)))


def _is_last(node: Node, places: dict[Node, int]) -> bool:
    """Tell whether a node may leave what it writes into alone: a new value that nothing reads after it."""
    written: Any = node.args[0]
    makes_it = isinstance(written, Node) and written.op == "call_function"
    if not makes_it or written.target is operator.getitem or shares_with(written) is not None:
        return False
    values: list[Any] = [one.meta["val"] if isinstance(one, Node) else one for one in node.args[:2]]
    if torch.result_type(*values) != node.meta["val"].dtype:  # in place x keeps its type, x + y may not
        return False
    return all(places.get(reader, 0) <= places[node] for reader in _readers(written, node))


def _readers(written: Node, writer: Node) -> Iterable[Node]:
    """Yield what reads a value or a view of it, but not through the node that writes into it."""
    for reader in written.users:
        if reader is not writer:
            yield reader
            if shares_with(reader) is not None:
                yield from _readers(reader, writer)
