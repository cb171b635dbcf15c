"""An id that PyTorch refuses is refused by the file, too: ONNX Runtime would count a negative one from the end."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.ir.edit import aten_name, call, tensor
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.shapes import OF_SHAPES
from ti_fx.ir.stages import PACKED

aten = torch.ops.aten
BEYOND = 2**31 - 1  # beyond every table, in both integer types


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# These take no negative index; it is their third argument.
_READERS = _names(
    "gather index_select scatter scatter_ scatter_add scatter_add_ scatter_reduce index_add index_add_ "
    "index_copy index_copy_"
)
_MOVES = _names(
    "view reshape slice select expand expand_as unsqueeze squeeze to _to_copy clone contiguous transpose permute "
    "flatten unflatten cat stack repeat chunk split flip unbind sum cumsum gather index index_select"
)
_COUNTS = _names(
    "argmax argmin argsort nonzero searchsorted bucketize abs relu sym_size zeros ones zeros_like ones_like "
    "new_zeros new_ones"
)
_INDEX = {"embedding": 1} | dict.fromkeys(_READERS, 2)
# Which arguments must be counts, so that the result is one.
_TERMS: dict[str, slice] = (
    dict.fromkeys(_COUNTS, slice(0))
    | dict.fromkeys(_MOVES, slice(1))
    | dict.fromkeys(("add", "add_", "mul", "minimum"), slice(2))
    | dict.fromkeys(("where", "remainder"), slice(1, 3))
    | {"clamp": slice(1, 2), "clamp_min": slice(1, 2), "arange": slice(3)}
)
_ORDERS = ("topk", "sort", "max", "min")


@dataclass(frozen=True)
class RequireIds(Pass):
    """A negative id becomes one beyond every table, which ONNX Runtime refuses.

    before:  %e = embedding(%table, %ids)            after:  %n = lt(%ids, 0)
                                                             %i = masked_fill(%ids, %n, 2147483647)
                                                             %e = embedding(%table, %i)

    1. look-ups, gather and scatter, which take no negative id in PyTorch (``x[ids]`` counts from the end there, too)
    2. of one_hot, one beyond its classes, too: ONNX gives it no class
    3. not where the id is computed from sizes and stored tensors alone, or can't be negative (a count, a clamped one)
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Guard each index that an input's values decide."""
        given: set[Node] = set()
        for node in list(gm.graph.nodes):
            if node.op == "placeholder" or _depends(node, given):
                given.add(node)
        for node in list(gm.graph.nodes):
            place = _INDEX.get(aten_name(node))
            ids = None if place is None else node.args[place]
            if isinstance(ids, Node) and ids in given and place is not None and not _counts(gm, ids):
                node.update_arg(place, _not_negative(node, ids))
            elif aten_name(node) == "one_hot" and node.args[0] in given and not _is_within(node.args[0]):
                _look_up_nothing(node)


def _not_negative(before: Node, ids: Node) -> Node:
    negative = call(before, aten.lt.Scalar, (ids, 0))
    return call(before, aten.masked_fill.Scalar, (ids, negative, BEYOND))


def _look_up_nothing(node: Node) -> None:
    """Look the ids of a one_hot up in as many zeros as it has classes, and add what is found: ONNX's takes any id."""
    ids, classes = node.args
    assert isinstance(ids, Node)
    guarded = _not_negative(node, ids)
    zeros = call(node, aten.zeros.default, ([classes],), kwargs={"dtype": torch.int64})
    found = call(node, aten.index.Tensor, (zeros, [guarded]))
    node.update_arg(0, call(node, aten.add.Tensor, (guarded, found)))


def _is_within(ids: Any) -> bool:
    """Whether ids were looked up in zeros."""
    found = ids.args[1] if aten_name(ids) == "add" else None
    return (
        isinstance(found, Node)
        and aten_name(found) == "index"
        and aten_name(found.all_input_nodes[0]) == "zeros"
    )


def _depends(node: Node, given: set[Node]) -> bool:
    """Whether a node's value depends on the values of an input, not on its sizes alone."""
    is_number = not isinstance(node.meta.get("val"), Tensor | tuple | list)
    return not is_number and aten_name(node) not in OF_SHAPES and not given.isdisjoint(node.all_input_nodes)


def _counts(gm: GraphModule, argument: Any) -> bool:
    """Whether an argument is never negative, whatever the inputs."""
    if isinstance(argument, list | tuple):
        return all(_counts(gm, one) for one in argument)
    if not isinstance(argument, Node):
        return isinstance(argument, int | float) and argument >= 0
    value, name = argument.meta.get("val"), aten_name(argument)
    if isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8):
        return True
    if argument.op == "get_attr":
        return bool((tensor(gm, str(argument.target)) >= 0).all())
    if argument.target is operator.getitem:
        source, index = argument.args
        ordered = isinstance(source, Node) and aten_name(source) in _ORDERS
        return _counts(gm, source) or (ordered and isinstance(index, int) and index == 1)
    if name == "masked_fill":
        source, where, number = argument.args
        is_guard = isinstance(where, Node) and aten_name(where) == "lt" and where.args == (source, 0)
        return _counts(gm, number) and (is_guard or _counts(gm, source))
    if name not in _TERMS or argument.kwargs.get("alpha"):
        return False
    terms = argument.args[_TERMS[name]]
    return (bool(terms) or name in _COUNTS) and _counts(gm, terms)
