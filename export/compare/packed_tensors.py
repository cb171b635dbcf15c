"""A file's codes, scales and tables of codes must be the packed graph's, byte by byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule

from ti_fx.errors import ParityError
from ti_fx.export.file.content import FileContent, PackedTensor
from ti_fx.export.file.stored import StoredArray
from ti_fx.find.packed import packed_weights
from ti_fx.ir.edit import tensor
from ti_fx.ir.text import where
from ti_fx.numerics.layouts import LAYOUTS


def compare_tensors(file: FileContent, gm: GraphModule) -> int:
    """Compare codes and scales in a file with those of the packed graph, exactly; return how many there are.

    Raises:
        ParityError: a tensor is missing or differs.
    """
    stored = {item.target: item for item in file.tensors}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for weight in packed_weights(gm):
        shapes |= dict.fromkeys(weight.names) | {weight.codes_name: weight.shape}
    for target, shape in sorted(shapes.items()):
        item = stored.get(target)
        if item is None or item.initializer not in file.stored:
            raise ParityError(
                f"the file has no packed tensor {target}, which {_reader(gm, target)} reads: it is of another graph, "
                "or a tool (a simplifier, a quantiser) unpacked it or put another in its place; check the file that "
                "to_onnx wrote with the graph it came from"
            )
        value = tensor(gm, target).detach()
        if shape is not None and item.kind in LAYOUTS:
            value = LAYOUTS[item.kind].encode(value, shape)
        expected = value.contiguous().view(-1).view(torch.uint8).numpy()
        found = file.stored[item.initializer].raw
        if not np.array_equal(found, expected):
            raise ParityError(
                f"packed tensor {target}, read by {_reader(gm, target)}, is not the graph's in the file: "
                f"{_difference(found, expected)}; check it with the graph it came from"
            )
    # one table serves all weights of a layout, transposed or not; the first of them names it in a message
    readers = {
        LAYOUTS[item.kind].table_name: item for item in reversed(stored.values()) if item.kind in LAYOUTS
    }
    for name in readers.keys() & file.stored.keys():
        _compare_table(file.stored[name], gm, readers[name])
    return len(shapes)


def _compare_table(table: StoredArray, gm: GraphModule, item: PackedTensor) -> None:
    """Compare the table by which a weight's codes are unpacked."""
    layout = LAYOUTS[item.kind]
    expected = layout.table().numpy()
    if table.shape != expected.shape or not np.array_equal(table.raw, expected.view(np.uint8).reshape(-1)):
        raise ParityError(
            f"table {layout.table_name}, by which {item.target}, read by {_reader(gm, item.target)}, is unpacked, is "
            "not what was written; export the file again"
        )


def _reader(gm: GraphModule, target: str) -> str:
    """Return the first node that computes with a packed weight."""
    for weight in packed_weights(gm):
        if target in weight.names:
            return where(next(iter(weight.node.users), weight.node))
    raise AssertionError(target)


def _difference(found: NDArray[Any], expected: NDArray[Any]) -> str:
    if found.shape != expected.shape:
        return f"{found.size} bytes instead of {expected.size}, as of another type"
    differing = np.flatnonzero(found != expected)
    return f"{differing.size} of {expected.size} bytes differ, the first at {differing[0]}"
