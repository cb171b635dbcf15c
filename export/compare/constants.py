"""An export compares the file's unpacked constants with the graph's, bit by bit: biases, norms, masks, tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.errors import ParityError
from ti_fx.export.file.content import FileContent
from ti_fx.ir.edit import aten_name, tensor
from ti_fx.ir.leaves import BatchNorm
from ti_fx.ir.text import where

# The exporter stores a transposed weight under a name of its own. It is taken for one of which it has so much.
_ALIKE = 0.9


def compare_constants(file: FileContent, gm: GraphModule) -> int:
    """Compare every stored tensor that the graph has, too, bit by bit; return how many there are.

    One with the graph's name is the graph's tensor. One without is, if it has most of a matrix's values, perhaps
    transposed. What the exporter has computed from several tensors (a convolution's weight and a batch norm's) is left
    to the comparison of nodes.

    Raises:
        ParityError: a constant differs; names the first node that reads it.
    """
    stored = _constants(file)
    readers = {str(node.target): node for node in reversed(list(gm.graph.find_nodes(op="get_attr")))}
    own = {
        name: _array(tensor(gm, name))
        for name, holder in readers.items()
        if not any(_is_normalised_convolution(reader, gm) for reader in holder.users)
    }
    compared = [name for name in own if name in stored]
    for name in compared:
        _require_equal(name, stored.pop(name), own[name], readers[name])
    named = set(compared)
    for name, expected in own.items():
        if name in named or expected.ndim != 2 or expected.dtype.kind != "f":
            continue
        for candidate, value in stored.items():
            for found in (value, value.T):
                if _is_the_same(found, expected):
                    _require_equal(name, found, expected, readers[name])
                    compared.append(candidate)
                    break
    return len(compared)


def _is_normalised_convolution(node: Node, gm: GraphModule) -> bool:
    """Whether the exporter multiplies a batch norm into a node's weight."""
    return "conv" in aten_name(node) and any(
        aten_name(reader) == "batch_norm"
        or (reader.op == "call_module" and isinstance(gm.get_submodule(str(reader.target)), BatchNorm))
        for reader in node.users
    )


def _is_the_same(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    counted = expected != 0
    return bool(counted.any()) and float(np.mean(_same(found, expected)[counted])) > _ALIKE


def _constants(file: FileContent) -> dict[str, NDArray[Any]]:
    """Return the tensors that are compared here; one that has not the bytes it needs is left to the record."""
    proto, packed = onnx.TensorProto, file.packed
    kinds = (proto.FLOAT, proto.FLOAT16, proto.BFLOAT16, proto.DOUBLE, proto.INT64, proto.BOOL)
    return {
        name: _widened(one.array)
        for name, one in file.stored.items()
        if name not in packed and one.dtype in kinds and one.is_whole
    }


def _array(value: Tensor) -> NDArray[Any]:
    """Return a tensor's values; numpy has no bfloat16, and float32 holds each exactly."""
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _widened(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def _same(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.bool_]:
    both_nan = np.isnan(found) & np.isnan(expected) if found.dtype.kind == "f" else False
    same: NDArray[np.bool_] = (found == expected) | both_nan
    return same


def _require_equal(name: str, found: NDArray[Any], expected: NDArray[Any], holder: Node) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ParityError(
            f"constant {name}, read by {_reader(holder)}, is {found.dtype}{list(found.shape)} in the file and "
            f"{expected.dtype}{list(expected.shape)} in the graph"
        )
    same = _same(found, expected)
    if not same.all():
        place = [int(index) for index in np.argwhere(~same)[0]]
        raise ParityError(
            f"constant {name}, read by {_reader(holder)}, is not the graph's: {int((~same).sum())} of {same.size} "
            f"values differ, the first at {place}"
        )


def _reader(holder: Node) -> str:
    """Return the first node that computes with a stored tensor."""
    return where(next(iter(holder.users), holder))
