"""An exported file stores its packed tensors as initialisers, and a table in its metadata says which is which."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule

from ti_fx.errors import InputError, ParityError
from ti_fx.export.file import external_data
from ti_fx.find.packed import packed_weights
from ti_fx.ir.edit import tensor
from ti_fx.ir.text import where
from ti_fx.numerics.encodings import WeightEncodings
from ti_fx.numerics.layouts import INT2, LAYOUTS, Layout
from ti_fx.passes.lower.operators import MARKER_DOMAIN

ENCODING_KEY, WEIGHTS_KEY = "ti_fx.encoding", "ti_fx.weight_encodings"
REQUANTIZED_KEY, REQUANTIZED_WEIGHTS_KEY = "ti_fx.requantized_from", "ti_fx.weights_requantized_from"
TENSORS_KEY = "ti_fx.tensors"


@dataclass(frozen=True)
class PackedTensor:
    """Where a tensor of the packed graph lies in the file.

    Attributes:
        target: the buffer's name in the packed graph.
        initializer: its name in the file, most often the same.
        kind: a layout of ``ti_fx.numerics.layouts``, or ``scale``.
    """

    target: str
    initializer: str
    kind: str


def to_json(tensors: Iterable[PackedTensor]) -> str:
    """Return the table as it is written into the file's metadata: by kind, ``target`` or ``[target, initializer]``."""
    kinds: dict[str, list[Any]] = {}
    for item in tensors:
        renamed = item.initializer != item.target
        kinds.setdefault(item.kind, []).append([item.target, item.initializer] if renamed else item.target)
    return json.dumps(kinds, separators=(",", ":"))


def from_json(text: str) -> list[PackedTensor]:
    """Undo :func:`to_json`; raises ValueError, TypeError or KeyError for any other text."""
    found = []
    for kind, entries in dict(json.loads(text)).items():
        for entry in entries:
            target, initializer = (entry, entry) if isinstance(entry, str) else entry
            found.append(PackedTensor(target, initializer, kind))
    return found


def encoding_entries(encoding: WeightEncodings) -> dict[str, str]:
    """Return the metadata that says by what encodings a file's weights are stored and compute."""
    return _entries(encoding, ENCODING_KEY, WEIGHTS_KEY)


def requantized_entries(trained: WeightEncodings) -> dict[str, str]:
    """Return the metadata that says with what other encodings the weights were trained."""
    return _entries(trained, REQUANTIZED_KEY, REQUANTIZED_WEIGHTS_KEY)


def _entries(encoding: WeightEncodings, key: str, weights_key: str) -> dict[str, str]:
    others = {weights_key: json.dumps(dict(encoding.others))} if encoding.others else {}
    return {key: encoding.name, **others}


def encoding_in(metadata: Mapping[str, str]) -> WeightEncodings:
    """Return the encodings of a file's weights; raises KeyError if ti_fx did not write it.

    Raises:
        InputError: what the metadata says of single weights is damaged.
    """
    return WeightEncodings(metadata[ENCODING_KEY], _others(metadata, WEIGHTS_KEY))


def requantized_in(metadata: Mapping[str, str]) -> WeightEncodings | None:
    """Return the encodings that a file's weights were trained with, None where they are the file's own.

    Raises:
        InputError: what the metadata says of single weights is damaged.
    """
    if REQUANTIZED_KEY not in metadata:
        return None
    return WeightEncodings(metadata[REQUANTIZED_KEY], _others(metadata, REQUANTIZED_WEIGHTS_KEY))


def _others(metadata: Mapping[str, str], key: str) -> dict[str, str]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise InputError(f"the file's metadata {key} is damaged; export it again")
    return value


def resolve_markers(model: ir.Model, gm: GraphModule) -> list[PackedTensor]:
    """Take every marker out of the graph, store what they mark, and return where it is.

    int2 (transposed):    %c = Packed(%stand_in)   becomes   %c = Cast(%codes: INT2 initialiser, to=INT8)
    others with codes:    %c = Packed(%stand_in)   becomes   %codes
    others:               %s = Packed(%stored)     becomes   %stored, and of a constant no entry is returned

    Codes are lazy: they are brought into their layout when the file is written, one weight after the other.

    Args:
        model: the exported model.
        gm: the packed graph that it was made from.
    """
    shapes = {weight.codes_name: weight.shape for weight in packed_weights(gm)}
    found: dict[str, PackedTensor] = {}
    graph = model.graph
    for node in [node for node in graph if node.domain == MARKER_DOMAIN]:
        stored = node.inputs[0]
        assert stored is not None
        assert stored.name is not None
        kind = node.attributes["kind"].as_string()
        target = node.attributes["target"].as_string()
        if kind in LAYOUTS:
            codes = graph.initializers.get(target) or _codes(
                tensor(gm, target), target, LAYOUTS[kind], shapes[target], stored.shape
            )
            graph.initializers[target] = codes
            found[target] = PackedTensor(target, target, kind)
            node.replace_input_with(0, codes)
            if not stored.uses():
                del graph.initializers[stored.name]
            stored = codes
        elif kind != "constant":
            found[target] = PackedTensor(target, stored.name or target, kind)
        if kind.startswith(INT2.name):
            cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.INT8)], num_outputs=1)
            ir.convenience.replace_nodes_and_values(graph, node, [node], [cast], node.outputs, cast.outputs)
        else:
            # Not replace_nodes_and_values: it would give the initialiser the marker's name.
            ir.convenience.replace_all_uses_with(node.outputs[0], stored)
            graph.remove(node, safe=True)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    return list(found.values())


