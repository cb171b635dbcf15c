"""Sherry's sparse ternary weights: of four neighbours exactly one is zero."""

from __future__ import annotations

import torch
from torch import Tensor

from ti_fx.numerics.weight_codes import CLIP, Granularity, codes_by, rounded, rows_dims
from ti_fx.numerics.weight_quantiser import WeightQuantiser

_NEIGHBOURS = 4


def sherry(weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP) -> Tensor:
    """Return ``codes * scale``: of four neighbours of the last dimension the smallest magnitude is 0, the others signs.

    The scale is the mean magnitude of what is not zero, which has the least squared error. Of equal magnitudes the
    first is 0, and the sign of 0 is 1. W is the weight clamped to [-clip, clip]; its last dimension is a multiple of 4.
    Gradient: straight-through where |weight| < clip, zero elsewhere. The paper's second part, a residual of full
    precision that fades out in training (Arenas), is no part of a quantiser and not done here.

    Source: Sherry (arXiv 2601.07892), section 3.

    Raises:
        ValueError: the last dimension is no multiple of 4.
    """
    return rounded(weight, granularity, clip, _signs_and_scale)


def _signs_and_scale(weight: Tensor, rows: bool, clip: float) -> tuple[Tensor, Tensor]:
    if weight.shape[-1] % _NEIGHBOURS:
        raise ValueError(f"sherry zeroes one of 4 neighbours, and {weight.shape[-1]} is no multiple of 4")
    clamped = weight.clamp(-clip, clip)
    fours = clamped.abs().view(*weight.shape[:-1], -1, _NEIGHBOURS)
    kept = torch.ones_like(fours).scatter_(-1, fours.argmin(dim=-1, keepdim=True), 0).view_as(weight)
    dims = rows_dims(weight, rows)
    scale = (clamped.abs() * kept).sum(dim=dims, keepdim=rows) / kept.sum(dim=dims, keepdim=rows)
    return kept * torch.where(clamped < 0, -1.0, 1.0).to(weight.dtype) + 0.0, scale


SHERRY = WeightQuantiser(
    "sherry",
    sherry,
    codes_by(_signs_and_scale),
    formula="of 4 neighbours the smallest |W| is 0, the others sign(W); scale: mean |W| of the others",
    source="Sherry, arXiv 2601.07892",
    multiple=_NEIGHBOURS,
)
