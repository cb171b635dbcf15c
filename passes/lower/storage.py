"""The packed weights of a graph that is being lowered: each is stored once, in a layout that suits who reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx.errors import ExportError
from ti_fx.find.packed import PackedWeight, as_packed, packed_weights, weight_encodings
from ti_fx.ir.edit import aten_name, supersede, tensor
from ti_fx.numerics.codes import CODES_PER_BYTE
from ti_fx.numerics.encodings import NEWEST_OPSET
from ti_fx.numerics.layouts import BASE3, BASE3_ROWS, BYTES, BYTES_ROWS, INT2, UINT2, Layout
from ti_fx.passes.lower import operators


def insert(before: Node, function: Callable[..., Any], *args: Any) -> Node:
    """Insert a call before a node."""
    with before.graph.inserting_before(before):
        return before.graph.call_function(function, args)


def looked_up(node: Node) -> PackedWeight | None:
    """Return the table of an embedding, None for any other node."""
    table = as_packed(node.args[0]) if aten_name(node) == "embedding" else None
    return table if table is not None and len(table.shape) == 2 else None


def _stand_in(shape: tuple[int, ...]) -> torch.Tensor:
    """Return uint8 zeros of any size in one byte of memory."""
    return torch.zeros((), dtype=torch.uint8).expand(shape)


class Weights:
    """Packed weights by their tensors.

    Args:
        gm: the graph that is being lowered; stored bytes and tables become its buffers.
        opset: of the file.
        integers: the weights that an integer product reads, and whether each is ``(outputs, inputs)``.
        blocks: the weights that a block product reads, and the same of each; such a product reads packed only a
            weight whose number of inputs is a multiple of 4.

    Raises:
        ExportError: a packed weight is not float32.
    """

    def __init__(
        self, gm: GraphModule, opset: int, integers: dict[str, bool], blocks: dict[str, bool]
    ) -> None:
        self.gm = gm
        self.opset = opset
        self.int8: dict[tuple[Node, bool], Node] = {}
        self.layouts: dict[str, Layout] = {}
        encodings = weight_encodings(gm)
        tables = {table.codes_name for node in gm.graph.nodes if (table := looked_up(node)) is not None}
        self.tied = {
            weight.codes_name
            for weight in packed_weights(gm)
            if weight.codes_name in tables and any(looked_up(reader) is None for reader in weight.node.users)
        }
        for weight in packed_weights(gm):
            if weight.dtype != torch.float32:
                raise ExportError(
                    f"packed weight {weight.codes_name} is {weight.dtype}; export needs float32: "
                    "load the model in float32 before ti_fx.capture"
                )
            name, storage = weight.codes_name, encodings[weight.parameter].storage
            layout = self._matrix(weight, storage, tables, blocks)
            # rows are looked up as they are; an integer product reads (inputs, outputs), one by blocks the other way
            turned = not blocks[name] if layout is UINT2 and name in blocks else integers.get(name, False)
            self.layouts[name] = layout.turned if turned and name not in tables else layout

    def _matrix(
        self, weight: PackedWeight, storage: str, tables: set[str], blocks: dict[str, bool]
    ) -> Layout:
        """Return the layout of a weight, transposed or not.

        A table that is only looked up has the smallest: it is as fast, and rows are unpacked as they are read.
        """
        name, shape = weight.codes_name, weight.shape
        if name in tables:
            if name not in self.tied or storage == "base3" or shape[1] % CODES_PER_BYTE:
                return BASE3_ROWS
            return UINT2 if storage == "two-bit" else BYTES_ROWS
        if storage != "two-bit":
            return BASE3 if storage == "base3" else BYTES
        if name in blocks and not shape[int(blocks[name])] % CODES_PER_BYTE:
            return UINT2
        return INT2 if self.opset >= NEWEST_OPSET else BYTES

    def look_up(self, node: Node, table: PackedWeight) -> None:
        """Replace an embedding of a packed table by a look-up that leaves the table packed."""
        layout, scale = self.layouts[table.codes_name], self.scale(node, table)
        rows, columns = table.shape
        if layout is UINT2:
            codes = insert(node, torch.ops.aten.reshape.default, self.stored(node, table), [rows, -1])
            found = insert(node, operators.gather_ternary, codes, scale, node.args[1], columns)
        else:
            codes, values = self.stored(node, table), self._table(node, layout)
            found = insert(node, operators.look_up_by_table, codes, scale, values, node.args[1], columns)
        supersede(node, found)

    def codes(self, weight: PackedWeight, transposed: bool = False) -> Node:
        """Return the int8 codes of a packed weight, or of its transposed matrix, inserted once, right before it."""
        node, layout = weight.node, self.layouts[weight.codes_name]
        if (node, transposed) not in self.int8:
            shape = layout.written(weight.shape)
            codes = self.stored(node, weight)
            if layout not in (INT2, INT2.turned):
                codes = insert(node, operators.codes_from_table, codes, self._table(node, layout), shape)
            if transposed != layout.transposed:
                codes = insert(node, torch.ops.aten.t.default, codes)
            self.int8[node, transposed] = codes
        return self.int8[node, transposed]

    def stored(self, before: Node, weight: PackedWeight, blocks: tuple[int, ...] | None = None) -> Node:
        """Return the marked bytes of a weight, as they are stored; of INT2, its codes.

        They are flat, of a table ``(rows, bytes)``, or have the shape ``blocks`` if whoever asks first gives one: ONNX
        Runtime would copy what it reshapes when it loads the file.
        They are a stand-in, so that the exporter neither holds nor copies them: the file's come from the packed graph.
        """
        layout, name = self.layouts[weight.codes_name], weight.codes_name
        form = blocks or layout.stored(weight.shape)
        read = self._buffer(before, name.replace(".", "_"), lambda: _stand_in(form))
        if layout in (INT2, INT2.turned):
            size, dtype = layout.written(weight.shape), torch.int8
        else:
            size, dtype = tuple(tensor(self.gm, str(read.target)).shape), torch.uint8
        return insert(before, operators.packed, read, name, layout.name, size, dtype)

    def scale_shape(self, weight: PackedWeight) -> torch.Size:
        """Return the shape of the scale."""
        return tensor(self.gm, weight.scale_name).shape

    def scale(self, before: Node, weight: PackedWeight) -> Node:
        """Return the marked scale."""
        arguments = (weight.scale, weight.scale_name, "scale", self.scale_shape(weight), torch.float32)
        return insert(before, operators.packed, *arguments)

    def in_float(self, weight: PackedWeight) -> None:
        """General rule: codes * scale."""
        node = weight.node
        supersede(
            node, insert(node, operators.dequantised_weight, self.codes(weight), self.scale(node, weight))
        )

    def _table(self, before: Node, layout: Layout) -> Node:
        return self._buffer(before, layout.table_name, layout.table)

    def _buffer(self, before: Node, name: str, make: Callable[[], torch.Tensor]) -> Node:
        if name not in self.gm._buffers:
            self.gm.register_buffer(name, make())
        with before.graph.inserting_before(before):
            return before.graph.get_attr(name)