def _codes(
    packed: Tensor, name: str, layout: Layout, shape: tuple[int, ...], bytes_shape: ir.Shape | None
) -> ir.Value:
    """Return an initialiser of a weight's codes, which are brought into their layout whenever they are read."""
    assert bytes_shape is not None
    is_int2 = layout.name.startswith(INT2.name)
    dtype = ir.DataType.INT2 if is_int2 else ir.DataType.UINT8
    size = ir.Shape(layout.written(shape)) if is_int2 else bytes_shape

    def encoded() -> ir.TensorProtocol:
        content = layout.encode(packed, shape).numpy()
        return (
            ir.PackedTensor(content, dtype, shape=size)
            if is_int2
            else ir.tensor(content.reshape(size.numpy()))
        )

    value = ir.Value(name=name, shape=size, type=ir.TensorType(dtype))
    value.const_value = ir.LazyTensor(encoded, dtype, size, name=name)
    return value


@dataclass(frozen=True)
class FileContent:
    """An exported file, read but not run.

    Attributes:
        encoding: the encodings of its weights.
        requantized_from: those it was trained with, where they are others.
        tensors: where the packed tensors are.
        inputs: the shape of each input by name: numbers, and names of dynamic axes.
        outputs: the same of each output.
        initializers: every stored tensor by name; its values may lie in the data file.
        metadata: all metadata by name.
        folder: where the data file is, if there is one.
        data: what that file is, None if there is none.
        model: all of it.
    """

    encoding: WeightEncodings
    requantized_from: WeightEncodings | None
    tensors: tuple[PackedTensor, ...]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    initializers: dict[str, onnx.TensorProto]
    metadata: dict[str, str]
    folder: Path
    data: external_data.DataFile | None
    model: onnx.ModelProto

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return a stored tensor's bytes, flat; of a data file, they are mapped, not read."""
        stored = self.initializers[name]
        if external_data.is_external(stored):
            return external_data.external_bytes(stored, self.folder)
        if stored.HasField("raw_data"):
            return np.frombuffer(stored.raw_data, dtype=np.uint8)
        return np.frombuffer(onnx.numpy_helper.to_array(stored).tobytes(), dtype=np.uint8)

    def is_whole(self, name: str) -> bool:
        """Whether a stored tensor has as many bytes as its type and shape say."""
        return self.raw(name).nbytes == external_data.size_of(self.initializers[name])

    def array(self, name: str) -> NDArray[Any]:
        """Return a stored tensor that is whole, of a type that NumPy has."""
        stored = self.initializers[name]
        if not external_data.is_external(stored):
            return onnx.numpy_helper.to_array(stored)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(stored.data_type)
        return self.raw(name).view(dtype).reshape(tuple(stored.dims))


def open_file(path: str | os.PathLike[str]) -> FileContent:
    """Read a file written by ``to_onnx``.

    Raises:
        InputError: the file or its data file is missing, damaged, or not by ti_fx.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # nor may a pipe be waited for
        raise InputError(f"{path} is no file; export one with ti_fx.export.to_onnx")
    try:
        model = onnx.load_from_string(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"can't read {path}: {error.strerror or error}; export it with ti_fx.export.to_onnx"
        ) from error
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file, or it was cut short; export it again") from error
    data = external_data.require_data(path, model)
    try:
        return content_of(model, path.parent, data)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} was not written by ti_fx.export.to_onnx, or it was cut short ({error}); export it again"
        ) from error


def content_of(model: onnx.ModelProto, folder: Path, data: external_data.DataFile | None) -> FileContent:
    """Return a model's content; raises KeyError, ValueError or TypeError if ti_fx did not write it."""
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return FileContent(
        encoding=encoding_in(metadata),
        requantized_from=requantized_in(metadata),
        tensors=tuple(from_json(metadata[TENSORS_KEY])),
        inputs=_shapes(model.graph.input),
        outputs=_shapes(model.graph.output),
        initializers={tensor.name: tensor for tensor in model.graph.initializer},
        metadata=metadata,
        folder=folder,
        data=data,
        model=model,
    )


def _shapes(values: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[int | str, ...]]:
    return {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in values
    }


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
            raise ParityError(
                f"the file has no packed tensor {target}, which {_reader(gm, target)} reads; check it with the graph "
                "it came from"
            )
        value = tensor(gm, target).detach()
        if shape is not None and item.kind in LAYOUTS:
            value = LAYOUTS[item.kind].encode(value, shape)
        expected = value.contiguous().view(-1).view(torch.uint8).numpy()
        found = content.raw(item.initializer)
        if not np.array_equal(found, expected):
            raise ParityError(
                f"packed tensor {target}, read by {_reader(gm, target)}, is not the graph's in the file: "
                f"{_difference(found, expected)}; check it with the graph it came from"
            )
    # one table serves all weights of a layout, transposed or not; the first of them names it in a message
    readers = {
        LAYOUTS[item.kind].table_name: item for item in reversed(stored.values()) if item.kind in LAYOUTS
    }
    for name in readers.keys() & content.initializers.keys():
        _compare_table(content, gm, readers[name])
    return len(shapes)


def _compare_table(content: FileContent, gm: GraphModule, item: PackedTensor) -> None:
    """Compare the table by which a weight's codes are unpacked."""
    layout = LAYOUTS[item.kind]
    found, expected = content.raw(layout.table_name), layout.table().numpy()
    if list(content.initializers[layout.table_name].dims) != list(expected.shape) or not np.array_equal(
        found, expected.view(np.uint8).reshape(-1)
    ):
        raise ParityError(
            f"table {layout.table_name}, by which {item.target}, read by {_reader(gm, item.target)}, is unpacked, is "
            "not what was written; export the file again"
        )


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
