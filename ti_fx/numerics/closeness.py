"""How far the values that were found are from those that were expected, and what a NaN means there.

Values that are equal are no distance apart, and so are two NaNs, and two equal infinities. A NaN, or an infinity, in
one alone is infinitely far, so that no tolerance lets it pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# What a distance is divided by at least: beside an expected zero, any distance is large.
_SMALLEST = torch.finfo(torch.float32).tiny


def gap(found: Tensor, expected: Tensor) -> Tensor:
    """Return the absolute difference of each entry, float64; both tensors have one shape, of any dtypes."""
    distance = (found.double() - expected.double()).abs().nan_to_num(float("inf"), float("inf"))
    return distance.masked_fill((found == expected) | (found.isnan() & expected.isnan()), 0.0)


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have one shape and equal values."""
    return found.shape == expected.shape and not bool(gap(found, expected).any())


def norm_beside(distance: Tensor, expected: Tensor) -> float:
    """Return the L2 norm of what :func:`gap` gave, relative to that of the expected tensor's finite values."""
    return float(distance.norm() / _finite(expected).norm().clamp(min=_SMALLEST))


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the L2 distance, relative to the norm of the expected tensor's finite values."""
    return norm_beside(gap(found, expected), expected)


def largest(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest finite magnitude that was expected."""
    if not expected.numel():
        return 0.0
    return float(gap(found, expected).max() / _finite(expected).abs().max().clamp(min=_SMALLEST))


def by_vector(found: Tensor, expected: Tensor) -> Tensor:
    """Return the relative L2 distance of each vector along the last dimension, except of those that hold no number.

    A row that is all padding may be NaN in both, which says nothing about the others.
    """
    distance: Tensor = gap(found, expected).norm(dim=-1)
    relative_to: Tensor = _finite(expected).norm(dim=-1).clamp(min=_SMALLEST)
    return (distance / relative_to)[~(found.isnan() & expected.isnan()).all(-1)]


def p99(distance: Tensor) -> float:
    """Return the 99th percentile of what :func:`gap` gave, infinite if any of it is; 0 of nothing."""
    if not distance.numel():
        return 0.0
    if bool(distance.isinf().any()):
        return float("inf")
    # torch.quantile takes no more than 16 million elements
    return float(distance.flatten().kthvalue(max(1, round(0.99 * distance.numel()))).values)


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative distance of two structures' tensors, infinite where their shapes differ."""
    if list(found) != list(expected) or any(found[name].shape != expected[name].shape for name in found):
        return float("inf")
    return max((relative(found[name], expected[name]) for name in found), default=0.0)


def median_distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the median of ``by_vector`` over all the expected tensors, infinite if that of any vector is.

    Of numbers without dimension it is their largest relative distance.
    """
    vectors = [by_vector(found[name], value) for name, value in expected.items() if value.dim()]
    if not vectors:
        return max((relative(found[name], value) for name, value in expected.items()), default=0.0)
    every = torch.cat(vectors)
    return float("inf") if bool(every.isinf().any()) else float(every.median())


def _finite(value: Tensor) -> Tensor:
    return value.double().masked_fill(~value.isfinite(), 0.0)
