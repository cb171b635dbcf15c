"""A model above 2 GB keeps its tensors in a data file beside it (ONNX external data).

::

    student.onnx                            the graph, small tensors, and in its metadata what the other file is
    student.onnx.0123456789abcdef.data      large tensors, one after the other

The data file's name holds the beginning of its SHA-256. So a new pair never overwrites the data that the old model
names, and until the model is renamed the old pair is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ti_fx.errors import ExportError, InputError

DATA_KEY = "ti_fx.data"
LIMIT = 2_000_000_000  # protobuf refuses messages of 2 GiB; the graph needs some room, too
SIZE_THRESHOLD = 1024  # as onnx.save_model's: what is smaller stays in the model
# ONNX asks for offsets that can be mapped into memory: pages have 4 KiB, on Windows a mapping begins at 64 KiB.
_PAGE, _GRANULE, _LARGE = 4096, 65536, 2**20
_DIGITS = 16


@dataclass(frozen=True)
class DataFile:
    """What a model's metadata says about its data file.

    Attributes:
        name: in the model's own folder.
        bytes: its size.
        sha256: of its content, hexadecimal.
    """

    name: str
    bytes: int
    sha256: str


def write(model: ir.Model, path: Path, external: bool | None, size_threshold: int) -> None:
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
    path.write_bytes(content)


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
    data = DataFile(f"{path.name}.{digest.hexdigest()[:_DIGITS]}.data", size, digest.hexdigest())
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


def require_data(path: Path, model: onnx.ModelProto) -> DataFile | None:
    """Check the data file that a model names: its place, size and SHA-256. Return what it is, None if it needs none.

    Raises:
        InputError: the model names a file that is not beside it, or that its metadata does not know; the data file is
            missing, cut short or another one.
    """
    outside = [tensor for tensor in _tensors(model.graph) if is_external(tensor)]
    data = _recorded(path, {entry.key: entry.value for entry in model.metadata_props})
    if data is None and not outside:
        return None
    named = {_entries(tensor).get("location", "") for tensor in outside}
    for location in sorted(named | ({data.name} if data is not None else set())):
        if location != Path(location).name or location in ("", ".", "..") or "\\" in location:
            raise InputError(
                f"{path} names tensors in {location!r}, which is no file beside it: don't trust it, and export again"
            )
        if data is None or location != data.name:
            raise InputError(
                f"{path} names tensors in {location!r}, which ti_fx.export.to_onnx did not write; export it again"
            )
    assert data is not None
    _require_unchanged(path, data)
    for tensor in outside:
        offset, length = _span(tensor)
        if offset < 0 or length != size_of(tensor) or offset + length > data.bytes:
            raise InputError(
                f"{path} names bytes that {data.name} does not have, or not as many as {tensor.name} takes: it was "
                "changed; export it again"
            )
    return data


def require_data_of(path: Path) -> None:
    """As :func:`require_data`. Of a model without a data file, only the metadata is read; of a damaged one, nothing."""
    if DATA_KEY in _metadata(path):
        try:
            model = onnx.load(str(path), load_external_data=False)
        except DecodeError:
            return
        require_data(path, model)


def data_file(path: Path) -> Path | None:
    """Return the data file that ``to_onnx`` wrote together with a model, None if there is none."""
    try:
        data = _recorded(path, _metadata(path)) if path.is_file() else None
    except InputError:
        return None
    own = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{{_DIGITS}}}\.data")
    return None if data is None or own.fullmatch(data.name) is None else path.with_name(data.name)


def remove(replaced: Path | None, unless: Path | None) -> None:
    """Remove the data file of a model that was replaced, unless the new model has the same.

    Raises:
        InputError: it can't be removed.
    """
    if replaced is None or replaced == unless or not replaced.is_file():
        return
    try:
        replaced.unlink()
    except OSError as error:
        raise InputError(
            f"the new files are written, but {replaced}, which the old model used, can't be removed: "
            f"{error.strerror or error}; remove it"
        ) from error


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's bytes lie in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def external_bytes(tensor: onnx.TensorProto, folder: Path) -> NDArray[np.uint8]:
    """Return the bytes of an external tensor, mapped from a file that :func:`require_data` has checked."""
    offset, length = _span(tensor)
    place = folder / _entries(tensor)["location"]
    return np.memmap(place, dtype=np.uint8, mode="r", offset=offset, shape=(length,))


def _require_unchanged(path: Path, data: DataFile) -> None:
    file = path.parent / data.name
    if file.is_symlink():
        raise InputError(f"{file} is a link; copy the file itself beside {path.name}, under this name")
    if not file.is_file():
        raise InputError(
            f"{path} needs {data.name} beside it, and it is missing; copy both, or export it again"
        )
    size = file.stat().st_size
    if size != data.bytes:
        raise InputError(
            f"{file} has {size:,} bytes, and {data.bytes:,} were written; copy it again, or export {path.name} again"
        )
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != data.sha256:
        raise InputError(
            f"{file} is not what was written (its SHA-256 is another); copy it again, or export {path.name} again"
        )


def _recorded(path: Path, metadata: Mapping[str, str]) -> DataFile | None:
    if DATA_KEY not in metadata:
        return None
    try:
        data = DataFile(**json.loads(metadata[DATA_KEY]))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path}: its metadata {DATA_KEY} can't be read ({error}); export it again"
        ) from error
    if not (isinstance(data.name, str) and isinstance(data.bytes, int) and isinstance(data.sha256, str)):
        raise InputError(
            f"{path}: its metadata {DATA_KEY} holds other types than were written; export it again"
        )
    return data


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a graph: initialisers, attributes, and those of graphs within."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for inner in attribute.graphs:
                yield from _tensors(inner)


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _span(tensor: onnx.TensorProto) -> tuple[int, int]:
    """Return offset and length; (-1, -1) where they are not both given as numbers."""
    entries = _entries(tensor)
    try:
        return int(entries["offset"]), int(entries["length"])
    except (KeyError, ValueError):
        return -1, -1


def size_of(tensor: onnx.TensorProto) -> int | None:
    """Return how many bytes a tensor takes, None of a type that has no size."""
    try:
        each: float = ir.DataType(tensor.data_type).itemsize
    except (ValueError, TypeError):
        return None
    count: int = math.prod(tensor.dims)
    return math.ceil(count * each)


_METADATA_FIELD = 14  # of ModelProto


def _metadata(path: Path) -> dict[str, str]:
    """Read a model's metadata; the graph, which may be large, is passed over. Of a damaged file, what there is."""
    found: dict[str, str] = {}
    limit = path.stat().st_size
    with open(path, "rb") as file:
        while (tag := _number(file)) is not None:
            field, kind = tag >> 3, tag & 7
            if kind == 0:  # protobuf: a number
                _number(file)
            elif kind == 2:  # so many bytes
                size = _number(file)
                if size is None or size > limit:
                    break
                if field != _METADATA_FIELD:
                    file.seek(size, os.SEEK_CUR)
                    continue
                try:
                    entry = onnx.StringStringEntryProto.FromString(file.read(size))
                except DecodeError:
                    break
                found[entry.key] = entry.value
            elif kind in (1, 5):  # eight bytes, four bytes
                file.seek(8 if kind == 1 else 4, os.SEEK_CUR)
            else:
                break
    return found


def _number(file: BinaryIO) -> int | None:
    """Read a protobuf varint; None at the end of the file, or where there is none."""
    result = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        result |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return result
    return None
