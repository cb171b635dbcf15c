"""Functions whose gradient is set by hand: rounding passes it on, a detach stops it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ti_fx.numerics.precision import at_least_float32


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        if (
            isinstance(value.numel(), int) and not value.numel()
        ):  # an expert that no token goes to; no symbolic size
            return value.clone()
        return rounded(at_least_float32(value)).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(value: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``rounded(value)`` with the gradient of ``value`` itself (Bengio et al., arXiv 1308.3432).

    Args:
        value: floating, any shape; an empty tensor is returned as it is.
        rounded: computes in at least float32, whatever autocast says; it must not edit its argument. The result has
            the shape and dtype of ``value``.
    """
    result: Tensor = _StraightThrough.apply(value, rounded)  # type: ignore[no-untyped-call]
    return result


def detach(value: Tensor) -> Tensor:
    """Stop the gradient: the same values, with nothing behind them to train (arXiv 2302.11812, section 3)."""
    return value.detach()
