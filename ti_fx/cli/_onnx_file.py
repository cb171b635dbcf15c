"""Describes an .onnx file without running it: of one that ti_fx wrote, what it is and where it is from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ti_fx.cli import _output as output
from ti_fx.cli._structure import starred
from ti_fx.errors import InputError

_LARGEST = 12


def describe(path: Path) -> dict[str, Any]:
    """Return what an ONNX file holds, as JSON values; ``ti_fx`` is None of a file that ti_fx did not write.

    Raises:
        InputError: the file or its data file is missing or damaged, it is no ONNX, or what it says of itself can't be
            read.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from ti_fx.export.file import external_data

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file, or it was cut short; export it again") from error
    if not model.graph.node:
        raise InputError(f"{path} holds no graph; it was cut short or is not an ONNX file: export it again")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    data = external_data.require_data(path, model) if external_data.DATA_KEY in metadata else None
    tensors = _tensors(model, metadata)
    stored: Counter[str] = Counter()
    for row in tensors:
        stored[row["type"]] += row["bytes"]
    return {
        "file": str(path),
        "bytes": path.stat().st_size + (0 if data is None else data.bytes),
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": {value.name: _type(value) for value in model.graph.input},
        "outputs": {value.name: _type(value) for value in model.graph.output},
        "nodes": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        "stored_bytes": dict(stored.most_common()),
        "tensors": tensors,
        "ti_fx": _own_facts(metadata),
        "metadata": metadata,
    }


