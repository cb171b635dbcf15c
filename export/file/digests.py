"""An exported file holds a digest of each node, by which a later change is found and its node named.

Comparing numbers can't find an epsilon in its last bit, or a mask's constant beyond the sizes that were run. The record
holds a digest for each node of the packed graph that the file has, of its operators, their attributes, the values they
read and the constants among those, and one for each other part of the file. Of packed tensors, whose bytes are compared
with the graph's, it holds types and shapes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ti_fx.errors import InputError
from ti_fx.export.file.content import FileContent
from ti_fx.export.file.external_data import DATA_KEY
from ti_fx.export.file.intact import INTACT_KEY

RECORD_KEY = "ti_fx.record"
_DIGITS = 8
# Names of the parts that are no nodes: no node's name has a slash.
_OPSETS, _INPUTS, _OUTPUTS, _METADATA, _CONSTANTS = (
    "/opsets",
    "/inputs",
    "/outputs",
    "/metadata",
    "/constants",
)


def record_of(model: ir.Model, packed: Collection[str]) -> str:
    """Return the record of a finished model, as JSON: a digest by name.

    Args:
        model: with all its metadata but this one.
        packed: the names of its packed tensors.
    """
    constants = {}
    for name, value in model.graph.initializers.items():
        stored = value.const_value
        if stored is not None:
            content = None if name in packed else _flat_bytes(stored.numpy())
            constants[name] = _of_tensor(stored.dtype.value, stored.shape.numpy(), content)
    parts = _parts(
        dict(model.opset_imports),
        [ir.serde.serialize_value(value) for value in model.graph.inputs],
        [ir.serde.serialize_value(value) for value in model.graph.outputs],
        dict(model.metadata_props),
    )
    digests = _digests(map(ir.serde.serialize_node, model.graph), constants)
    return json.dumps(parts | digests, separators=(",", ":"))


def digests_of(file: FileContent) -> dict[str, str]:
    """Return what the record of a file would be, were it written now: a digest by the name of a node or a part."""
    packed = file.packed
    constants = {
        name: _of_tensor(one.dtype, one.shape, None if name in packed else one.raw)
        for name, one in file.stored.items()
    }
    graph = file.model.graph
    opsets = {entry.domain: entry.version for entry in file.model.opset_import}
    parts = _parts(opsets, graph.input, graph.output, file.metadata)
    return parts | _digests(graph.node, constants)


def recorded(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the record that a file was written with.

    Raises:
        InputError: the file has none, or it is damaged.
    """
    try:
        return dict(json.loads(metadata[RECORD_KEY]))
    except (KeyError, ValueError, TypeError):
        raise InputError(
            f"the file's metadata {RECORD_KEY} is missing or damaged, so nobody can say whether it was changed; "
            "export it again"
        ) from None


def _digests(nodes: Iterable[onnx.NodeProto], constants: Mapping[str, bytes]) -> dict[str, str]:
    found: dict[str, hashlib._Hash] = {}
    unread = dict(constants)
    for node in nodes:
        digest = found.setdefault(owner(node), hashlib.sha256())
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        for field in ("name", "doc_string", "metadata_props"):
            plain.ClearField(field)
        digest.update(plain.SerializeToString(deterministic=True))
        for name in node.input:
            digest.update(constants.get(name, b""))
            unread.pop(name, None)
    found[_CONSTANTS] = hashlib.sha256(b"".join(unread[name] for name in sorted(unread)))
    return {name: digest.hexdigest()[:_DIGITS] for name, digest in found.items()}


def _parts(
    opsets: Mapping[str, int],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
    metadata: Mapping[str, str],
) -> dict[str, str]:
    said = {  # what others add is theirs
        key: value
        for key, value in metadata.items()
        if key.startswith("ti_fx.") and key not in (RECORD_KEY, DATA_KEY, INTACT_KEY)
    }
    content = {
        _OPSETS: json.dumps(opsets, sort_keys=True).encode(),
        _INPUTS: b"".join(map(_of_value, inputs)),
        _OUTPUTS: b"".join(map(_of_value, outputs)),
        _METADATA: json.dumps(said, sort_keys=True).encode(),
    }
    return {name: hashlib.sha256(value).hexdigest()[:_DIGITS] for name, value in content.items()}


def _of_value(value: onnx.ValueInfoProto) -> bytes:
    described: bytes = value.type.SerializeToString(deterministic=True)
    return value.name.encode() + b"\0" + described


def _of_tensor(dtype: int, shape: Iterable[int], content: NDArray[np.uint8] | None) -> bytes:
    digest = hashlib.sha256(json.dumps([dtype, *map(int, shape)]).encode())
    if content is not None:
        digest.update(content.data)
    return digest.digest()


def _flat_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def owner(node: onnx.NodeProto) -> str:
    """Return the packed graph's node that an operator is, or leads to (see ``ti_fx.export.file.names``)."""
    return owner_of(node.output[0]) if node.output else node.op_type


def owner_of(value: str) -> str:
    """Return the packed graph's node that a value of the file is, or leads to."""
    return value.partition("/")[0]
