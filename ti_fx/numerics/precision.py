"""The precision in which statistics are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(value: Tensor) -> Tensor:
    """Return ``value`` in float32, or as it is if it is float64: statistics are never computed in less."""
    return value if value.dtype == torch.float64 else value.float()