def _own_facts(written: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what ti_fx wrote about the file, None if it did not write it."""
    from ti_fx.export.file import content, metadata
    from ti_fx.export.file.checks import from_json
    from ti_fx.export.file.minimum_runtime import MINIMUM_RUNTIME

    if content.ENCODING_KEY not in written:
        return None
    dependent = (
        [str(name) for name in metadata.value_of(written, metadata.BATCH_DEPENDENT, [])]
        if metadata.BATCH_DEPENDENT in written
        else None
    )
    trained = content.requantized_in(written)
    return {
        "encoding": str(content.encoding_in(written)),
        "requantized_from": None if trained is None else str(trained),
        "batch_invariant": None if dependent is None else not dependent,
        "batch_dependent": dependent,
        "kept": metadata.value_of(written, metadata.KEPT, {}),
        "source": metadata.value_of(written, metadata.SOURCE, {}),
        "largest": metadata.value_of(written, metadata.LARGEST, {}),
        "assumptions": metadata.value_of(written, metadata.ASSUMPTIONS, {}),
        "checks": {
            check.message: bool(check.rows)
            for check in from_json(metadata.value_of(written, metadata.CHECKS, {}))
        },
        "recipe": metadata.value_of(written, metadata.RECIPE, None),
        "recipe_sha256": written.get(metadata.RECIPE_HASH),
        "tensors_sha256": written.get(metadata.TENSORS_HASH),
        "minimum_onnxruntime": written.get(MINIMUM_RUNTIME),
        "versions": metadata.value_of(written, metadata.VERSIONS, {}),
    }


def _tensors(model: Any, metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return every stored tensor, largest first; of a packed one its name in the model, its encoding and layout."""
    import onnx

    places = {item.initializer: item for item in _packed(metadata)}
    rows = []
    for stored in model.graph.initializer:
        place = places.get(stored.name)
        layout = None if place is None or place.kind == "scale" else place.kind
        weight = None if place is None else place.target.removeprefix("packed.").rpartition("_")[0]
        rows.append(
            {
                "name": stored.name if weight is None else weight,
                "kind": "other" if place is None else "scale" if layout is None else "codes",
                "encoding": None if layout is None or weight is None else _encoding(metadata, weight),
                "layout": layout,
                "type": onnx.TensorProto.DataType.Name(stored.data_type),
                "shape": list(stored.dims),
                "bytes": _bytes(stored),
            }
        )
    return sorted(rows, key=lambda row: (-row["bytes"], row["name"]))


def _packed(metadata: Mapping[str, str]) -> list[Any]:
    from ti_fx.export.file import content

    if content.TENSORS_KEY not in metadata:
        return []
    try:
        return content.from_json(metadata[content.TENSORS_KEY])
    except (ValueError, TypeError, KeyError):
        raise InputError(f"the file's metadata {content.TENSORS_KEY} is damaged; export it again") from None


def _encoding(metadata: Mapping[str, str], weight: str) -> str:
    from ti_fx.export.file import content

    return content.encoding_in(metadata).of(weight)


def show(facts: dict[str, Any]) -> None:
    """Print what :func:`describe` found."""
    own = facts["ti_fx"]
    opsets = ", ".join(f"{domain} {number}" for domain, number in facts["opsets"].items())
    output.say(f"{facts['file']}: {facts['bytes'] / 1e6:.2f} MB, IR {facts['ir_version']}, opsets {opsets}")
    if own is None:
        by = f", but by {facts['producer']}" if facts["producer"] else ""
        output.say(f"not written by ti_fx{by}: what its tensors stand for is not known")
    else:
        for line in _summary(own, facts["producer"]):
            output.say(line)
    output.say("")
    output.table(
        ("name", "direction", "type"),
        [(name, kind, text) for kind in ("inputs", "outputs") for name, text in facts[kind].items()],
        "Inputs and outputs",
    )
    if own is not None:
        packed = ("weight", "count", "stored as", "encoding", "layout", "MB")
        output.table(packed, _packed_rows(facts["tensors"]), "Packed weights")
    largest = ("tensor", "kind", "type", "stored as", "MB")
    output.table(largest, _largest_rows(facts["tensors"]), "Largest tensors")
    output.table(
        ("type", "MB"), [(name, size / 1e6) for name, size in facts["stored_bytes"].items()], "Stored tensors"
    )
    output.table(("operation", "count"), list(facts["nodes"].items()), "Operations")
    rest = {
        key: value for key, value in facts["metadata"].items() if own is None or not key.startswith("ti_fx.")
    }
    if rest:
        short = [(key, value if len(value) <= 100 else f"{value[:97]}...") for key, value in rest.items()]
        output.table(("key", "value"), short, "Metadata")


def _summary(own: Mapping[str, Any], producer: str) -> Iterator[str]:
    from ti_fx.export.report import batch_text
    from ti_fx.ir.assumptions import Assumption
    from ti_fx.recipe import Recipe

    source = own["source"]
    name = " ".join(filter(None, (source.get("class"), source.get("name")))) or "an unknown model"
    versions = ", ".join(f"{key} {value}" for key, value in own["versions"].items() if key != "ti_fx")
    origin = (f" by {producer}" if producer else "") + (f" with {versions}" if versions else "")
    yield f"a ternary student of {name}" + (f", written{origin}" if origin else "")
    changed = own["requantized_from"]
    yield f"encoding {own['encoding']}" + (f", requantised from {changed} after training" if changed else "")
    if own["batch_dependent"] is not None:
        yield batch_text(own["batch_dependent"])
    if own["kept"]:
        kept = ", ".join(f"{count} in {kind}" for kind, count in sorted(own["kept"].items()))
        yield f"tensors that are not ternary: {kept}"
    for dimension, size in own["largest"].items():
        yield f"{dimension} is at most {size}"
    for text, line in own["assumptions"].items():
        yield str(Assumption(text, line))
    for message, runs in own["checks"].items():
        yield f"{message}: {'Runtime checks that' if runs else 'Runtime can not check that'}, a plain session does not"
    if own["minimum_onnxruntime"]:
        yield f"needs ONNX Runtime {own['minimum_onnxruntime']} or newer"
    if own["tensors_sha256"]:
        yield f"SHA-256 of the packed graph's tensors {own['tensors_sha256']}"
    if own["recipe"] is None:
        yield "no recipe: its passes were run one by one"
    else:
        if own["recipe_sha256"]:
            yield f"SHA-256 of the recipe {own['recipe_sha256']}"
        yield str(Recipe.from_dict(own["recipe"], "the file's recipe"))


def _packed_rows(tensors: list[dict[str, Any]]) -> list[tuple[output.Cell, ...]]:
    """Return a row for weights that are alike but for the numbers in their names, in the order of the file's bytes."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for row in tensors:
        if row["kind"] == "codes":
            key = (starred(row["name"]), _shape(row), row["encoding"], row["layout"])
            groups.setdefault(key, []).append(row["bytes"])
    return [
        (name, len(sizes), shape, encoding, layout, sum(sizes) / 1e6)
        for (name, shape, encoding, layout), sizes in groups.items()
    ]


def _largest_rows(tensors: list[dict[str, Any]]) -> list[tuple[output.Cell, ...]]:
    return [
        (row["name"], row["kind"], row["type"], _shape(row), row["bytes"] / 1e6) for row in tensors[:_LARGEST]
    ]


def _shape(row: Mapping[str, Any]) -> str:
    return "×".join(map(str, row["shape"])) or "scalar"


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
