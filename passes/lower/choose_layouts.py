"""Each packed weight gets the layout in which the file stores it: one that suits who reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from ti_fx.errors import ExportError
from ti_fx.find.packed import PackedWeight, looked_up, packed_weights, weight_encodings
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.numerics.codes import CODES_PER_BYTE
from ti_fx.numerics.encodings import NEWEST_OPSET, Storage
from ti_fx.numerics.layouts import BASE3, BASE3_ROWS, BYTES, BYTES_ROWS, INT2, UINT2, Layout
from ti_fx.passes.lower.opset import opset_of
from ti_fx.passes.lower.products import Product, products
from ti_fx.passes.lower.stored import set_layout


@dataclass(frozen=True)
class ChooseLayouts(Pass):
    """A weight is stored once, as its readers read it; the passes that follow write those readers.

    before:  %w = unpack_ternary(%codes, %scale)     after:  %w = unpack_ternary(%codes, %scale)  stored as int2

    1. a table that is only looked up: the smallest, a row begins with a byte   2. a table that a product reads, too
    3. what the encoding stores in bytes or in base 3   4. of a product by blocks: as MatMulNBits reads it
    5. any other: INT2 where the opset has it

    Stored transposed is what its product reads so: ONNX Runtime would transpose it when it loads the file.
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Record a layout for each weight.

        Raises:
            ExportError: a packed weight is not float32.
        """
        encodings, readers = weight_encodings(gm), _Readers.of(gm)
        for weight in packed_weights(gm):
            if weight.dtype != torch.float32:
                raise ExportError(
                    f"packed weight {weight.codes_name} is {weight.dtype}; export needs float32: "
                    "load the model in float32 before ti_fx.capture"
                )
            storage = encodings[weight.parameter].storage
            set_layout(weight, readers.layout(weight, storage, opset_of(gm)))


@dataclass(frozen=True)
class _Readers:
    """Who reads the packed weights, by the name of their codes.

    Attributes:
        tables: weights that are looked up.
        tied: those of them that something else reads, too.
        integers: weights that an integer product reads, and whether each is ``(outputs, inputs)``.
        blocks: the same of products by blocks; they can read weights whose inputs are a multiple of 4.
    """

    tables: set[str]
    tied: set[str]
    integers: dict[str, bool]
    blocks: dict[str, bool]

    @staticmethod
    def of(gm: GraphModule) -> _Readers:
        """Return who reads the packed weights of a graph."""
        found = products(gm.graph)
        tables = {table.codes_name for node in gm.graph.nodes if (table := looked_up(node)) is not None}
        tied = {
            weight.codes_name
            for weight in packed_weights(gm)
            if weight.codes_name in tables and any(looked_up(reader) is None for reader in weight.node.users)
        }
        return _Readers(tables, tied, _orientation(found, False), _orientation(found, True))

    def layout(self, weight: PackedWeight, storage: Storage, opset: int) -> Layout:
        """Return how a weight is stored."""
        name, layout = weight.codes_name, self._matrix(weight, storage, opset)
        # rows are looked up as they are; an integer product reads (inputs, outputs), one by blocks the other way
        reads_blocks = layout is UINT2 and name in self.blocks
        turned = not self.blocks[name] if reads_blocks else self.integers.get(name, False)
        return layout.turned if turned and name not in self.tables else layout

    def _matrix(self, weight: PackedWeight, storage: Storage, opset: int) -> Layout:
        """Return the layout of a weight, transposed or not."""
        name, shape = weight.codes_name, weight.shape
        if name in self.tables:
            if name not in self.tied or storage == "base3" or shape[1] % CODES_PER_BYTE:
                return BASE3_ROWS
            # GatherBlockQuantized has one block a row here, and adds nothing
            plain = not weight.group and weight.offset is None
            return UINT2 if storage == "two-bit" and plain else BYTES_ROWS
        if storage != "two-bit":
            return BASE3 if storage == "base3" else BYTES
        if name in self.blocks and not shape[int(self.blocks[name])] % CODES_PER_BYTE:
            return UINT2
        return INT2 if opset >= NEWEST_OPSET else BYTES


def _orientation(found: list[Product], by_blocks: bool) -> dict[str, bool]:
    """Return whether each weight of products by blocks, or of others, is ``(outputs, inputs)``."""
    return {one.weight.codes_name: one.transposed for one in found if bool(one.quantiser.block) == by_blocks}
