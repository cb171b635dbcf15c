"""Symmetric int8 over the whole tensor: the activation quantiser of the published code (arXiv 2302.11812)."""

from __future__ import annotations

import torch
from torch import Tensor

from ti_fx.numerics import onnx_nodes
from ti_fx.numerics.gradients import straight_through
from ti_fx.numerics.onnx_nodes import since_opset
from ti_fx.numerics.quantiser import Quantiser, step_of_tensor
from ti_fx.numerics.uniform import symmetric, symmetric_scale


def int8_reference(value: Tensor) -> Tensor:
    """Symmetric int8 over the whole tensor, scale = max|x| / 127: the activation quantiser of the published code."""
    return straight_through(value, _rounded)


def _rounded(value: Tensor) -> Tensor:
    return symmetric(value, value.abs().amax(), 8)


@since_opset(18)
def quantise_reference(value: Tensor, bits: int = 8) -> onnx_nodes.Quantised:
    """Return codes, scale and zero point in ONNX: QuantizeLinear around zero point 128, whatever the bits.

    int8 activations would be 5-10x slower.
    """
    # amax() over every dimension has no translation in torch 2.13.
    largest = onnx_nodes.node("ReduceMax", (value.abs(),), torch.float32, (), keepdims=0)
    scale = symmetric_scale(largest, bits)
    zero_point = torch.full((), 128, dtype=torch.uint8)
    codes = onnx_nodes.node("QuantizeLinear", (value, scale, zero_point), torch.uint8, value.shape)
    return codes, scale, zero_point


INT8_REFERENCE = Quantiser(
    int8_reference, batch_invariant=False, step=step_of_tensor, codes=quantise_reference, value=None, opset=18
)
