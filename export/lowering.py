"""Rewrite a packed graph into the graph that the exporter traces: quantised layers become ONNX integer arithmetic.

Two rules, the second where it applies:

general:  a fake-quant node becomes ONNX nodes of the same numerics; a packed weight becomes codes * scale
fused:    fake-quant + linear + packed weight becomes one integer product; embedding + packed table a packed look-up

before:  %w = unpack_ternary(%codes, %scale)       after:  %q, %s, %z = quantise_tensor(%x)
         %x_q = int8_tensor(%x)                            %w = codes_from_int2(%codes)
         %h = linear(%x_q, %w, %bias)                      %h = integer_linear(%q, %s, %z, %w, %scale, %bias)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx import encodings, numerics
from ti_fx.errors import ExportError
from ti_fx.export import ops
from ti_fx.export.attention import ATTENTION_OPSET, fuse_attention
from ti_fx.export.packed import BIASED
from ti_fx.export.student import PackedWeight, as_packed, packed_weights
from ti_fx.graph import aten_name, constant_size, fork, supersede, tensor

INT2_OPSET = 25


@dataclass(frozen=True)
class ActivationLowering:
    """The ONNX side of one activation fake-quantiser.

    Attributes:
        fake_quant: the function in the graph.
        quantise: gives codes, scale and zero point for an integer product.
        value: gives the fake-quantised float value where no integer product reads it; None: dequantise the codes.
        per_token: whether the scale has one entry per token.
        opset: the first opset that can express it.
    """

    fake_quant: Callable[[Tensor], Tensor]
    quantise: Callable[[Tensor], ops.Quantised]
    value: Callable[[Tensor], Tensor] | None
    per_token: bool
    opset: int


ACTIVATIONS: dict[str, ActivationLowering] = {
    "int8-tensor": ActivationLowering(numerics.int8_tensor, ops.quantise_tensor, None, False, 18),
    "int8-token": ActivationLowering(numerics.int8_token, ops.quantise_token, ops.fake_quant_token, True, 21),
    "reference": ActivationLowering(numerics.int8_reference, ops.quantise_reference, None, False, 18),
}


@dataclass(frozen=True)
class Product:
    """A linear layer of a fake-quantised activation and a packed weight."""

    node: Node
    fake_quant: Node
    lowering: ActivationLowering
    weight: PackedWeight
    transposed: bool
    bias: Node | None


def lower(gm: GraphModule, opset: int) -> GraphModule:
    """Return a lowered private copy of a packed graph in eval mode; ``gm`` and its tensors are left alone.

    1. training-only modules go   2. packed look-ups   3. integer products   4. what is left of the fake-quantisers
    5. what is left of the packed weights   6. unquantised attention   7. residual sums before a norm

    Raises:
        ExportError: a packed weight is not float32, or the opset can't express an encoding.
    """
    copy = fork(gm)
    copy._parameters, copy._buffers = dict(gm._parameters), dict(gm._buffers)
    copy._forward_pre_hooks.clear()
    copy._forward_pre_hooks_with_kwargs.clear()
    _drop_dropout(copy)
    weights = _Weights(copy, opset)
    for node in list(copy.graph.nodes):
        table = _looked_up(node)
        if table is not None:
            weights.look_up(node, table)
    quantised = _integer_products(copy, weights, opset)
    for node in list(copy.graph.nodes):
        lowering = activation_lowering(node)
        if lowering is not None and node.users:
            _dequantise(node, lowering, quantised.get(node))
    for weight in list(packed_weights(copy)):
        if weight.node.users:
            weights.in_float(weight)
    if opset >= ATTENTION_OPSET:
        fuse_attention(copy.graph)
    for node in list(copy.graph.nodes):
        if aten_name(node) == "layer_norm":
            _plain_sum(node)
    copy.graph.eliminate_dead_code()
    copy.graph.lint()
    copy.recompile()
    return copy


def _drop_dropout(gm: GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and isinstance(gm.get_submodule(node.target), nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _insert(before: Node, function: Callable[..., Any], *args: Any) -> Node:
    with before.graph.inserting_before(before):
        node = before.graph.call_function(function, args)
    return node


def _looked_up(node: Node) -> PackedWeight | None:
    """Return the table of an embedding whose packed rows end at byte boundaries."""
    table = as_packed(node.args[0]) if aten_name(node) == "embedding" else None
    if table is None or len(table.shape) != 2 or table.shape[1] % encodings.CODES_PER_BYTE:
        return None
    return table


class _Weights:
    """Packed weights by their tensors: one stored tensor, whatever reads it."""

    def __init__(self, gm: GraphModule, opset: int) -> None:
        self.gm = gm
        self.opset = opset
        self.looked_up: set[str] = set()
        self.int8: dict[Node, Node] = {}
        for node in gm.graph.nodes:
            table = _looked_up(node)
            if table is not None:
                self.looked_up.add(table.codes_name)
        for weight in packed_weights(gm):
            if weight.dtype != torch.float32:
                raise ExportError(
                    f"packed weight {weight.codes_name} is {weight.dtype}; export needs float32: "
                    "load the model in float32 before ti_fx.capture"
                )

    def look_up(self, node: Node, table: PackedWeight) -> None:
        """Replace an embedding of a packed table by a packed look-up."""
        rows, columns = table.shape
        shape = (rows, columns // encodings.CODES_PER_BYTE)
        stored = self._biased(table, node, shape)
        marked = _insert(node, ops.packed, stored, table.codes_name, "uint2", shape, torch.uint8)
        arguments = (marked, self.scale(node, table), node.args[1], columns)
        supersede(node, _insert(node, ops.gather_ternary, *arguments))

    def codes(self, weight: PackedWeight) -> Node:
        """Return the int8 codes of a packed weight, inserted once, right before it."""
        node, name = weight.node, weight.codes_name
        if node not in self.int8:
            if name in self.looked_up:
                stored, table = self._biased(weight, node, None), self._table(node, "uint2")
                arguments = (stored, name, "uint2", table, weight.shape)
                self.int8[node] = _insert(node, ops.codes_from_table, *arguments)
            elif self.opset < INT2_OPSET:
                arguments = (weight.codes, name, "bytes", self._table(node, "bytes"), weight.shape)
                self.int8[node] = _insert(node, ops.codes_from_table, *arguments)
            else:
                self.int8[node] = _insert(node, ops.codes_from_int2, weight.codes, name, weight.shape)
        return self.int8[node]

    def scale_shape(self, weight: PackedWeight) -> torch.Size:
        """Return the shape of the scale."""
        return tensor(self.gm, weight.scale_name).shape

    def scale(self, before: Node, weight: PackedWeight) -> Node:
        """Return the marked scale."""
        arguments = (weight.scale, weight.scale_name, "scale", self.scale_shape(weight), torch.float32)
        return _insert(before, ops.packed, *arguments)

    def in_float(self, weight: PackedWeight) -> None:
        """General rule: codes * scale."""
        node = weight.node
        supersede(node, _insert(node, ops.dequantised_weight, self.codes(weight), self.scale(node, weight)))

    def _biased(self, weight: PackedWeight, before: Node, shape: tuple[int, int] | None) -> Node:
        """Return the codes of a looked-up table as GatherBlockQuantized reads them: code + 2."""
        name = f"looked_up_{weight.codes_name.replace('.', '_')}"
        if name not in self.gm._buffers:
            assert shape is not None  # look-ups are rewritten first
            self.gm.register_buffer(name, (tensor(self.gm, weight.codes_name) ^ BIASED).view(shape))
        return self._read(before, name)

    def _table(self, before: Node, kind: str) -> Node:
        name = f"codes_of_{kind}"
        if name not in self.gm._buffers:
            every_byte = torch.arange(256, dtype=torch.int16).to(torch.uint8)
            codes = encodings.unpack_codes(every_byte ^ BIASED if kind == "uint2" else every_byte, (256, 4))
            self.gm.register_buffer(name, codes)
        return self._read(before, name)

    def _read(self, before: Node, name: str) -> Node:
        with before.graph.inserting_before(before):
            return before.graph.get_attr(name)


def _integer_products(gm: GraphModule, weights: _Weights, opset: int) -> dict[Node, tuple[Node, ...]]:
    """Apply the fused rule; return each fake-quantiser's codes, scale and zero point, which its readers share."""
    quantised: dict[Node, tuple[Node, ...]] = {}
    for product in [found for node in gm.graph.nodes if (found := match_product(node)) is not None]:
        source, lowering = product.fake_quant, product.lowering
        if opset < lowering.opset:
            raise ExportError(
                f"%{source.name} needs opset {lowering.opset} or newer, and opset={opset} was asked for"
            )
        if source not in quantised:
            quantised[source] = _quantise(source, lowering)
        codes = weights.codes(product.weight)
        scale = weights.scale(product.node, product.weight)
        if weights.scale_shape(product.weight):
            scale = _insert(product.node, torch.ops.aten.reshape.default, scale, [-1])
        arguments = (codes, scale, product.bias, product.transposed, lowering.per_token)
        supersede(product.node, _insert(product.node, ops.integer_linear, *quantised[source], *arguments))
    return quantised


