"""What torch.onnx 2.13 and its optimiser (onnxscript 0.7) refuse or get wrong is written in another way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from ti_fx.ir.edit import aten_name, call, constant_size, supersede, tensor
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED

aten = torch.ops.aten
_NEUTRAL = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}


@dataclass(frozen=True)
class WriteForExporter(Pass):
    """An equal form that the exporter takes stands in the place of one that it does not.

    before:  %y = rsub(%x, 1)                        after:  %n = neg(%x)
                                                             %y = add.Scalar(%n, 1)

    1. ``number - x`` becomes -x + number: it can't promote an integer x there
    2. ``searchsorted``, which it lacks, counts the smaller ones
    3. ``chunk`` along a size that is not fixed, on which the optimiser fails, selects from a dimension of its own
    4. ``number + alpha * x`` becomes x * alpha + number: it knows a sum by its first term, a tensor
    5. ``erfinv`` of a constant, which it lacks, is that number
    6. ``x + 1e-8``, whose number the optimiser takes for 0 (or, in products, for 1), reads it as a vector of one
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Rewrite every node of these forms."""
        for node in list(gm.graph.nodes):
            name = aten_name(node)
            if name == "rsub":
                _reversed_difference(node)
            elif name == "searchsorted":
                _position(node)
            elif name == "chunk":
                _equal_parts(gm, node)
            elif name == "add" and len(node.args) == 2 and not isinstance(node.args[0], Node):
                _sum_with_number(node)
            elif name == "erfinv" and node.meta["val"].dim() == 0 and _is_fixed(node):
                supersede(node, call(node, aten.scalar_tensor.default, (float(_value(gm, node)),)))
            elif name in _NEUTRAL and not node.kwargs and _overload(node) == "Tensor":
                _nearly_neutral(node, _NEUTRAL[name])
        gm.graph.eliminate_dead_code()


def _overload(node: Node) -> str:
    return str(getattr(node.target, "_overloadname", ""))


def _position(node: Node) -> None:
    """Count, for each value, the elements of an ascending sequence that are smaller (``right``: or equal).

    before:  %p = searchsorted(%ends, %values)         after:  %p = (%ends[..., None, :] < %values[..., None]).sum(-1)
    """
    options = dict(node.kwargs)
    right = options.pop("right", False) or options.pop("side", None) == "right"
    if options or len(node.args) != 2 or not all(isinstance(one, Node) for one in node.args):
        return
    sequence, values = node.args
    is_vector = sequence.meta["val"].dim() == 1  # type: ignore[union-attr]
    rows = sequence if is_vector else call(node, aten.unsqueeze.default, (sequence, -2))
    single = call(node, aten.unsqueeze.default, (values, -1))
    smaller = call(node, aten.le.Tensor if right else aten.lt.Tensor, (rows, single))
    counted = call(node, aten.to.dtype, (smaller, torch.int64))
    supersede(node, call(node, aten.sum.dim_IntList, (counted, [-1])))


def _equal_parts(gm: GraphModule, node: Node) -> None:
    """Select equal parts of a dimension.

    before:  %c = chunk(%x, 3, 1); %p = %c[0]          after:  %u = unflatten(%x, 1, (3, -1)); %p = select(%u, 1, 0)
    """
    source, count, dim = (*node.args, 0)[:3]
    if node.kwargs or not isinstance(source, Node) or not isinstance(count, int) or not isinstance(dim, int):
        return
    shape = source.meta["val"].shape
    dim = dim % len(shape)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if constant_size(shape[dim]) is not None or len({str(size) for size in sizes}) > 1 or len(sizes) != count:
        return
    parts = call(node, aten.unflatten.int, (source, dim, [count, -1]))
    for reader in list(node.users):
        supersede(reader, call(reader, aten.select.int, (parts, dim, reader.args[1])))
    gm.graph.erase_node(node)


def _reversed_difference(node: Node) -> None:
    if len(node.args) == 2 and not node.kwargs and not isinstance(node.args[1], Node):
        negative = call(node, aten.neg.default, (node.args[0],))
        supersede(node, call(node, aten.add.Scalar, (negative, node.args[1])))


def _sum_with_number(node: Node) -> None:
    number, scaled = node.args
    if "alpha" in node.kwargs:
        scaled = call(node, aten.mul.Scalar, (scaled, node.kwargs["alpha"]))
    supersede(node, call(node, aten.add.Scalar, (scaled, number)))


def _is_fixed(node: Node) -> bool:
    return node.op != "placeholder" and all(_is_fixed(source) for source in node.all_input_nodes)


def _value(gm: GraphModule, node: Any) -> Any:
    """Compute what a fixed node gives; what is no node is its own value."""
    if not isinstance(node, Node):
        return node
    if node.op == "get_attr":
        return tensor(gm, str(node.target))
    assert callable(node.target)
    args, kwargs = map_aggregate((node.args, node.kwargs), partial(_value, gm))
    return node.target(*args, **kwargs)


def _nearly_neutral(node: Node, neutral: float) -> None:
    source, number = node.args
    value = source.meta.get("val") if isinstance(source, Node) else None
    if not isinstance(number, float) or not isinstance(value, Tensor):
        return
    if number == neutral or not math.isclose(
        number, neutral, rel_tol=1e-5, abs_tol=1e-8
    ):  # the optimiser's own
        return
    if value.is_floating_point() and value.dim():
        options = {"dtype": value.dtype}
        node.update_arg(1, call(node, aten.full.default, ([1], number), kwargs=options))
