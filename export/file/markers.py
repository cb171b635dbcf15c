"""The exporter's markers become what they stand for: codes as initialisers, and a table of where each tensor is."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor
from torch.fx import GraphModule

from ti_fx.export.file.content import PackedTensor
from ti_fx.find.packed import packed_weights
from ti_fx.ir.edit import tensor
from ti_fx.numerics.layouts import INT2, LAYOUTS, Layout
from ti_fx.passes.lower.operators import MARKER_DOMAIN


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
