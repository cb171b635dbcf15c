"""Uniform quantisation rounds what lies in a range to the nearest of its equally spaced values, 2 to 256 of them.

Whose range it is, of a whole tensor, a token or neighbours, the caller says by the shape of its bounds. The same lines
compute in training and, where no product of integers reads the value, in the file.
"""

from __future__ import annotations

import torch
from torch import Tensor


def one_where_zero(scale: Tensor) -> Tensor:
    """Return scales to divide by: zeros quantise to zero by any."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def largest_code(bits: int) -> int:
    """Return the largest code of a symmetric range, 2**(bits - 1) - 1."""
    return (1 << (bits - 1)) - 1


def symmetric_scale(largest: Tensor, bits: int) -> Tensor:
    """Return the step of a range around zero: max|x| / (2**(bits - 1) - 1), so ±max|x| are codes themselves.

    ``largest``: max|x| of each range, any shape. Of zeros it is 1.
    """
    return one_where_zero(largest / largest_code(bits))


def symmetric(value: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Return the value rounded to -n..n times the step, n = 2**(bits - 1) - 1; half to even.

    Two bits are three values: -max|x|, 0 and max|x| (Krishnamoorthi, arXiv 1806.08342, section 2.2, restricted range).

    Args:
        value: float32 or float64, any shape.
        largest: max|x| of each range, of a shape that broadcasts.
        bits: 2 to 8.
    """
    most, scale = largest_code(bits), symmetric_scale(largest, bits)
    return (value / scale).round_().clamp_(-most, most).mul_(scale)


def asymmetric_scale(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return step and zero point of a range that holds zero: (high - low) / n and round(-low / step), n = 2**bits - 1.

    Args:
        low: the least value of each range, any shape; 0 where it is above.
        high: the greatest, of the same shape; 0 where it is below.
        bits: 2 to 8.

    Returns:
        The step, 1 where all is zero, and the code of zero, 0 to n and floating. Both have the shape of ``low``.
    """
    low, high, most = low.clamp(max=0), high.clamp(min=0), 2**bits - 1
    scale = one_where_zero((high - low) / most)
    return scale, (-low / scale).clamp(0, most).round()


def asymmetric(value: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return the value rounded to the codes 0..n of a range that holds zero, n = 2**bits - 1; half to even.

    codes = clamp(round(x / step) + zero point, 0, n), as ONNX DynamicQuantizeLinear computes them with 8 bits (Jacob et
    al., arXiv 1712.05877, equation 1). Zero is a code itself. The clamp matters where both ends round away from zero.

    Args:
        value: float32 or float64, any shape.
        low: the least value of each range, of a shape that broadcasts.
        high: the greatest, of the same shape.
        bits: 2 to 8.
    """
    scale, zero_point = asymmetric_scale(low, high, bits)
    codes = (value / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return codes.sub_(zero_point).mul_(scale)
