"""Weights are drawn again, so that attention matters."""

from __future__ import annotations

import math

import torch
from torch import nn

GAIN = 1.25  # of a matrix: scores, a product of two of its outputs, get a spread of one to two


def redraw(model: nn.Module, seed: int) -> None:
    """Draw every floating parameter again, in place; buffers stay.

    Matrices and convolutions are normal with a spread from the number of inputs of each output, tables of embeddings
    are normal with spread one, scales lie around one, other vectors are small. Parameters that are one tensor stay
    one tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in tables:
                drawn = noise
            elif parameter.dim() < 2:
                drawn = 1 + 0.1 * noise if _is_scale(name, parameter) else 0.1 * noise
            else:
                drawn = noise * (GAIN / math.sqrt(_fan_in(parameter)))
            parameter.copy_(drawn)


def _is_scale(name: str, parameter: torch.Tensor) -> bool:
    """A norm's weight, a layer scale: what the class began near one, or calls a weight."""
    return name.endswith(("weight", "scale", "gamma")) or bool((parameter - 1).abs().mean() < 0.1)


def _fan_in(parameter: torch.Tensor) -> int:
    return max(parameter.numel() // max(parameter.shape[0], 1), 1)
