"""A lowered graph reads the packed graph's stored tensors through markers, so that the file holds them as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node

from ti_fx.errors import PreconditionError
from ti_fx.find.packed import PackedWeight, packed_weights
from ti_fx.ir import roles
from ti_fx.ir.edit import call, get_attr, register, tensor
from ti_fx.numerics.layouts import INT2, LAYOUTS, Layout
from ti_fx.passes.lower import operators

aten = torch.ops.aten
Int8Codes = dict[tuple[str, bool], Node]  # by the packed weight's node, and whether its matrix is transposed


def set_layout(weight: PackedWeight, layout: Layout) -> None:
    """Record how the file stores a packed weight."""
    roles.record(weight.node, layout=layout.name)


def layout_of(weight: PackedWeight) -> Layout:
    """Return how the file stores a packed weight."""
    return LAYOUTS[roles.fact(weight.node, "layout")]


def require_layouts(gm: GraphModule, name: str) -> None:
    """Refuse a graph in which a packed weight has no layout yet.

    Args:
        gm: the graph.
        name: of the pass that needs them.

    Raises:
        PreconditionError: names the weight and the pass that is missing.
    """
    for weight in packed_weights(gm):
        if roles.fact(weight.node, "layout") is None:
            raise PreconditionError(
                f"{name} reads weights as the file stores them, and %{weight.node.name} has no layout; "
                "run choose-layouts first"
            )


def marked_bytes(
    gm: GraphModule, before: Node, weight: PackedWeight, blocks: tuple[int, ...] | None = None
) -> Node:
    """Insert the marked bytes of a weight, as they are stored; of INT2, its codes.

    They are flat, of a table ``(rows, bytes)``, or have the shape ``blocks`` if whoever asks first gives one: ONNX
    Runtime would copy what it reshapes when it loads the file.
    They are a stand-in, so that the exporter neither holds nor copies them: the file's come from the packed graph.
    """
    layout, name = layout_of(weight), weight.codes_name
    form = blocks or layout.stored(weight.shape)
    read = _buffer(gm, before, name.replace(".", "_"), lambda: _stand_in(form))
    if layout in (INT2, INT2.turned):
        size, dtype = layout.written(weight.shape), torch.int8
    else:
        size, dtype = tuple(tensor(gm, str(read.target)).shape), torch.uint8
    return call(before, operators.packed, (read, name, layout.name, size, dtype))


def marked_scale(gm: GraphModule, before: Node, weight: PackedWeight) -> Node:
    """Insert the marked scale of a weight."""
    return _marked(gm, before, weight.scale)


def marked_groups(gm: GraphModule, before: Node, weight: PackedWeight) -> list[int | Node]:
    """Return how many neighbours share a scale and the marked offset, as far as a weight has them.

    They are the last arguments of what computes with such a weight in floating point.
    """
    offset = [] if weight.offset is None else [_marked(gm, before, weight.offset)]
    return [weight.group, *offset] if weight.group or offset else []


def _marked(gm: GraphModule, before: Node, read: Node) -> Node:
    name = str(read.target)
    arguments = (read, name, "scale", tensor(gm, name).shape, torch.float32)
    return call(before, operators.packed, arguments)


def code_table(gm: GraphModule, before: Node, layout: Layout) -> Node:
    """Insert the table that unpacks the bytes of a layout, int8 ``(256, codes in a byte)``."""
    return _buffer(gm, before, layout.table_name, layout.table)


def int8_codes(gm: GraphModule, weight: PackedWeight, transposed: bool, known: Int8Codes) -> Node:
    """Return the int8 codes of a packed weight, or of its transposed matrix, inserted once, right before it.

    Args:
        gm: the graph.
        weight: the packed weight.
        transposed: whether its transposed matrix is wanted.
        known: what :func:`known_codes` found; what is inserted is added to it.
    """
    node, layout, key = weight.node, layout_of(weight), (weight.node.name, transposed)
    if key not in known:
        codes = marked_bytes(gm, node, weight)
        if layout not in (INT2, INT2.turned):
            arguments = (codes, code_table(gm, node, layout), layout.written(weight.shape))
            codes = call(node, operators.codes_from_table, arguments)
        if transposed != layout.transposed:
            codes = call(node, aten.t.default, (codes,))
        roles.record(codes, codes_of=node.name, transposed=transposed)
        known[key] = codes
    return known[key]


def known_codes(graph: Graph) -> Int8Codes:
    """Return the int8 codes that passes inserted."""
    return {
        (source, roles.fact(node, "transposed")): node
        for node in graph.nodes
        if (source := roles.fact(node, "codes_of")) is not None
    }


def _buffer(gm: GraphModule, before: Node, name: str, make: Callable[[], torch.Tensor]) -> Node:
    if name not in gm._buffers:
        gm._buffers = dict(gm._buffers)  # the list may be shared with forks
        register(gm, name, make())
    return get_attr(before, name)


def _stand_in(shape: tuple[int, ...]) -> torch.Tensor:
    """Return uint8 zeros of any size in one byte of memory."""
    return torch.zeros((), dtype=torch.uint8).expand(shape)
