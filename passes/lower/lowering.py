"""Rewrite a packed graph into the graph that the exporter traces: quantised layers become ONNX integer arithmetic.

Two rules, the second where it applies:

general:  a fake-quant node becomes ONNX nodes of the same numerics; a packed weight becomes codes * scale
fused:    fake-quant + linear + packed weight becomes one integer product; embedding + packed table a packed look-up

before:  %w = unpack_ternary(%codes, %scale)       after:  %q, %s, %z = quantise_tensor(%x)
         %x_q = int8_tensor(%x)                            %w = packed(%codes)
         %h = linear(%x_q, %w, %bias)                      %h = integer_linear(%q, %s, %z, %w, %scale, %bias)

before:  %x_q = int8_block_128(%x)                 after:  %h = block_linear(%x, %codes, %scale, %bias)
         %h = linear(%x_q, %w, %bias)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_aggregate
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from ti_fx.errors import ExportError
from ti_fx.find.packed import PackedWeight, as_packed, packed_weights
from ti_fx.ir.edit import aten_name, constant_size, fork, supersede, tensor
from ti_fx.ir.facts import facts
from ti_fx.ir.inserted import quantiser_of
from ti_fx.numerics.codes import CODES_PER_BYTE
from ti_fx.numerics.layouts import UINT2
from ti_fx.numerics.onnx_nodes import dequantise
from ti_fx.numerics.quantiser import Quantiser
from ti_fx.passes.lower import operators
from ti_fx.passes.lower.complex_pairs import write_pairs
from ti_fx.passes.lower.fusion import FUSED_OPSET, fuse
from ti_fx.passes.lower.numbers import write_numbers
from ti_fx.passes.lower.storage import Weights, insert, looked_up

Quantised = dict[tuple[Any, Any], tuple[Node, ...]]  # by value and quantiser: codes, scale, zero point


@dataclass(frozen=True)
class Product:
    """A linear layer of a fake-quantised activation and a packed weight.

    Attributes:
        node: whose value the product is.
        fake_quant: the quantiser's node.
        flat: the view that is quantised, where the product reads what it was flattened from; else None.
        quantiser: its numerics.
        weight: ``(outputs, inputs)`` if ``transposed``, else ``(inputs, outputs)``.
        transposed: see there.
        bias: ``(outputs,)`` or None.
    """

    node: Node
    fake_quant: Node
    flat: Node | None
    quantiser: Quantiser
    weight: PackedWeight
    transposed: bool
    bias: Node | None

    @property
    def activation(self) -> Node:
        """What is quantised."""
        source = (self.fake_quant if self.flat is None else self.flat).args[0]
        assert isinstance(source, Node)
        return source


def lower(gm: GraphModule, opset: int) -> GraphModule:
    """Return a lowered private copy of a packed graph in eval mode; ``gm`` and its tensors are left alone.

    1. training-only modules, needless squeezes, sizes that can be only one and complex numbers go   2. packed look-ups
    3. integer and block products   4. what is left of the fake-quantisers   5. what is left of the packed weights
    6. what is stored in half precision   7. norms, rotary positions and unquantised attention   8. residual sums before
    a norm   9. numbers in arithmetic

    Raises:
        ExportError: a packed weight is not float32, or the opset can't express an encoding.
    """
    copy = fork(gm)
    copy._parameters, copy._buffers = dict(gm._parameters), dict(gm._buffers)
    copy._forward_pre_hooks.clear()
    copy._forward_pre_hooks_with_kwargs.clear()
    _drop_dropout(copy)
    _drop_squeezes(copy)
    _write_fixed_sizes(copy)
    write_pairs(copy.graph)
    products = [found for node in copy.graph.nodes if (found := match_product(node)) is not None]
    integers, blocks = (
        {one.weight.codes_name: one.transposed for one in products if bool(one.quantiser.block) == by_blocks}
        for by_blocks in (False, True)
    )
    weights = Weights(copy, opset, integers, blocks)
    for node in list(copy.graph.nodes):
        table = looked_up(node)
        if table is not None:
            weights.look_up(node, table)
    for product in products:
        if product.quantiser.block:
            _block_product(product, weights)
    quantised = _integer_products([one for one in products if not one.quantiser.block], weights, opset)
    copy.graph.eliminate_dead_code()
    for node in list(copy.graph.nodes):
        quantiser = quantiser_of(node)
        if quantiser is not None and node.users:
            _dequantise(node, quantiser, quantised.get((node.args[0], node.target)))
    for weight in list(packed_weights(copy)):
        if weight.node.users:
            weights.in_float(weight)
    for node in copy.graph.find_nodes(op="get_attr"):
        _mark_half(copy, node)
    if opset >= FUSED_OPSET:
        fuse(copy.graph)
    for node in list(copy.graph.nodes):
        if aten_name(node) == "layer_norm":
            _plain_sum(node)
    write_numbers(copy.graph)
    copy.graph.eliminate_dead_code()
    copy.graph.lint()
    copy.recompile()
    return copy


def _drop_dropout(gm: GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and isinstance(gm.get_submodule(node.target), nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _drop_squeezes(gm: GraphModule) -> None:
    """Drop squeezes of a dimension that is not 1: in PyTorch they do nothing, and ONNX refuses them."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim):
        source, dim = node.args
        if constant_size(source.meta["val"].shape[dim]) != 1:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)


