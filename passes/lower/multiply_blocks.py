"""A linear layer whose activation is quantised by blocks becomes one product that quantises by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ti_fx.ir.edit import call, supersede
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.numerics.codes import CODES_PER_BYTE
from ti_fx.numerics.layouts import UINT2
from ti_fx.passes.lower import operators
from ti_fx.passes.lower.products import Product, products
from ti_fx.passes.lower.stored import layout_of, marked_bytes, marked_scale, require_layouts


@dataclass(frozen=True)
class MultiplyBlocks(Pass):
    """Fake-quantiser, packed weight and linear layer become MatMulNBits, which leaves the weight packed in memory.

    before:  %x_q = int8_block_128(%x)               after:  %c = packed(%codes)
             %w = unpack_ternary(%codes, %scale)             %s = packed(%scale)
             %h = linear(%x_q, %w, %bias)                    %h = block_linear(%x, %c, %s, %bias, [n, k], 128)

    A weight that is stored otherwise, as its inputs are no multiple of 4 or something else reads it, stays for
    round-activations and dequantise-weights; so does one with fewer neighbours to a scale than the block has.
    """

    takes = (PACKED,)

    def requires(self, gm: GraphModule) -> None:
        """Every packed weight has a layout."""
        require_layouts(gm, self.name())

    def apply(self, gm: GraphModule) -> None:
        """Replace every product by blocks whose weight is stored as MatMulNBits reads it."""
        for product in products(gm.graph):
            layout = UINT2 if product.transposed else UINT2.turned
            if product.quantiser.block and layout_of(product.weight) is layout:
                _replace(gm, product)
        gm.graph.eliminate_dead_code()


def _replace(gm: GraphModule, product: Product) -> None:
    node, weight, block = product.node, product.weight, product.quantiser.block
    outputs, inputs = product.shape
    whole = None if inputs % block else (outputs, inputs // block, block // CODES_PER_BYTE)
    codes, scale = marked_bytes(gm, node, weight, whole), marked_scale(gm, node, weight)
    groups = (weight.group // block,) if weight.group else ()
    arguments = (product.activation, codes, scale, product.bias, product.shape, block, *groups)
    supersede(node, call(node, operators.block_linear, arguments))
