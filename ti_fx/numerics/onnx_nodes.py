"""A function on tensors becomes the ONNX node that it names when the graph is exported.

It computes nothing in PyTorch (``torch.onnx.ops.symbolic`` returns zeros of the right shape), so it only ever stands in
the private copy that the exporter traces.
Each function that stands in a graph says which opset is the first that has what it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Quantised = tuple[Tensor, Tensor, Tensor]  # codes (uint8), scale (float32), zero point (uint8)
Size = Sequence[int | torch.SymInt]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def node(
    name: str, inputs: Sequence[Tensor | None], dtype: torch.dtype, shape: Size, **attributes: Any
) -> Tensor:
    """Return the value of one ONNX node with one output.

    Args:
        name: of the operator, with its domain before ``::`` unless that is ONNX's own.
        inputs: its inputs in order; None leaves an optional one out.
        dtype: of its output.
        shape: of its output.
        attributes: of the node.
    """
    domain = name.partition("::")[0] if "::" in name else ""
    version = 1 if domain else None
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=version)


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a value in another type: a Cast, as torch.onnx knows it without decomposing anything."""
    made: Tensor = torch.ops.aten._to_copy.default(value, dtype=dtype)
    return made


def nodes(
    name: str,
    inputs: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[Size],
    **attributes: Any,
) -> Sequence[Tensor]:
    """Return the values of one ONNX node of ONNX's own domain with several outputs; arguments as of :func:`node`."""
    return torch.onnx.ops.symbolic_multi_out(name, inputs, attributes, dtypes=dtypes, shapes=shapes)


def since_opset(opset: int) -> Callable[[_Function], _Function]:
    """Say of a function which ONNX opset is the first that has what it stands for: its attribute ``opset``."""

    def say(function: _Function) -> _Function:
        function.opset = opset  # type: ignore[attr-defined]
        return function

    return say


@since_opset(18)
def dequantise(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``(codes - zero point) * scale``: DequantizeLinear with one scale."""
    return node("DequantizeLinear", (codes, scale, zero_point), torch.float32, codes.shape)


@since_opset(18)
def within(codes: Tensor, least: int, most: int) -> Tensor:
    """Return codes, uint8, moved into the range from ``least`` to ``most``: Clip."""
    ends = (torch.full((), end, dtype=torch.uint8) for end in (least, most))
    return node("Clip", (codes, *ends), torch.uint8, codes.shape)
