"""What can be said about an .onnx file without running it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ti_fx.errors import InputError


def describe(path: Path) -> dict[str, Any]:
    """Return sizes, opsets, inputs, outputs, stored bytes by type and metadata of an ONNX file, as JSON values.

    Raises:
        InputError: the file is missing, damaged or no ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file, or it was cut short; export it again") from error
    if not model.graph.node:
        raise InputError(f"{path} holds no graph; it was cut short or is not an ONNX file: export it again")
    stored: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        stored[onnx.TensorProto.DataType.Name(tensor.data_type)] += _bytes(tensor)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": {value.name: _type(value) for value in model.graph.input},
        "outputs": {value.name: _type(value) for value in model.graph.output},
        "nodes": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        "stored_bytes": dict(stored.most_common()),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
    }


def _bytes(tensor: Any) -> int:
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
    if tensor.raw_data:
        return len(tensor.raw_data)
    return int(onnx.numpy_helper.to_array(tensor).nbytes)


def _type(value: Any) -> str:
    import onnx

    kind = value.type.tensor_type
    sizes = [size.dim_param or str(size.dim_value) for size in kind.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(kind.elem_type).lower()}[{', '.join(sizes)}]"
