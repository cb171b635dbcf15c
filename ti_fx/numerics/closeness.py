"""How far what was found is from what was expected."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the L2 distance relative to the expected tensor's norm; NaN where both have it counts as equal."""
    return float(_gap(found, expected).norm() / _finite(expected).norm().clamp(min=1e-12))


def by_vector(found: Tensor, expected: Tensor) -> Tensor:
    """Return the relative L2 distance of each vector along the last dimension, except of those that hold no number.

    A row that is all padding may be NaN in both, which says nothing about the others.
    """
    gap: Tensor = _gap(found, expected).norm(dim=-1) / _finite(expected).norm(dim=-1).clamp(min=1e-12)
    return gap[~(found.isnan() & expected.isnan()).all(-1)]


def median_distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the median of ``by_vector`` over all the expected tensors; of numbers without dimension their largest."""
    vectors = [by_vector(found[name], value) for name, value in expected.items() if value.dim()]
    if vectors:
        return float(torch.cat(vectors).median())
    return max((relative(found[name], value) for name, value in expected.items()), default=0.0)


def _gap(found: Tensor, expected: Tensor) -> Tensor:
    """Return the difference, zero where both are NaN or the same infinity."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    return (found.double() - expected.double()).masked_fill(same, 0)


def _finite(value: Tensor) -> Tensor:
    return value.double().masked_fill(~value.isfinite(), 0)


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative distance of two structures' tensors, infinite where their shapes differ."""
    if list(found) != list(expected) or any(found[name].shape != expected[name].shape for name in found):
        return float("inf")
    return max((relative(found[name], expected[name]) for name in found), default=0.0)
