"""Ternary weights with straight-through gradients, as plain functions on tensors.

Sources: Ternary Weight Networks (Li et al., arXiv 1605.04711), TernaryBERT (Zhang et al., EMNLP 2020) and Teacher
Intervention (Kim et al., EACL 2023, arXiv 2302.11812).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ti_fx.numerics.weight_codes import CLIP, Granularity, codes_by, rounded, rows_dims


def ternary_codes(
    weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP
) -> tuple[Tensor, Tensor]:
    """Split a weight into ternary codes and scale: ``codes * scale`` is the ternary weight.

    With W clamped to [-clip, clip]: threshold t = 0.7 * mean|W|, codes = +1 where W > t, -1 where W < -t, else 0, and
    scale = mean of |W| over the entries beyond t (0 if there are none).

    Args:
        weight: floating, any shape of at least one dimension.
        granularity: ``tensor`` (one scale), ``row`` (one scale per index of dimension 0), or ``group-64`` and its kin
            (one scale per 64 neighbours of the last dimension; its last group may be shorter).
        clip: half-width of the range that latent weights are clamped to.

    Returns:
        codes: int8 in {-1, 0, 1}, shape of ``weight``.
        scale: float32 (float64 for float64 weights), shape ``()``, ``(rows, 1, ...)`` for ``row``, ``(..., groups)``.
    """
    return _codes(weight, granularity, clip)


def signs_and_scale_of_row(weight: Tensor, rows: bool, clip: float) -> tuple[Tensor, Tensor]:
    """Return the codes as floats of their own storage, and the scale.

    Two buffers, edited in place: a fresh buffer the size of a word embedding costs ten times an edit of an old one.
    """
    dims = rows_dims(weight, rows)
    magnitude = weight.abs().clamp_(max=clip)
    # a literal: torch.compile(dynamic=True) takes a module-level float for a symbol and fails in autograd.Function
    threshold = 0.7 * magnitude.mean(dim=dims, keepdim=rows)
    signs = magnitude.clone().gt_(threshold)
    # float32 counts exactly up to 2**24: enough for a vector, so vectors are counted first
    count = signs.sum(dim=-1, keepdim=True).sum(dim=dims, keepdim=rows, dtype=torch.float64).clamp(min=1)
    scale = magnitude.mul_(signs).sum(dim=dims, keepdim=rows) / count.to(magnitude.dtype)
    return signs.copysign_(weight).sign_(), scale  # sign_ turns -0.0 into 0.0


_codes = codes_by(signs_and_scale_of_row)


def ternary(weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP) -> Tensor:
    """Return the ternary weight ``codes * scale`` of :func:`ternary_codes`; same shape and dtype as ``weight``.

    Gradient: straight-through where |weight| < clip, zero elsewhere.
    """
    return rounded(weight, granularity, clip, signs_and_scale_of_row)


def ternary_embedding(weight: Tensor, indices: Tensor, *options: Any, clip: float = CLIP) -> Tensor:
    """Return ``embedding(ternary(weight, "row"), indices, *options)``, quantising only the rows that are looked up.

    Values and gradients are the same bit for bit, as each row has its own scale; ``weight`` has two dimensions.
    """
    rows = torch.ops.aten.embedding.default(weight, indices, *options)
    return ternary(rows.flatten(0, -2), "row", clip).view_as(rows)
