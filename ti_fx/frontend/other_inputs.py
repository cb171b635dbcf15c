"""Makes inputs beside the example: at other sizes that the graph claims to take, and ids at the ends of tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.find.walk import before_moves
from ti_fx.frontend.dynamic_sizes import BATCH
from ti_fx.ir.edit import aten_name, constant_size, stored
from ti_fx.ir.facts import facts


def other_sizes(gm: GraphModule, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, int]]:
    """Yield sizes of the dynamic dimensions, by symbol, that the graph claims to take and the example does not have.

    1. odd ones near the example's, which neither 2 nor 3 divides, the batch 3   2. one row alone, and others again
    3. everything but the batch at its smallest: mostly one token
    """
    ranges = _ranges(gm, tensors)
    if not ranges:
        return
    yield {name: _odd(one) for name, one in ranges.items()}
    yield {name: one.lowest if one.is_batch else _odd(one, 1) for name, one in ranges.items()}
    yield {name: one.example if one.is_batch else one.lowest for name, one in ranges.items()}


class _Range:
    """Which sizes a symbol stands for, and which one the example has."""

    def __init__(self, example: int, lowest: int, highest: int | None, is_batch: bool) -> None:
        self.example, self.lowest, self.highest, self.is_batch = example, lowest, highest, is_batch


def _ranges(gm: GraphModule, tensors: Mapping[str, Tensor]) -> dict[str, _Range]:
    """Return the range of each symbol that a dimension of an input is; the trace takes every size for at least 2."""
    found: dict[str, _Range] = {}
    smallest = facts(gm).sizes.smallest
    for node in gm.graph.find_nodes(op="placeholder"):
        if str(node.target) not in tensors:
            continue
        for index, size in enumerate(node.meta["val"].shape):
            if constant_size(size) is None and size.node.expr.is_Symbol:
                bounds = size.node.shape_env.bound_sympy(size.node.expr)
                lower = int(bounds.lower)
                found.setdefault(
                    str(size),
                    _Range(
                        tensors[str(node.target)].shape[index],
                        max(smallest.get(str(size), 1 if lower <= 2 else lower), 1),
                        int(bounds.upper) if bounds.upper.is_Integer else None,
                        index == 0,
                    ),
                )
    return found


def _odd(one: _Range, skip: int = 0) -> int:
    """Return a size in the range that neither 2 nor 3 divides (of a batch, that 2 does not), not the example's."""
    divisors = (2,) if one.is_batch else (2, 3)
    below = range(one.example - 1, max(one.lowest, 2) - 1, -1)
    above = range(one.example + 1, min(one.highest or one.example + 8, one.example + 8) + 1)
    first, second = (above, below) if one.is_batch else (below, above)
    good = [size for size in (*first, *second) if all(size % divisor for divisor in divisors)]
    return good[min(skip, len(good) - 1)] if good else one.example


def resized(gm: GraphModule, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the example at other sizes: the batch in the reverse order, and everything repeated or cut at the end."""
    found = dict(tensors)
    for node in gm.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        for index, size in enumerate(node.meta["val"].shape if name in found else ()):
            if constant_size(size) is not None:
                continue
            expression = size.node.expr
            wanted = int(expression.subs({one: sizes[str(one)] for one in expression.free_symbols}))
            value = found[name]
            order = torch.arange(wanted) % value.shape[index]
            if facts(gm).sizes.names.get(str(size)) == BATCH:
                order = value.shape[index] - 1 - order
            found[name] = value.index_select(index, order.to(value.device))
    return found


def at_the_ends(gm: GraphModule, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with the first index of the last row 0, and its last one the largest of its table."""
    largest: dict[str, int] = {}
    for node in gm.graph.nodes:
        for table, index in _look_ups(node):
            value, source = stored(gm, table), _source(index)
            if value is not None and source is not None:
                name = str(source.target)
                largest[name] = min(largest.get(name, value.shape[0] - 1), value.shape[0] - 1)
    found = dict(tensors)
    for name, last in largest.items():
        value = found.get(name)
        if value is None or value.is_floating_point() or value.dim() < 2 or not value.numel():
            continue
        found[name] = value.clone()
        row = found[name][-1].view(-1)
        row[0], row[-1] = 0, last
    return found


def _look_ups(node: Node) -> Iterator[tuple[Node, Node]]:
    """Yield a table and its index, where a node looks up rows."""
    arguments: tuple[Any, ...] = node.args
    if aten_name(node) == "embedding":
        pairs = [(arguments[0], arguments[1])]
    elif aten_name(node) == "index" and len(arguments[1]) == 1:
        pairs = [(arguments[0], arguments[1][0])]
    elif aten_name(node) == "index_select" and arguments[1] == 0:
        pairs = [(arguments[0], arguments[2])]
    else:
        return
    for table, index in pairs:
        if isinstance(table, Node) and isinstance(index, Node):
            yield table, index


def _source(index: Node) -> Node | None:
    """Return the input that an index is, past what only moves it; None if it is computed."""
    node = before_moves(index)
    return node if node.op == "placeholder" else None
