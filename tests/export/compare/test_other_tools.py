"""What a simplifier, a converter or a quantiser does to a file is named: the tensor it lost, or the node it changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from exported_models import Layers, layers_example, packed
from onnx import ModelProto, numpy_helper
from torch.fx import GraphModule

from ti_fx.errors import InputError, ParityError, TiFxError
from ti_fx.export import check, to_onnx


@pytest.fixture(scope="module")
def student() -> GraphModule:
    return packed(Layers(), layers_example())


@pytest.fixture(scope="module")
def written(student: GraphModule, tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    path = tmp_path_factory.mktemp("written") / "layers.onnx"
    to_onnx(student, path, layers_example())
    return onnx.load(path)


def unpacked(model: ModelProto) -> None:
    """Fold a Cast of codes into a constant, as onnxsim and onnxslim do."""
    cast = next(node for node in model.graph.node if node.op_type == "Cast" and "first" in node.input[0])
    (codes,) = (stored for stored in model.graph.initializer if stored.name == cast.input[0])
    folded = np.zeros(tuple(codes.dims), np.int8)
    model.graph.initializer.remove(codes)
    model.graph.initializer.append(numpy_helper.from_array(folded, cast.output[0]))
    model.graph.node.remove(cast)


def halved(model: ModelProto) -> None:
    """Store a scale in half precision, as converters to float16 do."""
    (scale,) = (stored for stored in model.graph.initializer if stored.name.endswith("first.weight_scale"))
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale).astype(np.float16), scale.name))


def without_metadata(model: ModelProto) -> None:
    del model.metadata_props[:]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (unpacked, ParityError, r"no packed tensor packed\.first\.weight_codes, which %.* reads: .*a tool"),
        (halved, ParityError, r"packed tensor packed\.first\.weight_scale, .* as of another type"),
        (without_metadata, InputError, r"or a tool dropped its metadata"),
    ],
)
def test_what_another_tool_lost_is_named(
    change: Callable[[ModelProto], None],
    kind: type[TiFxError],
    message: str,
    student: GraphModule,
    written: ModelProto,
    tmp_path: Path,
) -> None:
    model = ModelProto()
    model.CopyFrom(written)
    change(model)
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(kind, match=message):
        check(tmp_path / "changed.onnx", student, layers_example())
