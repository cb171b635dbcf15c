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
from ti_fx.graph import aten_name, fork, tensor

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
_BY_FUNCTION = {lowering.fake_quant: lowering for lowering in ACTIVATIONS.values()}
FAKE_QUANTS = frozenset(_BY_FUNCTION)


@dataclass(frozen=True)
class Product:
    """A linear layer of a fake-quantised activation and a packed weight."""

    node: Node
    fake_quant: Node
    weight: Node
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
        if _is_packed_lookup(node):
            weights.look_up(node)
    quantised = _integer_products(copy, weights, opset)
    for node in list(copy.graph.nodes):
        if node.target in FAKE_QUANTS and node.users:
            _dequantise(node, quantised)
    for node in list(copy.graph.nodes):
        if node.target is encodings.unpack_ternary and node.users:
            weights.in_float(node)
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
            _replace(node, node.args[0])


def _replace(node: Node, new: Any) -> None:
    new.meta.setdefault("val", node.meta.get("val"))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _insert(before: Node, function: Callable[..., Any], *args: Any) -> Node:
    with before.graph.inserting_before(before):
        node = before.graph.call_function(function, args)
    return node


def _is_packed(argument: Any) -> bool:
    return isinstance(argument, Node) and argument.target is encodings.unpack_ternary


def _is_packed_lookup(node: Node) -> bool:
    """An embedding whose packed rows end at byte boundaries."""
    if aten_name(node) != "embedding" or not _is_packed(node.args[0]):
        return False
    shape = node.args[0].args[2]
    return len(shape) == 2 and shape[1] % encodings.CODES_PER_BYTE == 0


