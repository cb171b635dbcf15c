"""Symmetric int8 with one scale per token."""

from __future__ import annotations

import torch
from torch import Tensor

from ti_fx.numerics import onnx_nodes
from ti_fx.numerics.gradients import straight_through
from ti_fx.numerics.onnx_nodes import since_opset
from ti_fx.numerics.quantiser import Quantiser, step_of_token
from ti_fx.numerics.uniform import symmetric, symmetric_scale


def int8_token(value: Tensor) -> Tensor:
    """Symmetric int8 with one scale per token (per vector along the last dimension): scale = max|x| / 127."""
    return straight_through(value, fake_quant_token)


@since_opset(21)
def quantise_token(value: Tensor, bits: int = 8) -> onnx_nodes.Quantised:
    """Return codes, scale and zero point in ONNX: QuantizeLinear with one block per token around zero point 128.

    The returned zero point is the scalar that MatMulInteger takes. The last dimension must be static.
    """
    scale = symmetric_scale(value.abs().amax(dim=-1, keepdim=True), bits)
    zero_point = torch.full((), 128, dtype=torch.uint8)
    codes = onnx_nodes.node(
        "QuantizeLinear",
        (value, scale, zero_point.expand(scale.shape)),
        torch.uint8,
        value.shape,
        axis=-1,
        block_size=int(value.shape[-1]),
    )
    return codes, scale, zero_point


@since_opset(18)
def fake_quant_token(value: Tensor, bits: int = 8) -> Tensor:
    """Return the fake-quantised value, in training and in ONNX: for any last dimension, a dynamic one too."""
    return symmetric(value, value.abs().amax(dim=-1, keepdim=True), bits)


INT8_TOKEN = Quantiser(
    int8_token,
    batch_invariant=True,
    step=step_of_token,
    codes=quantise_token,
    value=fake_quant_token,
    opset=21,
    per_token=True,
)
