"""An exported file is read: its graph, the table of its stored tensors, and what its metadata says of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ti_fx.errors import InputError
from ti_fx.export.file.external_data import DataFile, require_data
from ti_fx.export.file.stored import StoredArray, stored_array
from ti_fx.numerics.encodings import WeightEncodings

ENCODING_KEY, WEIGHTS_KEY = "ti_fx.encoding", "ti_fx.weight_encodings"
REQUANTIZED_KEY, REQUANTIZED_WEIGHTS_KEY = "ti_fx.requantized_from", "ti_fx.weights_requantized_from"
TENSORS_KEY = "ti_fx.tensors"


@dataclass(frozen=True)
class PackedTensor:
    """Where a tensor of the packed graph lies in the file.

    Attributes:
        target: the buffer's name in the packed graph.
        initializer: its name in the file, most often the same.
        kind: a layout of ``ti_fx.numerics.layouts``, or ``scale``, which an offset is, too.
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


@dataclass(frozen=True)
class FileContent:
    """An exported file, read but not run.

    Attributes:
        path: where it is.
        encoding: the encodings of its weights.
        requantized_from: those it was trained with, where they are others.
        tensors: where the packed tensors are.
        inputs: the shape of each input by name: numbers, and names of dynamic axes.
        outputs: the same of each output.
        stored: every stored tensor by name; its values may lie in the data file.
        metadata: all metadata by name.
        data: what the data file is, None if there is none.
        model: all of it.
    """

    path: Path
    encoding: WeightEncodings
    requantized_from: WeightEncodings | None
    tensors: tuple[PackedTensor, ...]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    stored: dict[str, StoredArray]
    metadata: dict[str, str]
    data: DataFile | None
    model: onnx.ModelProto

    @property
    def packed(self) -> set[str]:
        """The names of the packed tensors in the file."""
        return {item.initializer for item in self.tensors}


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
    data = require_data(path, model)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        return FileContent(
            path=path,
            encoding=encoding_in(metadata),
            requantized_from=requantized_in(metadata),
            tensors=tuple(from_json(metadata[TENSORS_KEY])),
            inputs=_shapes(model.graph.input),
            outputs=_shapes(model.graph.output),
            stored={tensor.name: stored_array(tensor, path.parent) for tensor in model.graph.initializer},
            metadata=metadata,
            data=data,
            model=model,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} was not written by ti_fx.export.to_onnx, or a tool dropped its metadata, or it was cut short "
            f"({error}); export it again"
        ) from error


def _shapes(values: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[int | str, ...]]:
    return {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in values
    }
