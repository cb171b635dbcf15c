"""Dual learnable ternarisation: a scale and a shift of ternary weights are learned with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ti_fx.numerics.codes import spread
from ti_fx.numerics.learned_steps import summed
from ti_fx.numerics.precision import at_least_float32
from ti_fx.numerics.ternary_weights import signs_and_scale_of_row, ternary_codes
from ti_fx.numerics.weight_codes import Granularity, group_of, scale_shape, signs_and_scale
from ti_fx.numerics.weight_quantiser import Learned, WeightQuantiser

_NO_CLIP = float("inf")


def dlt(weight: Tensor, scale: Tensor, shift: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Return ``codes * scale + shift``: codes = sign(W) where |W| > 0.7 mean|W|, else 0, as Ternary Weight Networks do.

    Gradients: of W, straight-through; of the scale, the sum over what shares it of the codes times the gradient; of
    the shift, the sum of the gradient. It starts as Ternary Weight Networks: their scale, and a shift of 0.

    Source: TernaryLLM (arXiv 2406.07177), its dual learnable ternarisation. Where it starts and W's gradient are
    choices made here.

    Args:
        weight: W, floating, any shape of at least one dimension.
        scale: ``()``, ``(rows, 1, ...)`` or ``(..., groups)`` by the granularity.
        shift: the same.
        granularity: what shares a scale and a shift.
    """
    result: Tensor = _Dlt.apply(weight, scale, shift, granularity)  # type: ignore[no-untyped-call]
    return result


def dlt_codes(
    weight: Tensor, scale: Tensor, shift: Tensor, granularity: Granularity = "tensor"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 codes, the scale and the shift of :func:`dlt`; of a weight with a NaN every scale is NaN."""
    codes = _codes(weight.detach(), granularity)
    wide = at_least_float32(scale.detach()).masked_fill(weight.isnan().any(), float("nan"))
    return codes.to(torch.int8), wide, at_least_float32(shift.detach()).clone()


def _codes(weight: Tensor, granularity: Granularity) -> Tensor:
    return signs_and_scale(weight, granularity, _NO_CLIP, signs_and_scale_of_row)[0]


class _Dlt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, shift: Tensor, granularity: Granularity) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.granularity = granularity
        group, size = group_of(granularity), weight.shape[-1]
        value = _codes(weight, granularity).mul_(spread(at_least_float32(scale), group, size))
        return value.add_(spread(at_least_float32(shift), group, size)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        weight, scale = ctx.saved_tensors
        gradient, wide = gradients[0], at_least_float32(gradients[0])
        along = _codes(weight, ctx.granularity) * wide
        of_scale, of_shift = (summed(value, scale, ctx.granularity) for value in (along, wide))
        return gradient, of_scale.to(scale.dtype), of_shift.to(scale.dtype), None


def _scale(weight: Tensor, granularity: Granularity) -> Tensor:
    return ternary_codes(weight, granularity, _NO_CLIP)[1].to(weight.dtype)


def _shift(weight: Tensor, granularity: Granularity) -> Tensor:
    return weight.new_zeros(scale_shape(weight.shape, granularity))


DLT = WeightQuantiser(
    "dlt",
    dlt,
    dlt_codes,
    formula="sign(W) where |W| > 0.7 mean|W|, else 0, times a scale, plus a shift, which are learned",
    source="TernaryLLM, arXiv 2406.07177",
    learned=(Learned("scale", _scale), Learned("shift", _shift)),
    shifts=True,
)
