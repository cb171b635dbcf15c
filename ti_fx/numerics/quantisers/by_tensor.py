"""Four and two bits over the whole tensor, asymmetric as ``int8_tensor`` or symmetric as ``int8_reference``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ti_fx.numerics import onnx_nodes
from ti_fx.numerics.gradients import straight_through
from ti_fx.numerics.onnx_nodes import since_opset
from ti_fx.numerics.quantiser import Quantiser, asymmetric_step_of_tensor, step_of_tensor
from ti_fx.numerics.quantisers.int8_reference import quantise_reference
from ti_fx.numerics.uniform import asymmetric, asymmetric_scale, symmetric


def int4_tensor(value: Tensor) -> Tensor:
    """Asymmetric, codes 0..15 over the whole tensor; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(_asymmetric, bits=4))


def int2_tensor(value: Tensor) -> Tensor:
    """Asymmetric, codes 0..3 over the whole tensor; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(_asymmetric, bits=2))


def int4_tensor_symmetric(value: Tensor) -> Tensor:
    """Symmetric, codes -7..7 over the whole tensor; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(_symmetric, bits=4))


def int2_tensor_symmetric(value: Tensor) -> Tensor:
    """Symmetric, codes -1..1 over the whole tensor; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(_symmetric, bits=2))


def _asymmetric(value: Tensor, bits: int) -> Tensor:
    return asymmetric(value, value.amin(), value.amax(), bits)


def _symmetric(value: Tensor, bits: int) -> Tensor:
    return symmetric(value, value.abs().amax(), bits)


@since_opset(18)
def quantise_tensor_asymmetric(value: Tensor, bits: int) -> onnx_nodes.Quantised:
    """Return codes, scale and zero point in ONNX: QuantizeLinear, and Clip for what rounds beyond the last code."""
    # amin() and amax() over every dimension have no translation in torch 2.13.
    low, high = (
        onnx_nodes.node(name, (value,), torch.float32, (), keepdims=0) for name in ("ReduceMin", "ReduceMax")
    )
    scale, zero = asymmetric_scale(low, high, bits)
    zero_point = onnx_nodes.cast(zero, torch.uint8)
    codes = onnx_nodes.node("QuantizeLinear", (value, scale, zero_point), torch.uint8, value.shape)
    return onnx_nodes.within(codes, 0, 2**bits - 1), scale, zero_point


def _asymmetric_in(function: Callable[[Tensor], Tensor], bits: int) -> Quantiser:
    return Quantiser(
        function,
        batch_invariant=False,
        step=partial(asymmetric_step_of_tensor, bits=bits),
        codes=quantise_tensor_asymmetric,
        value=None,
        opset=18,
        options=(bits,),
    )


def _symmetric_in(function: Callable[[Tensor], Tensor], bits: int) -> Quantiser:
    return Quantiser(
        function,
        batch_invariant=False,
        step=partial(step_of_tensor, bits=bits),
        codes=quantise_reference,
        value=None,
        opset=18,
        options=(bits,),
    )


INT4_TENSOR = _asymmetric_in(int4_tensor, 4)
INT2_TENSOR = _asymmetric_in(int2_tensor, 2)
INT4_TENSOR_SYMMETRIC = _symmetric_in(int4_tensor_symmetric, 4)
INT2_TENSOR_SYMMETRIC = _symmetric_in(int2_tensor_symmetric, 2)
