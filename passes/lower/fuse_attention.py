"""Unquantised attention becomes ONNX's own node, which ONNX Runtime computes without moving the heads.

Measured: on MiniLM, batch 8, sequence 128, the unfused blocks take 12% of the whole model's time more.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name, call, constant_size, supersede
from ti_fx.ir.facts import facts, record_facts
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.passes.lower import operators
from ti_fx.passes.lower.opset import FUSED_OPSET, has_fused_operators, opset_of
from ti_fx.passes.lower.patterns import COPIES, RESHAPES, called, rank, split_view, transposed

# ONNX Runtime 1.31 gives zeros where a whole row of the mask is the lowest float or -inf; softmax gives the mean of V.
LOWEST = -1e38
# What is filled in below this leaves nothing of a score after the softmax, as LOWEST does, and a row of it the mean.
FILLED = -1e9

# Parts of a tensor, whose width shape inference finds if it knows the tensor's.
_PARTS = frozenset(["slice", "split", "split_with_sizes", "chunk", "unbind", "select", *COPIES])


@dataclass(frozen=True)
class FuseAttention(Pass):
    """The nodes of a block of attention become one.

    before:  %q = transpose(view(%query, [b, s, h, d]), 1, 2)    after: %merged = attention(%query, %key, %value, %mask)
             %k, %v the same
             %scores = matmul(%q, transpose(%k, 2, 3)) * scale + %mask
             %context = matmul(softmax(%scores), %v)
             %merged = view(transpose(%context, 1, 2), [b, s, h * d])

    1. keys and values of a cache (``cat([%past, %k], 2)``) go into the node   2. heads that share them (``expand`` and
    ``reshape``), too   3. where the heads of one operand were not split from merged ones, or merged values come from a
    reshape, the node takes all with their heads apart, and gives the context so

    4. a mask of one row for all tokens (``[b, 1, 1, n]``), or of fewer dimensions, is expanded   5. a mask that is
    filled in (``masked_fill(%scores, %hidden, -1e9)``) is added

    A block with anything else on the way (a fake-quantiser, a second reader of the map) is left as it is; why is a fact
    of the graph (``unfused``). Below opset 25 no block is replaced.
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Replace every block of this form."""
        softmaxes = [node for node in gm.graph.nodes if aten_name(node) == "softmax"]
        found: list[_Match] = []
        unfused: dict[str, str] = {}
        for softmax in softmaxes:
            match = (
                _match(softmax) if has_fused_operators(gm) else f"opset {opset_of(gm)} is below {FUSED_OPSET}"
            )
            if isinstance(match, str):
                unfused[softmax.name] = match
            else:
                found.append(match)
        record_facts(gm, unfused={**facts(gm).unfused, **unfused})
        matches = _with_caches(found, gm.graph)
        sums: dict[tuple[_Mask, ...], Node] = {}
        wholes = [_replace(match, _mask(match, sums)) for match in matches]
        for match, whole in zip(matches, wholes, strict=True):
            _give_cache(gm.graph, match, whole)
        gm.graph.eliminate_dead_code()


@dataclass(frozen=True)
class _Operand:
    """Keys or values.

    Attributes:
        new: ``(batch, heads, length, size)``.
        past: the same of a cache, before them; None without one.
        present: both in one; None without a cache.
    """

    new: Node
    past: Node | None
    present: Node | None

    @property
    def heads(self) -> int | None:
        """How many there are, None if it is not fixed."""
        return constant_size(self.new.meta["val"].shape[1])


@dataclass(frozen=True)
class _Mask:
    """What hides tokens: numbers that are added to the scores, or where a very low one is filled in.

    Attributes:
        node: float32 numbers, or booleans.
        hidden: the boolean in whose place a number is filled in; None of a mask that is added.
    """

    node: Node
    hidden: bool | None = None


@dataclass(frozen=True)
class _Match:
    query: Node
    key: _Operand
    value: _Operand
    masks: tuple[_Mask, ...]
    scale: float
    softmax: Node
    context: Node


def _with_caches(matches: list[_Match], graph: Graph) -> list[_Match]:
    """Leave a cache to the node where it can give keys and values of the cache and the new tokens to the output.

    ONNX Runtime refuses a node with a cache whose longer one nobody takes: that of a block that reads another's keys.
    """
    found: list[_Match] = []
    given: set[Node] = set()
    for match in matches:
        parts = [part for operand in (match.key, match.value) if (part := operand.present) is not None]
        if all(graph.output_node() in part.users and part not in given for part in parts):
            given.update(parts)
            found.append(match)
            continue
        key, value = (
            _Operand(operand.present or operand.new, None, None) for operand in (match.key, match.value)
        )
        found.append(replace(match, key=key, value=value))
    return found


def _give_cache(graph: Graph, match: _Match, whole: Node) -> None:
    """Let the output take the longer cache from the fused node."""
    for index, operand in ((1, match.key), (2, match.value)):
        if operand.present is not None:
            part = call(whole.next, operator.getitem, (whole, index), role=roles.role(whole), like=whole)
            graph.output_node().replace_input_with(operand.present, part)


def _mask(match: _Match, sums: dict[tuple[_Mask, ...], Node]) -> Node | None:
    """Return the sum of what is added to the scores, which blocks share, with a row and a column for each token."""
    if not match.masks:
        return None
    if match.masks not in sums:
        total, *others = [_added(match.softmax, mask) for mask in match.masks]
        for other in others:
            total = call(match.softmax, torch.ops.aten.add.Tensor, (total, other))
        if any(mask.hidden is None for mask in match.masks):
            total = call(match.softmax, torch.ops.aten.clamp.default, (total, LOWEST))
        sums[match.masks] = _whole(match, total)
    return sums[match.masks]


def _added(before: Node, mask: _Mask) -> Node:
    if mask.hidden is None:
        return mask.node
    numbers = (LOWEST, 0.0) if mask.hidden else (0.0, LOWEST)
    return call(before, torch.ops.aten.where.Scalar, (mask.node, *numbers))


def _whole(match: _Match, mask: Node) -> Node:
    """Return a sum of masks with four dimensions and a row for each token: ONNX Runtime takes no fewer."""
    shapes = [one.node.meta["val"].shape for one in match.masks]
    for _ in range(4 - max(map(len, shapes))):
        mask = call(match.softmax, torch.ops.aten.unsqueeze.default, (mask, 0))
    rows = match.softmax.meta["val"].shape[2]
    if any(str(shape[-2]) == str(rows) for shape in shapes if len(shape) > 1):
        return mask
    size: Any = constant_size(rows)
    if size is None:
        size = call(match.softmax, torch.ops.aten.sym_size.int, (match.query, 2))
    return call(match.softmax, torch.ops.aten.expand.default, (mask, [-1, -1, size, -1]))


def _has_known_width(view: Node | None) -> bool:
    """Whether ONNX's shape inference finds the width of merged values: of a reshaped tensor it doesn't, and takes 0."""
    node = None if view is None else view.all_input_nodes[0]
    while node is not None and (node.target is operator.getitem or aten_name(node) in _PARTS):
        node = node.all_input_nodes[0]
    return node is not None and aten_name(node) not in RESHAPES


def _replace(match: _Match, mask: Node | None) -> Node:
    """Put the fused node in the place of the context and return it."""
    heads = constant_size(match.query.meta["val"].shape[1])
    operands: list[Any] = [match.query, match.key.new, match.value.new]
    merged = _merged(match.context)
    views = [split_view(node) for node in operands]
    old = match.context
    if merged is not None and None not in views and _has_known_width(views[2]):
        operands, old = [view.args[0] for view in views if view is not None], merged
    arguments = (*operands, mask, match.scale, heads, match.key.heads)
    if match.key.past is None:
        whole = context = call(old, operators.attention, arguments)
    else:
        cache = match.key.past, match.value.past
        whole = call(old, operators.attention_with_cache, (*arguments, *cache))
        context = call(old, operator.getitem, (whole, 0))
    supersede(old, context)
    return whole


def _match(softmax: Node) -> _Match | str:
    """Return a block, or why it is none of this form.

    1. the map's only reader   2. from the scores back to Q and K   3. cache and shared heads of K and V
    """
    context = _only_reader(softmax)
    if context is None:
        return "its map is read more than once"
    if not called(context, "matmul") or context.args[0] is not softmax:
        return f"its map goes into {aten_name(context) or context.name}, not into a product with the values"
    if softmax.meta["val"].dim() != 4:
        return f"its scores have {softmax.meta['val'].dim()} dimensions, not 4"
    if softmax.args[1] not in (-1, 3) or _is_cast(softmax):
        return "its softmax is in another type or over another dimension than the last"
    scores: Any = softmax.args[0]
    masks: list[_Mask] = []
    if called(scores, "masked_fill", "where"):
        filled = _filled(scores)
        if isinstance(filled, str):
            return filled
        scores, mask = filled
        masks.append(mask)
    while called(scores, "add") and len(scores.args) == 2 and not scores.kwargs:
        if not _is_mask(scores.args[1], softmax):
            return "what is added to its scores is no float32 mask with a column for each token"
        masks.insert(0, _Mask(scores.args[1]))
        scores = scores.args[0]
    scale = 1.0
    if called(scores, "mul", "div") and isinstance(scores.args[1], float | int):
        scale = float(scores.args[1]) if aten_name(scores) == "mul" else 1 / float(scores.args[1])
        scores = scores.args[0]
    if not called(scores, "matmul"):
        return f"its scores are made by {aten_name(scores) or scores.name}, not by a product and masks"
    if scale <= 0 or not math.isfinite(scale):
        return f"its scores are multiplied by {scale:g}"
    query: Any = scores.args[0]
    rows = transposed(scores.args[1], (2, 3))
    heads = constant_size(softmax.meta["val"].shape[1])
    if rows is None or heads is None or rank(query) != 4 or rank(context.args[1]) != 4:
        return "its queries, keys and values are not (batch, heads, length, size)"
    key, value = _operand(rows), _operand(context.args[1])
    if not key.heads or key.heads != value.heads or heads % key.heads:
        return "its keys and values differ in heads, or have none that divide the queries'"
    if (key.past is None) != (value.past is None) or any(
        [str(size) for size in operand.new.meta["val"].shape[:1]] != [str(query.meta["val"].shape[0])]
        for operand in (key, value)
    ):
        return "its keys and values are not of the queries' batch, or only one of them has a cache"
    return _Match(query, key, value, tuple(masks), scale, softmax, context)


def _filled(node: Node) -> tuple[Any, _Mask] | str:
    """Return the scores in which a number is filled in, and where; or why the node can't be fused."""
    if aten_name(node) == "masked_fill":
        scores, place, number = node.args
        hidden = True
    else:
        place, scores, number = node.args
        hidden = False
    if not isinstance(number, float | int) or not isinstance(scores, Node) or not isinstance(place, Node):
        return "what is filled into its scores is no number"
    if number == -math.inf:
        return "its scores are filled with -inf, of which a row that is masked whole gives NaN (fill in -1e9)"
    if number > FILLED:
        return f"its scores are filled with {number:g}, which is not far below any score (fill in -1e9)"
    value = place.meta["val"]
    if str(value.shape[-1]) != str(node.meta["val"].shape[-1]):
        return "the mask of its scores has no column for each token"
    return scores, _Mask(place, hidden)


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_cast(softmax: Node) -> bool:
    dtype = softmax.args[2] if len(softmax.args) > 2 else softmax.kwargs.get("dtype")
    return dtype not in (None, torch.float32)


