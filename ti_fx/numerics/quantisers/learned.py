"""One learned step per tensor, a constant of the file: Learned Step Size Quantization (Esser et al., ICLR 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ti_fx.numerics import onnx_nodes
from ti_fx.numerics.onnx_nodes import since_opset
from ti_fx.numerics.precision import at_least_float32
from ti_fx.numerics.quantiser import Quantiser
from ti_fx.numerics.uniform import largest_code

LEAST = 1e-5  # of a step: training may move one to zero and below


def int8_learned(value: Tensor, step: Tensor) -> Tensor:
    """Symmetric, codes -128..127 times a learned step: see :func:`learned`."""
    return learned(value, step, 8)


def int4_learned(value: Tensor, step: Tensor) -> Tensor:
    """Symmetric, codes -8..7 times a learned step: see :func:`learned`."""
    return learned(value, step, 4)


def int2_learned(value: Tensor, step: Tensor) -> Tensor:
    """Symmetric, codes -2..1 times a learned step: see :func:`learned`."""
    return learned(value, step, 2)


def learned(value: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return codes times s: x / s, clamped to [-n, p] and rounded, half to even; n = 2**(bits - 1), p = n - 1.

    Gradients: of x, straight-through where -n < x / s < p and zero elsewhere; of s, the sum of round(x / s) - x / s
    there, of -n below and of p above, over sqrt(N p); N is how many values a row (of the first dimension) has.

    Source: arXiv 1902.08153, section 2, equations 1 to 3, and the gradient scale of section 2.2.

    Args:
        value: floating, any shape; what is not float64 is rounded in float32.
        step: s, ``()``; it counts as 1e-5 at least, and its gradient passes there, too.
        bits: 2 to 8.
    """
    result: Tensor = _Learned.apply(value, step, bits)  # type: ignore[no-untyped-call]
    return result


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, step: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(value, step)
        ctx.bits = bits
        least, most = _ends(bits)
        scale = scale_of(step, value)
        codes = (at_least_float32(value) / scale).round_().clamp_(least, most)
        return codes.mul_(scale).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        value, step = ctx.saved_tensors
        (gradient,) = gradients
        least, most = _ends(ctx.bits)
        place = at_least_float32(value) / scale_of(step, value)
        inside = (place > least) & (place < most)
        error = torch.where(inside, place.round() - place, place.clamp(least, most))
        of_a_row = value.numel() / max(1, value.shape[0]) if value.dim() else 1
        slope = (gradient * error).sum() / math.sqrt(max(1.0, of_a_row) * most)
        return gradient * inside, slope.to(step.dtype).reshape(step.shape), None


def _ends(bits: int) -> tuple[int, int]:
    return -largest_code(bits) - 1, largest_code(bits)


def scale_of(step: Tensor, value: Tensor) -> Tensor:
    """Return what codes are multiplied by, ``()``, in the precision in which a value is rounded."""
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    return step.detach().to(wide).clamp(min=LEAST)


@since_opset(18)
def quantise_learned(value: Tensor, step: Tensor, bits: int) -> onnx_nodes.Quantised:
    """Return codes, scale and zero point in ONNX: QuantizeLinear with a constant scale, and Clip to fewer bits."""
    scale, (least, most) = step.clamp(min=LEAST), _ends(bits)
    zero_point = torch.full((), 128, dtype=torch.uint8)
    codes = onnx_nodes.node("QuantizeLinear", (value, scale, zero_point), torch.uint8, value.shape)
    return codes if bits == 8 else onnx_nodes.within(codes, 128 + least, 128 + most), scale, zero_point


def start(value: Tensor, bits: int) -> Tensor:
    """Return the first step, float32 ``()``: 2 mean|x| / sqrt(p), as published; 1 where all is zero or nothing is."""
    mean = at_least_float32(value).abs().mean() if value.numel() else torch.zeros(())
    first = (2 * mean / math.sqrt(_ends(bits)[1])).float()
    return torch.where(first == 0, torch.ones_like(first), first)


def bound(value: Tensor, step: Tensor) -> Tensor:
    """Return the step itself, float64 ``()``."""
    return scale_of(step, value).double()


def _learned_in(function: Callable[..., Tensor], bits: int) -> Quantiser:
    return Quantiser(
        function,
        batch_invariant=True,
        step=bound,
        codes=quantise_learned,
        value=None,
        opset=18,
        options=(bits,),
        start=partial(start, bits=bits),
    )


INT8_LEARNED = _learned_in(int8_learned, 8)
INT4_LEARNED = _learned_in(int4_learned, 4)
INT2_LEARNED = _learned_in(int2_learned, 2)
