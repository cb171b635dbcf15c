"""A quantiser says how activations are rounded, in training and in the file, and how far that may move a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ti_fx.numerics.onnx_nodes import Quantised


@dataclass(frozen=True)
class Quantiser:
    """One way to round activations, the same in training and in the file.

    Attributes:
        function: the fake-quantiser, ``function(value)`` of the same shape and dtype with its surrogate gradient: what
            the graph calls, and what the quantiser is found by. It can be imported by its name.
        batch_invariant: whether a row's result is independent of what else is in the batch.
        step: the most that one step of it is, for each value of a tensor that it gave: float64 of the shape ``()``, or
            ``(..., 1)``, one a token. Two correct implementations may differ by it.
        codes: gives codes, scale and zero point in ONNX, for a product of integers; None where the product's operator
            quantises by itself, and where only floats can be multiplied.
        value: gives the fake-quantised value in ONNX, where no product of integers reads it, ``value(x)``, or
            ``value(x, block)`` of one with blocks; None dequantises the codes.
        opset: the first ONNX opset that can express it.
        per_token: whether the scale of ``codes`` has one entry per token.
        block: neighbours of a token that share a scale within MatMulNBits; 0 where another product reads it.
    """

    function: Callable[[Tensor], Tensor]
    batch_invariant: bool
    step: Callable[[Tensor], Tensor]
    codes: Callable[[Tensor], Quantised] | None
    value: Callable[..., Tensor] | None
    opset: int
    per_token: bool = False
    block: int = 0

    def __post_init__(self) -> None:
        if self.codes is None and self.value is None:
            raise ValueError(f"{self.name} has no form in ONNX; give codes, value or both")

    @property
    def name(self) -> str:
        """The name of its function, by which an encoding names it."""
        return str(self.function.__name__)


def step_of_tensor(value: Tensor) -> Tensor:
    """Return the step of a symmetric int8 range over the whole tensor, ``()``; an asymmetric one's is smaller."""
    return value.abs().max().double() / 127


def step_of_token(value: Tensor) -> Tensor:
    """Return the step of a symmetric int8 range over each vector of the last dimension, ``(..., 1)``."""
    return value.abs().amax(-1, keepdim=True).double() / 127


def one_where_zero(scale: Tensor) -> Tensor:
    """Return scales to divide by: zeros quantise to zero by any."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