def _write_fixed_sizes(gm: GraphModule) -> None:
    """Write the number where a size can be only one: torch.onnx traces again, and may not find that out.

    (``max(0, 1 - past - sequence)`` is 0 for every past and sequence.)
    """
    least = facts(gm).sizes.smallest
    for node in list(gm.graph.nodes):
        value = node.meta.get("val")
        if (
            node.op != "call_function"
            or not isinstance(value, torch.SymInt)
            or not value.node.expr.free_symbols
        ):
            continue
        known = value.node.shape_env.var_to_range
        ranges = {
            symbol: ValueRanges(least.get(str(symbol), 1), known[symbol].upper)
            for symbol in value.node.expr.free_symbols
        }
        bounds = bound_sympy(value.node.expr, ranges)
        if bounds.is_singleton():
            for reader in list(node.users):
                reader.args, reader.kwargs = map_aggregate(
                    (reader.args, reader.kwargs), partial(_replaced, node, int(bounds.lower))
                )


def _replaced(node: Node, number: int, argument: Argument) -> Argument:
    return number if argument is node else argument


def _mark_half(gm: GraphModule, node: Node) -> None:
    """Mark what is stored in half precision, or the exporter would cast it and store the result."""
    value = tensor(gm, str(node.target))
    for reader in [reader for reader in node.users if aten_name(reader) == "to"]:
        if value.dtype == torch.float16:
            arguments = (node, str(node.target), "constant", value.shape, value.dtype)
            reader.replace_input_with(node, insert(reader, operators.packed, *arguments))


