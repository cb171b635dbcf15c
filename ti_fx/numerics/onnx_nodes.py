"""A function on tensors becomes the ONNX node that it names when the graph is exported.

Such functions stand in a lowered graph alone; each says which opset is the first that has what it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def since_opset(opset: int) -> Callable[[_Function], _Function]:
    """Say of a function which ONNX opset is the first that has what it stands for: its attribute ``opset``."""

    def say(function: _Function) -> _Function:
        function.opset = opset  # type: ignore[attr-defined]
        return function

    return say
