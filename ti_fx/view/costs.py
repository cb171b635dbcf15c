"""A node costs multiply-accumulates and elements, counted exactly in the graph's symbolic sizes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx.errors import InputError, did_you_mean
from ti_fx.ir import leaves
from ti_fx.ir.edit import aten_name
from ti_fx.ir.facts import facts

# A number of elements: an int, or a sympy expression (torch's symbolic sizes) with the same arithmetic.
Count = Any

# The operand whose last size is summed over.
_SUMMED = {"linear": 0, "mm": 0, "matmul": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")


def elements(value: Any) -> Count:
    """Return the number of elements of a (fake) tensor, or of all tensors in a tuple or list."""
    if isinstance(value, torch.Tensor):
        return reduce(operator.mul, map(count, value.shape), 1)
    if isinstance(value, tuple | list):
        return reduce(operator.add, map(elements, value), 0)
    return 0


def multiply_accumulates(gm: GraphModule, node: Node) -> Count:
    """Return how many multiply-accumulates a matrix product, convolution or fused attention makes; 0 for the rest."""
    name = aten_name(node)
    result = elements(node.meta.get("val"))
    if name in _SUMMED:
        return result * count(_value(node, _SUMMED[name]).shape[-1])
    if name in _CONVOLUTIONS:
        return result * elements(_value(node, 1)) / count(_value(node, 1).shape[0])
    if node.op == "call_module":
        leaf = gm.get_submodule(str(node.target))
        leaf = leaf.leaf if isinstance(leaf, leaves.Frozen) else leaf
        if isinstance(leaf, leaves.ScaledDotProductAttention):
            query, key = _value(node, 0), _value(node, 1)
            return (elements(query) + result) * count(key.shape[-2])
    return 0


def evaluated(gm: GraphModule, cost: Count, sizes: Mapping[str, int] | None) -> int | str:
    """Return a cost as a number where it is one, else as text in the dimensions' names: ``768*batch*sequence``.

    Args:
        gm: the graph, which knows the names of its dimensions.
        cost: what :func:`elements` or :func:`multiply_accumulates` returned.
        sizes: numbers for some or all of the names.

    Raises:
        InputError: ``sizes`` names a dimension that the graph does not have.
    """
    names = facts(gm).sizes.names
    for name in sizes or ():
        if name not in names.values():
            raise InputError(f"the graph has no dimension {name!r}{did_you_mean(name, names.values())}")
    for symbol in sorted(getattr(cost, "free_symbols", ()), key=str):
        name = names.get(str(symbol), str(symbol))
        number = (sizes or {}).get(name)
        cost = cost.subs(symbol, symbol.func(name) if number is None else number)
    return int(cost) if not getattr(cost, "free_symbols", ()) else str(cost)


def _value(node: Node, position: int) -> torch.Tensor:
    argument = node.args[position]
    assert isinstance(argument, Node)
    value = argument.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def count(size: int | torch.SymInt) -> Count:
    """Return a size as something to count with."""
    return size.node.expr if isinstance(size, torch.SymInt) else size
