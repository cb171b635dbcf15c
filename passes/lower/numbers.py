"""Numbers in arithmetic, written so that torch.onnx 2.13 and its optimiser (onnxscript 0.7) compute what was meant."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from ti_fx.ir.edit import aten_name, constant_size, supersede, tensor
from ti_fx.passes.lower.storage import insert

aten = torch.ops.aten
_NEUTRAL = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}


def write_numbers(graph: Graph) -> None:
    """Rewrite what the exporter refuses or gets wrong.

    1. ``number - x`` becomes -x + number: it can't promote an integer x there
    2. ``number + alpha * x`` becomes x * alpha + number: it knows a sum by its first term, a tensor
    3. ``searchsorted``, which it lacks, counts the smaller ones
    4. ``x + 1e-8``, whose number the optimiser takes for 0 (or, in products, for 1), reads it as a vector of one
    5. ``chunk`` along a size that is not fixed, on which the optimiser fails, selects from a dimension of its own
    """
    for node in list(graph.nodes):
        name = aten_name(node)
        if name == "rsub":
            _reversed_difference(node)
        elif name == "searchsorted":
            _position(node)
        elif name == "chunk":
            _equal_parts(node)
        elif name == "add" and len(node.args) == 2 and not isinstance(node.args[0], Node):
            _sum_with_number(node)
        elif name == "erfinv" and node.meta["val"].dim() == 0 and _is_fixed(node):
            number = float(_value(node))
            supersede(node, insert(node, aten.scalar_tensor.default, number))
        elif name in _NEUTRAL and not node.kwargs and getattr(node.target, "_overloadname", "") == "Tensor":
            _nearly_neutral(node, _NEUTRAL[name])


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
    rows = sequence if is_vector else insert(node, aten.unsqueeze.default, sequence, -2)
    single = insert(node, aten.unsqueeze.default, values, -1)
    smaller = insert(node, aten.le.Tensor if right else aten.lt.Tensor, rows, single)
    counted = insert(node, aten.to.dtype, smaller, torch.int64)
    supersede(node, insert(node, aten.sum.dim_IntList, counted, [-1]))


def _equal_parts(node: Node) -> None:
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
    parts = insert(node, aten.unflatten.int, source, dim, [count, -1])
    for reader in list(node.users):
        supersede(reader, insert(reader, aten.select.int, parts, dim, reader.args[1]))
    node.graph.erase_node(node)


def _reversed_difference(node: Node) -> None:
    if len(node.args) == 2 and not node.kwargs and not isinstance(node.args[1], Node):
        negative = insert(node, aten.neg.default, node.args[0])
        supersede(node, insert(node, aten.add.Scalar, negative, node.args[1]))


def _sum_with_number(node: Node) -> None:
    number, scaled = node.args
    if "alpha" in node.kwargs:
        scaled = insert(node, aten.mul.Scalar, scaled, node.kwargs["alpha"])
    supersede(node, insert(node, aten.add.Scalar, scaled, number))


def _is_fixed(node: Node) -> bool:
    return node.op != "placeholder" and all(_is_fixed(source) for source in node.all_input_nodes)


def _value(node: Any) -> Any:
    """Compute what a fixed node gives; what is no node is its own value."""
    if not isinstance(node, Node):
        return node
    if node.op == "get_attr":
        module = node.graph.owning_module
        assert module is not None
        return tensor(module, str(node.target))
    assert callable(node.target)
    args, kwargs = map_aggregate((node.args, node.kwargs), _value)
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
        with node.graph.inserting_before(node):
            vector = node.graph.call_function(aten.full.default, ([1], number), {"dtype": value.dtype})
        node.update_arg(1, vector)
