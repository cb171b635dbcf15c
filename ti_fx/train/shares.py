"""A micro-batch's share in each loss: how many entries a mean is taken over, told from the inputs alone.

The loss of a batch is not the mean of its micro-batches' losses where these hold unequal numbers of tokens or rows, on
one device or on several. So a mean over a micro-batch is weighed by its own count over the count in the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.ir.edit import input_names
from ti_fx.numerics import losses
from ti_fx.passes.prepare.return_parts import Part, loss_parts

Inputs = Mapping[str, Tensor]


class PartCounts:
    """How many entries each part of a prepared graph's loss is a mean over, by a batch's inputs."""

    def __init__(self, prepared: GraphModule) -> None:
        self.parts: list[Part] = loss_parts(prepared)
        self.placeholders = prepared.graph.find_nodes(op="placeholder")
        self.inputs = input_names(prepared)
        self._counters = [_counter(part.node) for part in self.parts]

    def of(self, inputs: Inputs) -> Tensor:
        """Return the count of each part, float64, on the CPU."""
        sizes = self._sizes(inputs)
        return torch.tensor([count(inputs, sizes) for count in self._counters], dtype=torch.float64)

    def _sizes(self, inputs: Inputs) -> dict[Any, Any]:
        """Return what the symbols of the graph's sizes are in a batch."""
        known: dict[Any, Any] = {}
        for node in self.placeholders:
            value = inputs.get(str(node.target))
            if value is None:
                continue
            for size, actual in zip(node.meta["val"].shape, value.shape, strict=False):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    known.setdefault(size.node.expr, sympy.Integer(actual))
        return known


Counter = Callable[[Inputs, Mapping[Any, Any]], float]


def _counter(part: Node) -> Counter:
    """Return what counts a part's entries: the tokens that its mask keeps, else the product of its value's sizes."""
    value, mask = _compared(part)
    if value is None:
        return _rows
    if mask is not None and losses.masks_tokens(part.target, value, mask.meta["val"]):  # type: ignore[arg-type]
        name = _input_of(mask)
        return lambda inputs, sizes: float((inputs[name] != 0).sum())
    shape = tuple(losses.averaged(part.target, value))  # type: ignore[arg-type]
    return lambda inputs, sizes: _product(shape, inputs, sizes)


def _compared(part: Node) -> tuple[Tensor | None, Node | None]:
    """Return the student's value and the mask of a part; no value where another function than Distill's makes it."""
    if part.target not in losses.COMPARE or not isinstance(part.args[0], Node):
        return None, None
    mask = part.args[2] if len(part.args) > 2 else None
    return part.args[0].meta["val"], mask if isinstance(mask, Node) else None


def _input_of(mask: Node) -> str:
    """Return the name of the input that a mask is, or is a view of."""
    while mask.op != "placeholder":
        mask = mask.all_input_nodes[0]
    return str(mask.target)


def _rows(inputs: Inputs, sizes: Mapping[Any, Any]) -> float:
    return float(count_rows(inputs))


def count_rows(tensors: Inputs) -> int:
    """Return how many rows a batch has."""
    return next((len(value) for value in tensors.values() if value.dim()), 1)


def _product(shape: Sequence[Any], inputs: Inputs, sizes: Mapping[Any, Any]) -> float:
    """Return the product of sizes; rows, where one of them depends on more than the sizes of inputs."""
    found = []
    for size in shape:
        if isinstance(size, torch.SymInt):
            expression = size.node.expr.xreplace(dict(sizes))
            if not expression.is_number:
                return _rows(inputs, sizes)
            size = int(expression)
        found.append(size)
    return float(math.prod(found))
