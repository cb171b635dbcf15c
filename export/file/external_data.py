"""A model above 2 GB keeps its tensors in a data file beside it (ONNX external data).

::

    student.onnx                            the graph, small tensors, and in its metadata what the other file is
    student.onnx.0123456789abcdef.data      large tensors, one after the other

The data file's name holds the beginning of its SHA-256. So a new pair never overwrites the data that the old model
names, and until the model is renamed the old pair is whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ti_fx.errors import InputError
from ti_fx.export.file.stored import is_external, size_of, span_of
from ti_fx.files import sha256_of

DATA_KEY = "ti_fx.data"
DIGITS = 16  # of the SHA-256 in the data file's name


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
    named = {span_of(tensor).location for tensor in outside}
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
        span = span_of(tensor)
        if span.offset < 0 or span.length != size_of(tensor) or span.offset + span.length > data.bytes:
            raise InputError(
                f"{path} names bytes that {data.name} does not have, or not as many as {tensor.name} takes: it was "
                "changed; export it again"
            )
    return data


def require_data_of(path: Path) -> None:
    """As :func:`require_data`. Of a model without a data file, only the metadata is read; of a damaged one, nothing."""
    if DATA_KEY in metadata_in(path):
        try:
            model = onnx.load(str(path), load_external_data=False)
        except DecodeError:
            return
        require_data(path, model)


def data_file(path: Path) -> Path | None:
    """Return the data file that ``to_onnx`` wrote together with a model, None if there is none."""
    try:
        data = _recorded(path, metadata_in(path)) if path.is_file() else None
    except InputError:
        return None
    own = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{{DIGITS}}}\.data")
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
    if sha256_of(file) != data.sha256:
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


_METADATA_FIELD = 14  # of ModelProto


def metadata_in(path: Path) -> dict[str, str]:
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
