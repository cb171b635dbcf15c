"""Puts checks of decisions into the graph that is traced, and reads masks in sizes that don't depend on values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ti_fx.frontend.decisions import READS, Decision


def check(decision: Decision, func: Any, args: tuple[Any, ...]) -> None:
    """Put a check into the graph that is being traced: this read gives the same as on the example."""
    value = READS[func](*args)
    same = value == decision.outcome
    torch._assert_async(same.all(), decision.message)


def positions(mask: Tensor, count: int) -> list[Tensor]:
    """Return where a mask of fixed sizes is true, as one index per dimension, if it is so at ``count`` places.

    What ``nonzero`` gives, in sizes that don't depend on values.
    """
    flat = mask.flatten()
    places = torch.where(flat, flat.cumsum(0) - 1, count)
    every = torch.arange(flat.shape[0], device=mask.device)
    found = torch.zeros(count + 1, dtype=torch.long, device=mask.device).scatter(0, places, every)[:count]
    parts = []
    for size in reversed(mask.shape):
        parts.append(found % size)
        found = found // size
    return parts[::-1]
