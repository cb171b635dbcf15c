"""Packed tensors in the finished ONNX graph: markers become INT2 initialisers, and a table says what is where."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch.fx import GraphModule

from ti_fx.errors import InputError, ParityError
from ti_fx.export.layouts import INT2, LAYOUTS
from ti_fx.export.ops import MARKER_DOMAIN
from ti_fx.export.student import packed_weights
from ti_fx.graph import tensor
from ti_fx.text import where

ENCODING_KEY = "ti_fx.encoding"
REQUANTIZED_KEY = "ti_fx.requantized_from"
TENSORS_KEY = "ti_fx.tensors"


@dataclass(frozen=True)
class PackedTensor:
    """Where a tensor of the packed graph lies in the file.

    Attributes:
        target: the buffer's name in the packed graph.
        initializer: its name in the file, most often the same.
        kind: a layout of ``ti_fx.export.layouts``, or ``scale``.
    """

    target: str
    initializer: str
    kind: str


def to_json(tensors: Iterable[PackedTensor]) -> str:
    """Return the table as it is written into the file's metadata."""
    rows = [asdict(item) for item in tensors]
    for row in rows:
        if row["initializer"] == row["target"]:
            del row["initializer"]
    return json.dumps(rows, separators=(",", ":"))


def from_json(text: str) -> list[PackedTensor]:
    """Undo :func:`to_json`; raises ValueError, TypeError or KeyError for any other text."""
    return [PackedTensor(**{"initializer": row["target"], **row}) for row in json.loads(text)]


def resolve_markers(model: ir.Model) -> list[PackedTensor]:
    """Take every marker out of the graph and return what they marked.

    int2 (transposed):    %c = Packed(%bytes)   becomes   %c = Cast(%codes: INT2 initialiser, to=INT8)
    others:               %s = Packed(%stored)  becomes   %stored, and of a constant no entry is returned
    """
    found: dict[str, PackedTensor] = {}
    graph = model.graph
    for node in [node for node in graph if node.domain == MARKER_DOMAIN]:
        stored = node.inputs[0]
        assert stored is not None
        assert stored.name is not None
        kind = node.attributes["kind"].as_string()
        target = node.attributes["target"].as_string()
        if kind != "constant":
            found[target] = PackedTensor(target, stored.name, kind)
        if kind.startswith(INT2.name):
            _retag(stored, node.attributes["codes_shape"].as_ints())
            cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.INT8)], num_outputs=1)
            ir.convenience.replace_nodes_and_values(graph, node, [node], [cast], node.outputs, cast.outputs)
        else:
            # Not replace_nodes_and_values: it would give the initialiser the marker's name.
            ir.convenience.replace_all_uses_with(node.outputs[0], stored)
            graph.remove(node, safe=True)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    return list(found.values())


def _retag(value: ir.Value, shape: tuple[int, ...]) -> None:
    """Call the bytes of an initialiser what they are: INT2 codes of the given shape. Done once for a shared tensor."""
    if value.dtype == ir.DataType.INT2:
        return
    assert value.const_value is not None
    codes = onnx.TensorProto(
        name=value.name,
        dims=shape,
        data_type=onnx.TensorProto.INT2,
        raw_data=value.const_value.numpy().tobytes(),
    )
    value.const_value = ir.serde.deserialize_tensor(codes)
    value.dtype, value.shape = ir.DataType.INT2, ir.Shape(shape)


def raw_bytes(stored: onnx.TensorProto) -> NDArray[Any]:
    """Return an initialiser's raw bytes as a flat uint8 array."""
    if stored.HasField("raw_data"):
        return np.frombuffer(stored.raw_data, dtype=np.uint8)
    return np.frombuffer(onnx.numpy_helper.to_array(stored).tobytes(), dtype=np.uint8)


@dataclass(frozen=True)
class FileContent:
    """An exported file, read but not run.

    Attributes:
        encoding: its encoding.
        requantized_from: the encoding it was trained with, where that is another one.
        tensors: where the packed tensors are.
        initializers: every stored tensor by name.
        metadata: all metadata by name.
    """

    encoding: str
    requantized_from: str | None
    tensors: tuple[PackedTensor, ...]
    initializers: dict[str, onnx.TensorProto]
    metadata: dict[str, str]


def open_file(path: str | os.PathLike[str]) -> FileContent:
    """Read a file written by ``to_onnx``.

    Raises:
        InputError: the file is missing, damaged, or not by ti_fx.
    """
    path = Path(path)
    try:
        return content_of(onnx.load_from_string(path.read_bytes()))
    except OSError as error:
        raise InputError(
            f"can't read {path}: {error.strerror or error}; export it with ti_fx.export.to_onnx"
        ) from error
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file, or it was cut short; export it again") from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} was not written by ti_fx.export.to_onnx, or it was cut short ({error}); export it again"
        ) from error


def content_of(model: onnx.ModelProto) -> FileContent:
    """Read a model's content; raises KeyError, ValueError or TypeError if ti_fx did not write it."""
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return FileContent(
        encoding=metadata[ENCODING_KEY],
        requantized_from=metadata.get(REQUANTIZED_KEY),
        tensors=tuple(from_json(metadata[TENSORS_KEY])),
        initializers={tensor.name: tensor for tensor in model.graph.initializer},
        metadata=metadata,
    )


def compare_tensors(content: FileContent, gm: GraphModule) -> int:
    """Compare codes and scales in a file with those of the packed graph, exactly; return how many there are.

    Raises:
        ParityError: a tensor is missing or differs.
    """
    stored = {item.target: item for item in content.tensors}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for weight in packed_weights(gm):
        shapes |= {weight.codes_name: weight.shape, weight.scale_name: None}
    for target, shape in sorted(shapes.items()):
        item = stored.get(target)
        if item is None or item.initializer not in content.initializers:
            raise ParityError(f"the file has no packed tensor {target}; check it with the graph it came from")
        value = tensor(gm, target).detach()
        if shape is not None and item.kind in LAYOUTS:
            value = LAYOUTS[item.kind].encode(value, shape)
        expected = value.contiguous().view(-1).view(torch.uint8).numpy()
        found = raw_bytes(content.initializers[item.initializer])
        if not np.array_equal(found, expected):
            raise ParityError(
                f"packed tensor {target}, read by {_reader(gm, target)}, is not the graph's in the file: "
                f"{_difference(found, expected)}; check it with the graph it came from"
            )
    return len(shapes)


def _reader(gm: GraphModule, target: str) -> str:
    """Return the first node that computes with a packed weight."""
    for weight in packed_weights(gm):
        if target in (weight.codes_name, weight.scale_name):
            return where(next(iter(weight.node.users), weight.node))
    raise AssertionError(target)


def _difference(found: NDArray[Any], expected: NDArray[Any]) -> str:
    if found.shape != expected.shape:
        return f"{found.size} bytes instead of {expected.size}"
    differing = np.flatnonzero(found != expected)
    return f"{differing.size} of {expected.size} bytes differ, the first at {differing[0]}"
