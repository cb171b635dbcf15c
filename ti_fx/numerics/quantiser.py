"""A quantiser says how activations are rounded, in training and in the file, and how far that may move a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ti_fx.numerics.onnx_nodes import Quantised
from ti_fx.numerics.uniform import largest_code


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
        value: gives the fake-quantised value in ONNX, where no product of integers reads it; None dequantises codes.
        options: what ``codes`` and ``value`` take after the tensor, such as bits.
        opset: the first ONNX opset that can express it.
        per_token: whether the scale of ``codes`` has one entry per token.
        block: neighbours of a token that share a scale within MatMulNBits; 0 where another product reads it.
        start: the first value, ``()``, of a step that is learned, from values as they are to be rounded. The step is a
            Parameter that ``function``, ``step`` and ``codes`` take after the tensor; None: they take no more.
    """

    function: Callable[..., Tensor]
    batch_invariant: bool
    step: Callable[..., Tensor]
    codes: Callable[..., Quantised] | None
    value: Callable[..., Tensor] | None
    opset: int
    per_token: bool = False
    block: int = 0
    options: tuple[int, ...] = ()
    start: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.codes is None and self.value is None:
            raise ValueError(f"{self.name} has no form in ONNX; give codes, value or both")

    @property
    def name(self) -> str:
        """The name of its function, by which an encoding names it."""
        return str(self.function.__name__)

    @property
    def suffix(self) -> str:
        """What the names of its nodes end with: ``int4`` of ``int4_token``."""
        return self.name.partition("_")[0]


def step_of_tensor(value: Tensor, bits: int = 8) -> Tensor:
    """Return the step of a symmetric range over the whole tensor, ``()``; an asymmetric one's is smaller."""
    return value.abs().max().double() / largest_code(bits)


def step_of_token(value: Tensor, bits: int = 8) -> Tensor:
    """Return the step of a symmetric range over each vector of the last dimension, ``(..., 1)``."""
    return value.abs().amax(-1, keepdim=True).double() / largest_code(bits)


def asymmetric_step_of_tensor(value: Tensor, bits: int) -> Tensor:
    """Return the most that the step of a range over the whole tensor is, ``()``, which holds zero.

    What was rounded may span one step less than the range, where both its ends lie beside the middle of two codes.
    """
    span = value.amax().clamp(min=0).double() - value.amin().clamp(max=0).double()
    return span / (2 * largest_code(bits))


def asymmetric_step_of_token(value: Tensor, bits: int) -> Tensor:
    """Return the same of each vector of the last dimension, ``(..., 1)``."""
    low, high = value.amin(-1, keepdim=True).double(), value.amax(-1, keepdim=True).double()
    return (high.clamp(min=0) - low.clamp(max=0)) / (2 * largest_code(bits))
