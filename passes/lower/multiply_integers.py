"""A linear layer of a quantised activation and a packed weight becomes one product of integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from ti_fx.errors import ExportError
from ti_fx.ir.edit import call, supersede
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.passes.lower import operators
from ti_fx.passes.lower.opset import opset_of
from ti_fx.passes.lower.products import Product, products
from ti_fx.passes.lower.quantised import quantised
from ti_fx.passes.lower.stored import Int8Codes, int8_codes, known_codes, marked_scale, require_layouts


@dataclass(frozen=True)
class MultiplyIntegers(Pass):
    """Fake-quantiser, packed weight and linear layer become a quantiser, which products share, and MatMulInteger.

    before:  %x_q = int8_tensor(%x)                  after:  %q, %s, %z = quantise_tensor(%x)
             %w = unpack_ternary(%codes, %scale)             %c = packed(%codes)
             %h = linear(%x_q, %w, %bias)                    %ws = packed(%scale)
                                                             %h = integer_linear(%q, %s, %z, %c, %ws, %bias)
    """

    takes = (PACKED,)

    def requires(self, gm: GraphModule) -> None:
        """Every packed weight has a layout."""
        require_layouts(gm, self.name())

    def apply(self, gm: GraphModule) -> None:
        """Replace every product whose quantiser gives codes.

        Raises:
            ExportError: the opset can't express the quantiser; names its node.
        """
        known = known_codes(gm.graph)
        for product in products(gm.graph):
            if not product.quantiser.block:
                _replace(gm, product, known)
        gm.graph.eliminate_dead_code()


def _replace(gm: GraphModule, product: Product, known: Int8Codes) -> None:
    node, source, quantiser, opset = product.node, product.fake_quant, product.quantiser, opset_of(gm)
    if opset < quantiser.opset:
        raise ExportError(
            f"%{source.name} needs opset {quantiser.opset} or newer, and opset={opset} was asked for"
        )
    parts = quantised(product.activation, quantiser, source)
    codes = int8_codes(gm, product.weight, product.transposed, known)
    scale = marked_scale(gm, node, product.weight)
    if product.weight.scale.meta["val"].dim():
        scale = call(node, torch.ops.aten.reshape.default, (scale, [-1]))
    arguments = (*parts, codes, scale, product.bias, quantiser.per_token)
    supersede(node, call(node, operators.integer_linear, arguments))
