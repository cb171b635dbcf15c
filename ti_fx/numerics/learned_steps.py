"""Ternary weights whose step is learned: a weight over its step is rounded, and both get a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ti_fx.numerics.codes import spread
from ti_fx.numerics.precision import at_least_float32
from ti_fx.numerics.weight_codes import Granularity, group_of

SMALLEST_STEP = 1e-5  # a step that training moves below is taken for this


@dataclass(frozen=True)
class Stretch:
    """How a weight over its step becomes a code.

    Attributes:
        levels: v = weight / step becomes the code round(v * levels), half to even, and codes / levels * step the value.
        edge: v is clamped to [-edge, edge] before; beyond, the weight has no gradient.
        edge_is_inside: whether a v of exactly ``edge`` has one.
        shared: whether the step's gradient is divided by the square root of how many weights share the step; else of
            how many the whole weight has.
    """

    levels: float
    edge: float
    edge_is_inside: bool
    shared: bool


def stretched(weight: Tensor, step: Tensor, granularity: Granularity, stretch: Stretch) -> Tensor:
    """Return ``codes * step / levels``, of the shape and dtype of ``weight``.

    Gradients: of the weight, straight-through within the edge and zero beyond; of the step, summed over the weights
    that share it and divided by a square root, +1 beyond the edge, -1 below the negative one, and codes / levels - v
    between.

    Args:
        weight: floating, any shape of at least one dimension.
        step: of the shape of ``ti_fx.numerics.weight_codes.scale_shape``.
        granularity: what shares a step.
        stretch: what becomes of a weight over its step.
    """
    result: Tensor = _Stretched.apply(weight, step, granularity, stretch)  # type: ignore[no-untyped-call]
    return result


def stretched_codes(
    weight: Tensor, step: Tensor, granularity: Granularity, stretch: Stretch
) -> tuple[Tensor, Tensor]:
    """Return int8 codes in {-1, 0, 1} and the scale ``step / levels``, of the step's shape; arguments as above.

    Of a weight with a NaN, which has no code, every scale is NaN.
    """
    codes, over, step = _codes(weight.detach(), step.detach(), granularity, stretch)
    return codes.to(torch.int8), (step / stretch.levels).masked_fill(over.isnan().any(), float("nan"))


def _codes(
    weight: Tensor, step: Tensor, granularity: Granularity, stretch: Stretch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes, the weight over its step, and the step as it counts."""
    step = at_least_float32(step).clamp(min=SMALLEST_STEP)
    over = at_least_float32(weight) / spread(step, group_of(granularity), weight.shape[-1])
    codes = over.clamp(-stretch.edge, stretch.edge).mul_(stretch.levels).round_()
    return codes.add_(0.0), over, step  # -0.0 becomes 0.0


class _Stretched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, granularity: Granularity, stretch: Stretch) -> Tensor:
        codes, _, counted = _codes(weight, step, granularity, stretch)
        ctx.save_for_backward(weight, step)
        ctx.granularity, ctx.stretch = granularity, stretch
        scale = spread(counted / stretch.levels, group_of(granularity), weight.shape[-1])
        return codes.mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, step = ctx.saved_tensors
        stretch, (gradient,) = ctx.stretch, gradients
        codes, over, _ = _codes(weight, step, ctx.granularity, stretch)
        size = over.abs()
        inside = size <= stretch.edge if stretch.edge_is_inside else size < stretch.edge
        along = torch.where(inside, codes / stretch.levels - over, over.sign()) * gradient
        of_step = summed(along, step, ctx.granularity)
        if stretch.shared:
            of_step = of_step / summed(torch.ones_like(along), step, ctx.granularity).sqrt()
        else:
            of_step = of_step / math.sqrt(weight.numel())
        return gradient * inside, of_step.to(step.dtype), None, None


def summed(value: Tensor, step: Tensor, granularity: Granularity) -> Tensor:
    """Return the sum over what shares a step."""
    if group := group_of(granularity):
        padded = torch.nn.functional.pad(value, (0, -value.shape[-1] % group))
        return padded.view(*padded.shape[:-1], -1, group).sum(dim=-1)
    return value.sum_to_size(step.shape)