def _quantise(fake_quant: Node, lowering: ActivationLowering) -> tuple[Node, ...]:
    whole = _insert(fake_quant, lowering.quantise, fake_quant.args[0])
    return tuple(_insert(fake_quant, operator.getitem, whole, index) for index in range(3))


def _dequantise(fake_quant: Node, lowering: ActivationLowering, parts: tuple[Node, ...] | None) -> None:
    if lowering.value is not None:
        supersede(fake_quant, _insert(fake_quant, lowering.value, fake_quant.args[0]))
    else:
        parts = parts or _quantise(fake_quant, lowering)
        supersede(fake_quant, _insert(fake_quant, ops.dequantise, *parts))


def activation_lowering(argument: Any) -> ActivationLowering | None:
    """Return how a fake-quant node is lowered, None for any other argument."""
    if not isinstance(argument, Node) or argument.op != "call_function":
        return None
    return next((entry for entry in ACTIVATIONS.values() if entry.fake_quant is argument.target), None)


def match_product(node: Node) -> Product | None:
    """Match a linear layer that reads a fake-quantised activation and a packed weight.

    1. linear(x, w, bias)   2. addmm(bias, x, w)   3. mm(x, w), matmul(x, w)
    In 2 and 3, w may be the transpose of a packed weight.
    """
    name = aten_name(node)
    if node.kwargs or name not in ("linear", "addmm", "mm", "matmul"):
        return None
    arguments: list[Any] = list(node.args)
    bias = arguments.pop(0) if name == "addmm" else None
    activation, stored, *rest = arguments
    if rest:
        bias = rest[0]
    transposed = name == "linear"
    if not transposed and isinstance(stored, Node) and aten_name(stored) == "t":
        transposed, stored = True, stored.args[0]
    weight, lowering = as_packed(stored), activation_lowering(activation)
    if weight is None or lowering is None or len(weight.shape) != 2:
        return None
    if bias is not None and (not isinstance(bias, Node) or bias.meta["val"].dim() != 1):
        return None
    if not transposed and weight.scale.meta["val"].dim():
        return None  # one scale per input can't leave the sum
    if lowering.per_token and constant_size(activation.meta["val"].shape[-1]) is None:
        return None
    return Product(node, activation, lowering, weight, transposed, bias)


def _plain_sum(norm: Node) -> None:
    """Keep ONNX Runtime from fusing a residual sum with the norm that reads it (see ``ops.sum_for_norm``)."""
    total = norm.args[0]
    if not isinstance(total, Node) or aten_name(total) != "add" or total.kwargs or len(total.args) != 2:
        return
    if all(
        isinstance(operand, Node) and isinstance(operand.meta.get("val"), Tensor) for operand in total.args
    ):
        total.target = ops.sum_for_norm
