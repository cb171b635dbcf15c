"""Asymmetric uint8 over the whole tensor, as ONNX DynamicQuantizeLinear computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ti_fx.numerics import onnx_nodes
from ti_fx.numerics.gradients import straight_through
from ti_fx.numerics.onnx_nodes import since_opset
from ti_fx.numerics.quantiser import Quantiser, step_of_tensor
from ti_fx.numerics.uniform import asymmetric


def int8_tensor(value: Tensor) -> Tensor:
    """Asymmetric uint8 over the whole tensor, as ONNX DynamicQuantizeLinear computes it; straight-through gradient.

    scale = (max(x, 0) - min(x, 0)) / 255, zero point = round(-min / scale), codes = round(x / scale) + zero point
    clamped to 0..255, rounding half to even. Same shape and dtype as ``value`` (floating).
    """
    return straight_through(value, _rounded)


def _rounded(value: Tensor) -> Tensor:
    return asymmetric(value, value.amin(), value.amax(), 8)


@since_opset(18)
def quantise_tensor(value: Tensor) -> onnx_nodes.Quantised:
    """Return codes, scale and zero point in ONNX: DynamicQuantizeLinear."""
    codes, scale, zero_point = onnx_nodes.nodes(
        "DynamicQuantizeLinear", (value,), (torch.uint8, torch.float32, torch.uint8), (value.shape, (), ())
    )
    return codes, scale, zero_point


INT8_TENSOR = Quantiser(
    int8_tensor, batch_invariant=False, step=step_of_tensor, codes=quantise_tensor, value=None, opset=18
)
