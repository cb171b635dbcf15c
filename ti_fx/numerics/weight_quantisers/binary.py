"""Binary weights: the sign times the mean magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from ti_fx.numerics.weight_codes import CLIP, Granularity, codes_by, rounded, rows_dims
from ti_fx.numerics.weight_quantiser import WeightQuantiser


def binary(weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP) -> Tensor:
    """Return ``codes * mean|W|``: codes = 1 where W >= 0, -1 elsewhere; no code is 0.

    W is the weight clamped to [-clip, clip]. Gradient: straight-through where |weight| < clip, zero elsewhere.

    Source: Binary Weight Networks (arXiv 1603.05279), as XTC (arXiv 2206.01859) uses them.
    """
    return rounded(weight, granularity, clip, _signs_and_scale)


def binary_centred(weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP) -> Tensor:
    """Return ``codes * mean|W|``: codes = 1 where W >= mean W, -1 elsewhere.

    W is the weight clamped to [-clip, clip], and both means run over what shares a scale. Gradient: straight-through
    where |weight| < clip, zero elsewhere.

    Source: the weights of BinaryBERT (arXiv 2012.15701) and of BiT (arXiv 2205.13016).
    """
    return rounded(weight, granularity, clip, _centred_signs_and_scale)


def _signs_and_scale(weight: Tensor, rows: bool, clip: float) -> tuple[Tensor, Tensor]:
    return _beyond(torch.zeros_like(weight), weight.clamp(-clip, clip), rows)


def _centred_signs_and_scale(weight: Tensor, rows: bool, clip: float) -> tuple[Tensor, Tensor]:
    clamped = weight.clamp(-clip, clip)
    return _beyond(clamped.mean(dim=rows_dims(weight, rows), keepdim=rows), clamped, rows)


def _beyond(centre: Tensor, weight: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """Return 1 where a weight is at or above a centre and -1 elsewhere, and the mean magnitude."""
    scale = weight.abs().mean(dim=rows_dims(weight, rows), keepdim=rows)
    return (weight >= centre).to(weight.dtype).mul_(2).sub_(1), scale


BINARY = WeightQuantiser(
    "binary",
    binary,
    codes_by(_signs_and_scale),
    formula="1 where W >= 0, else -1; scale: mean|W|",
    source="Binary Weight Networks, arXiv 1603.05279; XTC, arXiv 2206.01859",
    values="binary",
)
BINARY_CENTRED = WeightQuantiser(
    "binary-centred",
    binary_centred,
    codes_by(_centred_signs_and_scale),
    formula="1 where W >= mean W, else -1; scale: mean|W|",
    source="BinaryBERT, arXiv 2012.15701; BiT, arXiv 2205.13016",
    values="binary",
)