def _block_product(product: Product, weights: Weights) -> None:
    """Apply the fused rule for MatMulNBits, if the weight is stored as it reads it; else the general rule applies."""
    node, weight = product.node, product.weight
    layout = UINT2 if product.transposed else UINT2.turned
    if weights.layouts[weight.codes_name] is not layout:
        return
    shape = weight.shape if product.transposed else weight.shape[::-1]
    outputs, inputs = shape
    block = product.quantiser.block
    whole = None if inputs % block else (outputs, inputs // block, block // CODES_PER_BYTE)
    codes, scale = weights.stored(node, weight, whole), weights.scale(node, weight)
    arguments = (product.activation, codes, scale, product.bias, shape, block)
    supersede(node, insert(node, operators.block_linear, *arguments))


def _integer_products(products: list[Product], weights: Weights, opset: int) -> Quantised:
    """Apply the fused rule; return the codes, scale and zero point of each quantised value, which its readers share."""
    quantised: Quantised = {}
    for product in products:
        source, quantiser = product.fake_quant, product.quantiser
        if opset < quantiser.opset:
            raise ExportError(
                f"%{source.name} needs opset {quantiser.opset} or newer, and opset={opset} was asked for"
            )
        value = product.activation, source.target
        if value not in quantised:
            quantised[value] = _quantise(source, product.activation, quantiser)
        codes = weights.codes(product.weight, transposed=product.transposed)
        scale = weights.scale(product.node, product.weight)
        if weights.scale_shape(product.weight):
            scale = insert(product.node, torch.ops.aten.reshape.default, scale, [-1])
        arguments = (codes, scale, product.bias, quantiser.per_token)
        supersede(product.node, insert(product.node, operators.integer_linear, *quantised[value], *arguments))
    return quantised


def _quantise(fake_quant: Node, value: Node, quantiser: Quantiser) -> tuple[Node, ...]:
    assert quantiser.codes is not None
    whole = insert(fake_quant, quantiser.codes, value)
    return tuple(insert(fake_quant, operator.getitem, whole, index) for index in range(3))


def _dequantise(fake_quant: Node, quantiser: Quantiser, parts: tuple[Node, ...] | None) -> None:
    if quantiser.value is not None:
        options = (quantiser.block,) if quantiser.block else ()
        supersede(fake_quant, insert(fake_quant, quantiser.value, fake_quant.args[0], *options))
    else:
        parts = parts or _quantise(fake_quant, fake_quant.args[0], quantiser)  # type: ignore[arg-type]
        supersede(fake_quant, insert(fake_quant, dequantise, *parts))


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
    weight, quantiser = as_packed(stored), quantiser_of(activation)
    if weight is None or quantiser is None or len(weight.shape) != 2:
        return None
    if bias is not None and (not isinstance(bias, Node) or bias.meta["val"].dim() != 1):
        return None
    if not transposed and weight.scale.meta["val"].dim():
        return None  # one scale per input can't leave the sum
    if quantiser.codes is None and not quantiser.block:
        return None  # no operator of ONNX multiplies what it gives but as floats
    if quantiser.per_token and constant_size(activation.meta["val"].shape[-1]) is None:
        return None
    flat = activation.args[0]
    view = _restored(node, flat)
    if view is None:
        return Product(node, activation, None, quantiser, weight, transposed, bias)
    return Product(view, activation, flat, quantiser, weight, transposed, bias)


def _restored(product: Node, flat: Any) -> Node | None:
    """Return the view after a product that restores what the view before it, ``flat``, took away, None without one.

    before:  %flat = view(%x, [-1, k])        after:  %h = product(%x)
             %product = addmm(%bias, %flat, %w)
             %h = view(%product, [b, s, n])
    """
    if len(product.users) != 1 or not isinstance(flat, Node) or aten_name(flat) not in ("view", "reshape"):
        return None
    (view,) = product.users
    source = flat.args[0]
    if aten_name(view) not in ("view", "reshape") or not isinstance(source, Node):
        return None
    before, middle, after = (node.meta["val"].shape for node in (source, flat, view))
    outputs = product.meta["val"].shape[-1]
    if before[-1] != middle[-1] or [*map(str, after)] != [*map(str, before[:-1]), str(outputs)]:
        return None
    return view


def _plain_sum(norm: Node) -> None:
    """Keep ONNX Runtime from fusing a residual sum with the norm that reads it (see ``operators.sum_for_norm``)."""
    total = norm.args[0]
    if not isinstance(total, Node) or aten_name(total) != "add" or total.kwargs or len(total.args) != 2:
        return
    if all(
        isinstance(operand, Node) and isinstance(operand.meta.get("val"), Tensor) for operand in total.args
    ):
        total.target = operators.sum_for_norm
