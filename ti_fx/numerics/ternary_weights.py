"""Ternary weights with straight-through gradients, as plain functions on tensors.

Sources: Ternary Weight Networks (Li et al., arXiv 1605.04711), TernaryBERT (Zhang et al., EMNLP 2020) and Teacher
Intervention (Kim et al., EACL 2023, arXiv 2302.11812).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ti_fx.numerics.precision import at_least_float32

Granularity = Literal["tensor", "row"]


CLIP = 2.5  # latent weights are clamped to [-2.5, 2.5]; outside, the gradient is zero


def ternary_codes(
    weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP
) -> tuple[Tensor, Tensor]:
    """Split a weight into ternary codes and scale: ``codes * scale`` is the ternary weight.

    With W clamped to [-clip, clip]: threshold t = 0.7 * mean|W|, codes = +1 where W > t, -1 where W < -t, else 0, and
    scale = mean of |W| over the entries beyond t (0 if there are none).

    Args:
        weight: floating, any shape of at least one dimension.
        granularity: ``tensor`` (one scale) or ``row`` (one scale per index of dimension 0).
        clip: half-width of the range that latent weights are clamped to.

    Returns:
        codes: int8 in {-1, 0, 1}, shape of ``weight``.
        scale: float32 (float64 for float64 weights), shape ``()``, or ``(rows, 1, ...)`` for ``row``.
    """
    signs, scale = _signs_and_scale(weight.detach(), granularity, clip)
    return signs.to(torch.int8), scale


def _signs_and_scale(weight: Tensor, granularity: Granularity, clip: float) -> tuple[Tensor, Tensor]:
    """Return the codes as floats of their own storage, and the scale.

    Two buffers, edited in place: a fresh buffer the size of a word embedding costs ten times an edit of an old one.
    """
    if granularity not in ("tensor", "row"):
        raise ValueError(f"granularity is {granularity!r}; use 'tensor' or 'row'")
    keep = granularity == "row"
    dims = tuple(range(1 if keep else 0, weight.dim()))
    wide = at_least_float32(weight)
    magnitude = wide.abs().clamp_(max=clip)
    # a literal: torch.compile(dynamic=True) takes a module-level float for a symbol and fails in autograd.Function
    threshold = 0.7 * magnitude.mean(dim=dims, keepdim=keep)
    signs = magnitude.clone().gt_(threshold)
    # float32 counts exactly up to 2**24: enough for a vector, so vectors are counted first
    count = signs.sum(dim=-1, keepdim=True).sum(dim=dims, keepdim=keep, dtype=torch.float64).clamp(min=1)
    scale = magnitude.mul_(signs).sum(dim=dims, keepdim=keep) / count.to(magnitude.dtype)
    return signs.copysign_(wide).sign_(), scale  # sign_ turns -0.0 into 0.0


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, granularity: Granularity, clip: float) -> Tensor:
        signs, scale = _signs_and_scale(weight, granularity, clip)
        ctx.save_for_backward(weight)
        ctx.clip = clip
        return signs.mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # the gradient where -clip < weight < clip, else 0, in one sweep
        inside = torch.ops.aten.hardtanh_backward(gradients[0], weight, -ctx.clip, ctx.clip)
        return inside, None, None


def ternary(weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP) -> Tensor:
    """Return the ternary weight ``codes * scale`` of :func:`ternary_codes`; same shape and dtype as ``weight``.

    Gradient: straight-through where |weight| < clip, zero elsewhere.
    """
    result: Tensor = _Ternary.apply(weight, granularity, clip)  # type: ignore[no-untyped-call]
    return result


def ternary_embedding(weight: Tensor, indices: Tensor, *options: Any, clip: float = CLIP) -> Tensor:
    """Return ``embedding(ternary(weight, "row"), indices, *options)``, quantising only the rows that are looked up.

    Values and gradients are the same bit for bit, as each row has its own scale; ``weight`` has two dimensions.
    """
    rows = torch.ops.aten.embedding.default(weight, indices, *options)
    return ternary(rows.flatten(0, -2), "row", clip).view_as(rows)