class _Weights:
    """Packed weights by their tensors: one stored tensor, whatever reads it."""

    def __init__(self, gm: GraphModule, opset: int) -> None:
        self.gm = gm
        self.opset = opset
        self.looked_up: set[str] = set()
        self.by_table: dict[str, str] = {}
        self.int8: dict[Node, Node] = {}
        for node in gm.graph.nodes:
            if _is_packed_lookup(node):
                self.looked_up.add(node.args[0].args[0].target)
            if _is_packed(node) and node.args[3] != torch.float32:
                raise ExportError(
                    f"packed weight {node.args[0].target} is {node.args[3]}; export needs float32: "
                    "load the model in float32 before ti_fx.capture"
                )

    def look_up(self, node: Node) -> None:
        """Replace an embedding of a packed table by a packed look-up."""
        table, ids = node.args[:2]
        codes, scale, (rows, columns), _ = table.args  # type: ignore[union-attr]
        stored = self._stored(codes, node, (rows, columns // encodings.CODES_PER_BYTE))
        marked = _insert(node, ops.packed, stored, codes.target, "uint2", [rows, columns // 4], torch.uint8)
        _replace(node, _insert(node, ops.gather_ternary, marked, self.scale(node, scale), ids, columns))

    def codes(self, weight: Node) -> Node:
        """Return the int8 codes of a packed weight, inserted once, right before it."""
        if weight not in self.int8:
            codes, _, shape, _ = weight.args
            if codes.target in self.looked_up or self.opset < INT2_OPSET:
                kind = "uint2" if codes.target in self.looked_up else "bytes"
                stored = self._stored(codes, weight, None) if kind == "uint2" else codes
                arguments = (stored, codes.target, kind, self._table(weight, kind), shape)
                self.int8[weight] = _insert(weight, ops.codes_from_table, *arguments)
            else:
                self.int8[weight] = _insert(weight, ops.codes_from_int2, codes, codes.target, shape)
        return self.int8[weight]

    def scale(self, before: Node, scale: Node) -> Node:
        """Return the marked scale."""
        shape = list(tensor(self.gm, str(scale.target)).shape)
        return _insert(before, ops.packed, scale, scale.target, "scale", shape, torch.float32)

    def in_float(self, weight: Node) -> None:
        """General rule: codes * scale."""
        _replace(
            weight,
            _insert(weight, ops.dequantised_weight, self.codes(weight), self.scale(weight, weight.args[1])),
        )

    def _stored(self, codes: Node, before: Node, shape: tuple[int, int] | None) -> Node:
        """Return the codes of a looked-up table as GatherBlockQuantized reads them: code + 2."""
        name = f"looked_up_{str(codes.target).replace('.', '_')}"
        if name not in self.gm._buffers:
            assert shape is not None  # look-ups are rewritten first
            self.gm.register_buffer(name, (tensor(self.gm, str(codes.target)) ^ BIASED).view(shape))
        with before.graph.inserting_before(before):
            return before.graph.get_attr(name)

    def _table(self, before: Node, kind: str) -> Node:
        name = f"codes_of_{kind}"
        if name not in self.gm._buffers:
            every_byte = torch.arange(256, dtype=torch.int16).to(torch.uint8)
            codes = encodings.unpack_codes(every_byte ^ BIASED if kind == "uint2" else every_byte, (256, 4))
            self.gm.register_buffer(name, codes)
        with before.graph.inserting_before(before):
            return before.graph.get_attr(name)


def _integer_products(gm: GraphModule, weights: _Weights, opset: int) -> dict[Node, tuple[Node, ...]]:
    """Apply the fused rule; return each fake-quantiser's codes, scale and zero point, which its readers share."""
    quantised: dict[Node, tuple[Node, ...]] = {}
    for product in [found for node in gm.graph.nodes if (found := match_product(node)) is not None]:
        lowering = _BY_FUNCTION[product.fake_quant.target]  # type: ignore[index]
        if opset < lowering.opset:
            raise ExportError(
                f"%{product.fake_quant.name} needs opset {lowering.opset} or newer, and opset={opset} was asked for"
            )
        if product.fake_quant not in quantised:
            quantised[product.fake_quant] = _quantise(product.fake_quant, lowering)
        parts = quantised[product.fake_quant]
        codes = weights.codes(product.weight)
        scale = weights.scale(product.node, product.weight.args[1])  # type: ignore[arg-type]
        if len(tensor(gm, str(product.weight.args[1].target)).shape):  # type: ignore[union-attr]
            scale = _insert(product.node, torch.ops.aten.reshape.default, scale, [-1])
        arguments = (*parts, codes, scale, product.bias, product.transposed, lowering.per_token)
        _replace(product.node, _insert(product.node, ops.integer_linear, *arguments))
    return quantised


def _quantise(fake_quant: Node, lowering: ActivationLowering) -> tuple[Node, ...]:
    whole = _insert(fake_quant, lowering.quantise, fake_quant.args[0])
    return tuple(_insert(fake_quant, operator.getitem, whole, index) for index in range(3))


def _dequantise(fake_quant: Node, quantised: dict[Node, tuple[Node, ...]]) -> None:
    lowering = _BY_FUNCTION[fake_quant.target]  # type: ignore[index]
    if lowering.value is not None:
        _replace(fake_quant, _insert(fake_quant, lowering.value, fake_quant.args[0]))
        return
    parts = quantised.get(fake_quant) or _quantise(fake_quant, lowering)
    _replace(fake_quant, _insert(fake_quant, ops.dequantise, *parts))


def match_product(node: Node) -> Product | None:
    """Match a linear layer that reads a fake-quantised activation and a packed weight.

    1. linear(x, w, bias)   2. addmm(bias, x, w)   3. mm(x, w), matmul(x, w)
    In 2 and 3, w may be the transpose of a packed weight.
    """
    name = aten_name(node)
    if node.kwargs or name not in ("linear", "addmm", "mm", "matmul"):
        return None
    bias: Any = None
    if name == "linear":
        activation, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else None
    elif name == "addmm":
        bias, activation, weight = node.args
    else:
        activation, weight = node.args
    transposed = name == "linear"
    if not transposed and isinstance(weight, Node) and aten_name(weight) in ("t", "numpy_T"):
        transposed, weight = True, weight.args[0]
    if not (isinstance(activation, Node) and activation.target in FAKE_QUANTS and _is_packed(weight)):
        return None
    assert isinstance(weight, Node)
    if bias is not None and (not isinstance(bias, Node) or bias.meta["val"].dim() != 1):
        return None
    if not transposed and _scale_dim(weight):
        return None  # one scale per input can't leave the sum
    if _BY_FUNCTION[activation.target].per_token and not isinstance(activation.meta["val"].shape[-1], int):  # type: ignore[index]
        return None
    return Product(node, activation, weight, transposed, bias)


def _scale_dim(weight: Node) -> int:
    scale = weight.args[1]
    assert isinstance(scale, Node)
    return int(scale.meta["val"].dim())


def _plain_sum(norm: Node) -> None:
    """Keep ONNX Runtime from fusing a residual sum with the norm that reads it (see ``ops.sum_for_norm``)."""
    total = norm.args[0]
    if not isinstance(total, Node) or aten_name(total) != "add" or total.kwargs or len(total.args) != 2:
        return
    if all(
        isinstance(operand, Node) and isinstance(operand.meta.get("val"), Tensor) for operand in total.args
    ):
        total.target = ops.sum_for_norm
