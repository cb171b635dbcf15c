"""One range per token: symmetric of four and two bits as ``int8_token``, and asymmetric of eight, four and two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ti_fx.numerics import onnx_nodes
from ti_fx.numerics.gradients import straight_through
from ti_fx.numerics.onnx_nodes import since_opset
from ti_fx.numerics.quantiser import Quantiser, asymmetric_step_of_token, step_of_token
from ti_fx.numerics.quantisers.int8_token import fake_quant_token, quantise_token
from ti_fx.numerics.uniform import asymmetric, asymmetric_scale


def int4_token(value: Tensor) -> Tensor:
    """Symmetric, codes -7..7, one scale per vector of the last dimension; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(fake_quant_token, bits=4))


def int2_token(value: Tensor) -> Tensor:
    """Symmetric, codes -1..1, one scale per vector of the last dimension; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(fake_quant_token, bits=2))


def int8_token_asymmetric(value: Tensor) -> Tensor:
    """Asymmetric, codes 0..255, one range per vector of the last dimension; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(fake_quant_token_asymmetric, bits=8))


def int4_token_asymmetric(value: Tensor) -> Tensor:
    """Asymmetric, codes 0..15, one range per vector of the last dimension; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(fake_quant_token_asymmetric, bits=4))


def int2_token_asymmetric(value: Tensor) -> Tensor:
    """Asymmetric, codes 0..3, one range per vector of the last dimension; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(fake_quant_token_asymmetric, bits=2))


def _bounds(value: Tensor) -> tuple[Tensor, Tensor]:
    return value.amin(dim=-1, keepdim=True), value.amax(dim=-1, keepdim=True)


@since_opset(21)
def quantise_token_asymmetric(value: Tensor, bits: int) -> onnx_nodes.Quantised:
    """Return codes, scale and zero point in ONNX, the latter two ``(..., 1)``: QuantizeLinear with a block per token.

    The last dimension must be static.
    """
    scale, zero = asymmetric_scale(*_bounds(value), bits)
    zero_point = onnx_nodes.cast(zero, torch.uint8)
    codes = onnx_nodes.node(
        "QuantizeLinear",
        (value, scale, zero_point),
        torch.uint8,
        value.shape,
        axis=-1,
        block_size=int(value.shape[-1]),
    )
    return codes if bits == 8 else onnx_nodes.within(codes, 0, 2**bits - 1), scale, zero_point


@since_opset(18)
def fake_quant_token_asymmetric(value: Tensor, bits: int) -> Tensor:
    """Return the fake-quantised value, in training and in ONNX: for any last dimension, a dynamic one too."""
    return asymmetric(value, *_bounds(value), bits)


def _by_tokens(
    function: Callable[[Tensor], Tensor],
    bits: int,
    step: Callable[..., Tensor],
    codes: Callable[..., onnx_nodes.Quantised],
    value: Callable[..., Tensor],
) -> Quantiser:
    return Quantiser(
        function,
        batch_invariant=True,
        step=partial(step, bits=bits),
        codes=codes,
        value=value,
        opset=21,
        per_token=True,
        options=(bits,),
    )


_SYMMETRIC = (step_of_token, quantise_token, fake_quant_token)
_ASYMMETRIC = (asymmetric_step_of_token, quantise_token_asymmetric, fake_quant_token_asymmetric)
INT4_TOKEN = _by_tokens(int4_token, 4, *_SYMMETRIC)
INT2_TOKEN = _by_tokens(int2_token, 2, *_SYMMETRIC)
INT8_TOKEN_ASYMMETRIC = _by_tokens(int8_token_asymmetric, 8, *_ASYMMETRIC)
INT4_TOKEN_ASYMMETRIC = _by_tokens(int4_token_asymmetric, 4, *_ASYMMETRIC)
INT2_TOKEN_ASYMMETRIC = _by_tokens(int2_token_asymmetric, 2, *_ASYMMETRIC)
