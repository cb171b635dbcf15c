"""A finished ONNX model is written: as one file, or above 2 GB with a data file beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import onnx_ir as ir

from ti_fx.errors import ExportError
from ti_fx.export.file.external_data import DATA_KEY, DIGITS, DataFile
from ti_fx.export.file.intact import with_digest

LIMIT = 2_000_000_000  # protobuf refuses messages of 2 GiB; the graph needs some room, too
SIZE_THRESHOLD = 1024  # as onnx.save_model's: what is smaller stays in the model
# ONNX asks for offsets that can be mapped into memory: pages have 4 KiB, on Windows a mapping begins at 64 KiB.
_PAGE, _GRANULE, _LARGE = 4096, 65536, 2**20


def write_model(model: ir.Model, path: Path, external: bool | None, size_threshold: int) -> None:
    """Write a model, and its large tensors to a data file beside it, one in memory at a time. Not atomic.

    Args:
        model: its initialisers may be lazy; those that go to the data file are external tensors afterwards.
        path: of the model; the data file is named after it.
        external: whether to write a data file; None writes one above 2 GB.
        size_threshold: bytes from which on a tensor goes there.

    Raises:
        ExportError: the model does not fit a single file.
    """
    stored = {
        value: value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None
    }
    size = sum(tensor.nbytes for tensor in stored.values())
    if external is False and size > LIMIT:
        raise ExportError(f"{size / 1e9:.2f} GB don't fit one ONNX file (2 GB); leave external_data out")
    if external or size > LIMIT:
        _write_data(
            model, [value for value, tensor in stored.items() if _moves(tensor, size_threshold)], path
        )
    try:
        content = ir.serde.serialize_model(model).SerializeToString()
    except Exception as error:  # protobuf says EncodeError or ValueError, by version
        raise ExportError(f"the model does not fit one ONNX file (2 GB): {error}") from error
    path.write_bytes(with_digest(content))


def _moves(tensor: ir.TensorProtocol, size_threshold: int) -> bool:
    # ONNX Runtime needs sizes and shapes, which are small integers, before it reads the data
    is_size = tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32)
    return tensor.nbytes >= max(1, size_threshold, SIZE_THRESHOLD if is_size else 0)


def _write_data(model: ir.Model, values: list[ir.Value], path: Path) -> None:
    digest, places = hashlib.sha256(), []
    unnamed = path.with_name(f"{path.name}.data")
    with open(unnamed, "wb") as file:
        for value in values:
            assert value.const_value is not None
            content = value.const_value.tobytes()
            step = _GRANULE if len(content) >= _LARGE else _PAGE
            gap = bytes(-file.tell() % step)
            digest.update(gap)
            file.write(gap)
            places.append((file.tell(), len(content)))
            digest.update(content)
            file.write(content)
        size = file.tell()
    data = DataFile(f"{path.name}.{digest.hexdigest()[:DIGITS]}.data", size, digest.hexdigest())
    unnamed.rename(path.with_name(data.name))
    for value, (offset, length) in zip(values, places, strict=True):
        old = value.const_value
        assert old is not None
        assert value.name is not None
        shape = ir.Shape(old.shape.numpy())
        value.const_value = ir.ExternalTensor(
            data.name, offset, length, old.dtype, shape=shape, name=value.name, base_dir=path.parent
        )
    model.metadata_props[DATA_KEY] = json.dumps(asdict(data))
