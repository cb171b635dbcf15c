"""BitNet b1.58's weights: rounded to -1, 0 or 1 times their mean magnitude."""

from __future__ import annotations

from torch import Tensor

from ti_fx.numerics.uniform import one_where_zero
from ti_fx.numerics.weight_codes import CLIP, Granularity, codes_by, rounded, rows_dims
from ti_fx.numerics.weight_quantiser import WeightQuantiser


def absmean(weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP) -> Tensor:
    """Return ``codes * gamma``: gamma = mean|W|, codes = W / gamma, rounded half to even and clamped to [-1, 1].

    W is the weight clamped to [-clip, clip]; ``float("inf")`` is the published formula. Zeros stay zero.
    Gradient: straight-through where |weight| < clip, zero elsewhere.

    Source: The Era of 1-bit LLMs (BitNet b1.58, arXiv 2402.17764), equations 1 to 3.
    """
    return rounded(weight, granularity, clip, _signs_and_scale)


def _signs_and_scale(weight: Tensor, rows: bool, clip: float) -> tuple[Tensor, Tensor]:
    clamped = weight.clamp(-clip, clip)
    gamma = clamped.abs().mean(dim=rows_dims(weight, rows), keepdim=rows)
    codes = clamped.div_(one_where_zero(gamma)).round_().clamp_(-1, 1)
    return codes.add_(0.0), gamma  # -0.0 becomes 0.0


ABSMEAN = WeightQuantiser(
    "absmean",
    absmean,
    codes_by(_signs_and_scale),
    formula="W / mean|W|, rounded and clamped to -1, 0, 1; scale: mean|W|",
    source="BitNet b1.58, arXiv 2402.17764",
)