def _is_mask(mask: Any, softmax: Node) -> bool:
    """Whether numbers are added to the scores of which each token has its own; batch, heads and rows may be 1."""
    value = mask.meta.get("val") if isinstance(mask, Node) else None
    if not isinstance(value, Tensor) or not 1 <= value.dim() <= 4 or value.dtype != torch.float32:
        return False
    return str(value.shape[-1]) == str(softmax.meta["val"].shape[-1])


def _operand(whole: Any) -> _Operand:
    """Return what keys or values, ``(batch, heads, length, size)``, are made of.

    1. heads that share them are given once   2. the cache before them is given apart
    """
    node = _shared(whole)
    if (
        not called(node, "cat")
        or len(node.args[0]) != 2
        or int(node.args[1] if len(node.args) > 1 else 0) not in (2, -2)
    ):
        return _Operand(node, None, None)
    past, new = node.args[0]
    if past.op != "placeholder" or len({str(part.meta["val"].shape[1]) for part in (past, new, node)}) > 1:
        return _Operand(node, None, None)
    return _Operand(new, past, node)


def _shared(node: Any) -> Any:
    """Return the keys or values that heads share: ``reshape(expand(unsqueeze(%k, 2), [b, h, n, s, d]), ...)``."""
    if not called(node, *RESHAPES) or not called(node.args[0], "expand"):
        return node
    wide: Any = node.args[0]
    narrow: Any = wide.args[0]
    if not called(narrow, "unsqueeze") or narrow.args[1] != 2 or rank(wide) != 5 or rank(node) != 4:
        return node
    batch, heads, times, length, size = wide.meta["val"].shape
    source: Any = narrow.args[0]
    expected = [str(part) for part in (batch, heads * times, length, size)]
    same = [str(part) for part in source.meta["val"].shape] == [
        str(part) for part in (batch, heads, length, size)
    ]
    return source if same and [str(part) for part in node.meta["val"].shape] == expected else node


def _merged(context: Node) -> Node | None:
    """Return the node where the heads of the context are merged again."""
    node = _only_reader(context)
    if node is None or transposed(node, (1, 2)) is not context:
        return None
    node = _only_reader(node)
    while node is not None and aten_name(node) in COPIES:
        node = _only_reader(node)
    if node is None or aten_name(node) not in RESHAPES or node.meta["val"].dim() != 3:
        return None
    _, heads, _, size = context.meta["val"].shape
    return node if node.meta["val"].shape[2] == heads * size else None
