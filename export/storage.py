"""The packed weights of a graph that is being lowered: each is stored once, in a layout that suits who reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx.encodings import CODES_PER_BYTE, NEWEST_OPSET
from ti_fx.errors import ExportError
from ti_fx.export import ops
from ti_fx.export.layouts import BASE3, BYTES, INT2, UINT2, UINT2_TRANSPOSED, Layout
from ti_fx.export.student import PackedWeight, as_packed, packed_weights, weight_encodings
from ti_fx.graph import aten_name, supersede, tensor


def insert(before: Node, function: Callable[..., Any], *args: Any) -> Node:
    """Insert a call before a node."""
    with before.graph.inserting_before(before):
        return before.graph.call_function(function, args)


def looked_up(node: Node) -> PackedWeight | None:
    """Return the table of an embedding, None for any other node."""
    table = as_packed(node.args[0]) if aten_name(node) == "embedding" else None
    return table if table is not None and len(table.shape) == 2 else None


class Weights:
    """Packed weights by their tensors.

    Args:
        gm: the graph that is being lowered; stored bytes and tables become its buffers.
        opset: of the file.
        by_blocks: the weights that a MatMulNBits would read, and whether each is ``(outputs, inputs)``; it can read
            those whose inputs are a multiple of 4.

    Raises:
        ExportError: a packed weight is not float32.
    """

    def __init__(self, gm: GraphModule, opset: int, by_blocks: dict[str, bool]) -> None:
        self.gm = gm
        self.opset = opset
        self.int8: dict[Node, Node] = {}
        self.layouts: dict[str, Layout] = {}
        encodings = weight_encodings(gm)
        tables = {table.codes_name for node in gm.graph.nodes if (table := looked_up(node)) is not None}
        for weight in packed_weights(gm):
            if weight.dtype != torch.float32:
                raise ExportError(
                    f"packed weight {weight.codes_name} is {weight.dtype}; export needs float32: "
                    "load the model in float32 before ti_fx.capture"
                )
            name = weight.codes_name
            storage = encodings[weight.parameter].storage
            whole = len(weight.shape) == 2 and not weight.shape[1] % CODES_PER_BYTE
            if storage != "two-bit":
                layout = BASE3 if storage == "base3" else BYTES
            elif name in tables:
                layout = UINT2 if whole else BYTES
            elif name in by_blocks and not weight.shape[int(by_blocks[name])] % CODES_PER_BYTE:
                layout = UINT2 if by_blocks[name] else UINT2_TRANSPOSED
            else:
                layout = INT2 if opset >= NEWEST_OPSET else BYTES
            self.layouts[name] = layout

    def look_up(self, node: Node, table: PackedWeight) -> None:
        """Replace an embedding of a packed table by a look-up that leaves the table packed."""
        layout, scale = self.layouts[table.codes_name], self.scale(node, table)
        rows, columns = table.shape
        if layout is UINT2:
            codes = insert(node, torch.ops.aten.reshape.default, self.stored(node, table), [rows, -1])
            found = insert(node, ops.gather_ternary, codes, scale, node.args[1], columns)
        else:
            codes, values = self.stored(node, table), self._table(node, layout)
            found = insert(node, ops.look_up_by_table, codes, scale, values, node.args[1], columns)
        supersede(node, found)

    def codes(self, weight: PackedWeight) -> Node:
        """Return the int8 codes of a packed weight, inserted once, right before it."""
        node, name = weight.node, weight.codes_name
        if node not in self.int8:
            layout = self.layouts[name]
            if layout is INT2:
                self.int8[node] = insert(node, ops.codes_from_int2, weight.codes, name, weight.shape)
            else:
                shape = weight.shape[::-1] if layout.transposed else weight.shape
                stored, table = self.stored(node, weight), self._table(node, layout)
                codes = insert(node, ops.codes_from_table, stored, table, shape)
                self.int8[node] = (
                    insert(node, torch.ops.aten.t.default, codes) if layout.transposed else codes
                )
        return self.int8[node]

    def stored(self, before: Node, weight: PackedWeight) -> Node:
        """Return the marked bytes of a weight, flat, as they are stored (in any layout but INT2)."""
        layout, name = self.layouts[weight.codes_name], weight.codes_name
        read = weight.codes
        if layout is not BYTES:
            read = self._buffer(
                before,
                f"stored_{name.replace('.', '_')}",
                lambda: layout.encode(tensor(self.gm, name), weight.shape),
            )
        size = tensor(self.gm, str(read.target)).shape
        return insert(before, ops.packed, read, name, layout.name, size, torch.uint8)

    def scale_shape(self, weight: PackedWeight) -> torch.Size:
        """Return the shape of the scale."""
        return tensor(self.gm, weight.scale_name).shape

    def scale(self, before: Node, weight: PackedWeight) -> Node:
        """Return the marked scale."""
        arguments = (weight.scale, weight.scale_name, "scale", self.scale_shape(weight), torch.float32)
        return insert(before, ops.packed, *arguments)

    def in_float(self, weight: PackedWeight) -> None:
        """General rule: codes * scale."""
        node = weight.node
        supersede(node, insert(node, ops.dequantised_weight, self.codes(weight), self.scale(node, weight)))

    def _table(self, before: Node, layout: Layout) -> Node:
        return self._buffer(before, f"codes_of_{layout.name.replace('-', '_')}", layout.table)

    def _buffer(self, before: Node, name: str, make: Callable[[], torch.Tensor]) -> Node:
        if name not in self.gm._buffers:
            self.gm.register_buffer(name, make())
        with before.graph.inserting_before(before):
            return before.graph.get_attr(name)
