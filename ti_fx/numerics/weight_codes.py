"""A weight becomes codes and scales by a formula: over all of it, over each row, or over each group of neighbours.

A formula says what one row becomes; the rest is the same for all: what a granularity is, and the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ti_fx.numerics.codes import spread
from ti_fx.numerics.precision import at_least_float32

Granularity = Literal["tensor", "row", "group-32", "group-64", "group-128"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

CLIP = 2.5  # latent weights are clamped to [-2.5, 2.5]; outside, the gradient is zero

# Of a weight in at least float32, whether each row stands alone, and the clip: the codes as floats in storage of their
# own, and the scale, () or (rows, 1, ...). The weight is not edited.
Formula = Callable[[Tensor, bool, float], tuple[Tensor, Tensor]]


def group_of(granularity: Granularity) -> int:
    """Return how many neighbours of the last dimension share a scale; 0 where a row or the tensor has one.

    Raises:
        ValueError: there is no such granularity.
    """
    if granularity not in GRANULARITIES:
        others = ", ".join(map(repr, GRANULARITIES[2:]))
        raise ValueError(f"granularity is {granularity!r}; use 'tensor' or 'row', or one of {others}")
    return int(granularity.removeprefix("group-")) if granularity.startswith("group-") else 0


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Return the shape of a weight's scale: ``()``, ``(rows, 1, ...)``, or ``(..., groups)``."""
    if group := group_of(granularity):
        return (*shape[:-1], -(-shape[-1] // group))
    return (shape[0], *(1 for _ in shape[1:])) if granularity == "row" else ()


def mean_magnitude(weight: Tensor, granularity: Granularity) -> Tensor:
    """Return the mean |weight| of what shares a scale, of the shape of :func:`scale_shape`."""
    return _statistic(weight, granularity, lambda part, dims, keep: part.mean(dim=dims, keepdim=keep))


def largest_magnitude(weight: Tensor, granularity: Granularity) -> Tensor:
    """Return the largest |weight| of what shares a scale, of the shape of :func:`scale_shape`."""
    return _statistic(weight, granularity, lambda part, dims, keep: part.amax(dim=dims, keepdim=keep))


def _statistic(
    weight: Tensor, granularity: Granularity, of: Callable[[Tensor, tuple[int, ...], bool], Tensor]
) -> Tensor:
    def formula(part: Tensor, rows: bool, clip: float) -> tuple[Tensor, Tensor]:
        return part, of(part.abs(), rows_dims(part, rows), rows)

    _, found = signs_and_scale(weight.detach(), granularity, float("inf"), formula)
    return found.to(weight.dtype)


def rows_dims(weight: Tensor, rows: bool) -> tuple[int, ...]:
    """Return the dimensions that a statistic runs over: all, or all but the first where each row stands alone."""
    return tuple(range(1 if rows else 0, weight.dim()))


def signs_and_scale(
    weight: Tensor, granularity: Granularity, clip: float, formula: Formula
) -> tuple[Tensor, Tensor]:
    """Return the codes as floats of their own storage, and the scale; the last group of a row may be shorter.

    Args:
        weight: floating, any shape of at least one dimension.
        granularity: what shares a scale.
        clip: half-width of the range that latent weights are clamped to.
        formula: what a row becomes.

    Returns:
        signs: of at least float32, the shape of ``weight``.
        scale: the same dtype, of the shape of :func:`scale_shape`.
    """
    wide, group = at_least_float32(weight), group_of(granularity)
    if not group:
        return formula(wide, granularity == "row", clip)
    *lead, size = wide.shape
    whole = size - size % group
    signs, scales = [], []
    for part, length in ((wide[..., :whole], group), (wide[..., whole:], size - whole)):
        if part.numel():
            codes, scale = formula(part.reshape(-1, length), True, clip)
            signs.append(codes.view(part.shape))
            scales.append(scale.view(*lead, -1))
    return torch.cat(signs, dim=-1), torch.cat(scales, dim=-1)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, granularity: Granularity, clip: float, formula: Formula) -> Tensor:
        signs, scale = signs_and_scale(weight, granularity, clip, formula)
        ctx.save_for_backward(weight)
        ctx.clip = clip
        return signs.mul_(spread(scale, group_of(granularity), weight.shape[-1])).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        # the gradient where -clip < weight < clip, else 0, in one sweep
        inside = torch.ops.aten.hardtanh_backward(gradients[0], weight, -ctx.clip, ctx.clip)
        return inside, None, None, None


def rounded(weight: Tensor, granularity: Granularity, clip: float, formula: Formula) -> Tensor:
    """Return codes times scale, of the shape and dtype of ``weight``; arguments as of :func:`signs_and_scale`.

    Gradient: straight-through where |weight| < clip, zero elsewhere.
    """
    result: Tensor = _Rounded.apply(weight, granularity, clip, formula)  # type: ignore[no-untyped-call]
    return result


def codes_by(formula: Formula) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that splits a weight into int8 codes and a scale by a formula.

    It takes the weight, the granularity and the clip, and gives what :func:`signs_and_scale` does, without a gradient.
    """

    def codes(
        weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP
    ) -> tuple[Tensor, Tensor]:
        signs, scale = signs_and_scale(weight.detach(), granularity, clip, formula)
        return signs.to(torch.int8), scale

    return codes
