"""Write attention's products and softmaxes in the one way that the other passes know."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import is_contiguous_or_false
from torch.fx import GraphModule, Node

from ti_fx.ir.edit import aten_name, call, constant_size, erase, supersede
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, EXPORTED, PREPARED

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Products of two activations become matmul, and a softmax written by hand becomes softmax. Capture runs it.

    before:  %s = einsum("bqhd,bkhd->bhqk", [%q, %k])   after:  %left = transpose(%q, 1, 2)
                                                                %right = transpose(transpose(%k, 1, 2), -2, -1)
                                                                %s = matmul(%left, %right)
             %p = exp(%s - amax(%s, [-1], True))
             %m = div(%p, sum(%p, [-1], True))                  %m = softmax(%s, -1)

    1. einsum of two activations that sums over one label; labels that one operand lacks are broadcast. Anything else
       (a stored operand, a diagonal, a label that only one operand has and nobody keeps) stays an einsum
    2. ``sum(mul(a, b), dim)`` where each factor is broadcast along a dimension that the other has
    3. ``exp(x - c) / sum(exp(x - c))``, ``c`` the same along the dimension or left out; ``exp(log_softmax(x))``;
       ``exp(x - logsumexp(x))``

    4. a linear or matmul whose input is not contiguous reads a contiguous copy: torch picks the kernel for such an
       input by whether the weight requires a gradient, so that a frozen teacher would differ by rounding

    5. ``as_strided``, which reads memory and not the dimensions of its input, reads these in the order of memory: ONNX
       has no memory, and takes every input for contiguous

    Values differ by rounding only: sums in another order.
    """

    takes = (EXPORTED, CAPTURED, PREPARED)

    def apply(self, gm: GraphModule) -> None:
        """Rewrite each; a node that no rule matches is left."""
        copies: dict[Node, Node] = {}
        for node in list(gm.graph.nodes):
            name = aten_name(node)
            if name in ("linear", "matmul"):
                _contiguous_input(node, copies)
            elif name == "as_strided":
                _in_memory_order(node)
            elif name == "einsum":
                _einsum(node)
            elif name == "sum":
                _product_sum(node)
            elif name in ("div", "exp"):
                _softmax(node)


def _in_memory_order(node: Node) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    strides = [constant_size(stride) for stride in source.meta["val"].stride()]
    known = [stride for stride in strides if stride is not None]
    if len(known) < len(strides) or is_contiguous_or_false(source.meta["val"]):
        return
    order = sorted(range(len(known)), key=lambda dimension: -known[dimension])
    node.update_arg(0, _call(node, aten.permute.default, source, order))


def _contiguous_input(node: Node, copies: dict[Node, Node]) -> None:
    source, weight = node.args[:2]
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    if len(_shape(source)) < 3 or len(_shape(weight)) != 2 or is_contiguous_or_false(source.meta["val"]):
        return
    if source not in copies:
        copies[source] = _call(node, aten.contiguous.default, source)
    node.update_arg(0, copies[source])


@dataclass(frozen=True)
class _Operand:
    """A factor, with one label for each of its dimensions."""

    node: Node
    labels: str


def _einsum(node: Node) -> None:
    equation, factors = node.args[:2]
    assert isinstance(factors, tuple | list)
    operands = [part for part in factors if isinstance(part, Node) and part.op != "get_attr"]
    if len(factors) != 2 or len(operands) != 2:
        return
    terms, arrow, output = str(equation).replace(" ", "").partition("->")
    ranks = [len(_shape(part)) for part in operands]
    written = _without_ellipsis(terms.split(","), output, ranks) if arrow else None
    if written is None:
        return
    left, right, output = written
    _rewrite(node, _Operand(operands[0], left), _Operand(operands[1], right), output)


def _without_ellipsis(terms: list[str], output: str, ranks: list[int]) -> tuple[str, str, str] | None:
    """Return the labels of both factors and of the result, with a capital for each dimension behind ``...``."""
    if any(label.isupper() for label in "".join([*terms, output])):
        return None
    most = 0
    for index, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        hidden = rank - len(term.replace("...", ""))
        most = max(most, hidden)
        terms[index] = term.replace("...", string.ascii_uppercase[26 - hidden :])
    output = output.replace("...", string.ascii_uppercase[26 - most :])
    return terms[0], terms[1], output


def _product_sum(node: Node) -> None:
    product, dims, *rest = (*node.args, None)
    if not isinstance(product, Node) or aten_name(product) != "mul" or len(product.users) > 1:
        return
    if any(rest) or node.kwargs or not isinstance(dims, tuple | list) or len(dims) != 1:
        return
    factors = [part for part in product.args if isinstance(part, Node) and _shape(part)]
    rank = len(_shape(product))
    if len(factors) != 2 or any(len(_shape(part)) != rank for part in factors):
        return
    letters = string.ascii_lowercase[:rank]
    own = [_broad_labels(part, letters) for part in factors]
    output = letters.replace(letters[int(str(dims[0]))], "")
    if not set(own[0]) - set(own[1]) or not set(own[1]) - set(own[0]) or rank != len(set(own[0] + own[1])):
        return
    squeezed = [
        _Operand(_call(node, aten.squeeze.dims, part, _missing(letters, labels)), labels)
        for part, labels in zip(factors, own, strict=True)
    ]
    if _rewrite(node, squeezed[0], squeezed[1], output):
        erase(product)
        return
    for operand in squeezed:
        erase(operand.node)


def _broad_labels(node: Node, letters: str) -> str:
    """Return the labels of the dimensions along which a factor is not broadcast."""
    return "".join(
        letter for letter, size in zip(letters, _shape(node), strict=True) if constant_size(size) != 1
    )


def _missing(letters: str, labels: str) -> list[int]:
    return [index for index, letter in enumerate(letters) if letter not in labels]


def _rewrite(node: Node, left: _Operand, right: _Operand, output: str) -> bool:
    """Write a contraction as matmul and return True; False if it is not a sum over one label."""
    both = set(left.labels) & set(right.labels)
    summed = both - set(output)
    kept = set(left.labels) | set(right.labels)
    unique = all(len(set(labels)) == len(labels) for labels in (left.labels, right.labels, output))
    if not unique or len(summed) != 1 or kept - summed != set(output):
        return False
    (inner,) = summed
    row = "".join(label for label in output if label not in right.labels)[-1:]
    column = "".join(label for label in output if label not in left.labels)[-1:]
    lead = "".join(label for label in output if label not in (row, column))
    first = _arranged(node, left, f"{lead}{row or '1'}{inner}")
    if column and right.labels.index(column) < right.labels.index(inner):
        second = _arranged(node, right, f"{lead}{column}{inner}")
        second = _call(node, aten.transpose.int, second, -2, -1)
    else:
        second = _arranged(node, right, f"{lead}{inner}{column or '1'}")
    product = _call(node, aten.matmul.default, first, second)
    found = f"{lead}{row}{column}"
    empty = [index for index, label in ((-2, row), (-1, column)) if not label]
    if empty:
        product = _call(node, aten.squeeze.dims, product, empty)
    supersede(node, _permuted(node, product, found, output))
    return True


def _arranged(before: Node, operand: _Operand, wanted: str) -> Node:
    """Return the operand with its dimensions in the wanted order, and a size of 1 where it lacks one."""
    present = "".join(label for label in wanted if label in operand.labels)
    node = _permuted(before, operand.node, operand.labels, present)
    for index, label in enumerate(wanted):
        if label not in operand.labels:
            node = _call(before, aten.unsqueeze.default, node, index)
    return node


def _permuted(before: Node, node: Node, labels: str, wanted: str) -> Node:
    order = [labels.index(label) for label in wanted]
    moved = [index for index, source in enumerate(order) if index != source]
    if not moved:
        return node
    if len(moved) == 2:
        return _call(before, aten.transpose.int, node, *moved)
    return _call(before, aten.permute.default, node, order)


def _softmax(node: Node) -> None:
    """Recognise the last node of a softmax and put softmax in its place."""
    if aten_name(node) == "exp":
        inner = node.args[0]
        if isinstance(inner, Node) and aten_name(inner) == "log_softmax" and len(inner.users) == 1:
            supersede(node, _call(node, aten.softmax.int, *inner.args))
            erase(inner)
        elif (
            isinstance(inner, Node)
            and aten_name(inner) == "sub"
            and not inner.kwargs
            and len(inner.args) == 2
        ):
            _less_their_total(node, inner)
        return
    powers, total = node.args[:2]
    if (
        node.kwargs
        or not isinstance(powers, Node)
        or not isinstance(total, Node)
        or aten_name(powers) != "exp"
    ):
        return
    dim = _summed_dimension(powers, total)
    if dim is None or set(powers.users) != {node, total} or set(total.users) != {node}:
        return
    (exponent,) = powers.args
    assert isinstance(exponent, Node)
    supersede(node, _call(node, aten.softmax.int, _unshifted(exponent, dim), dim))
    _erase_unread(total)


def _less_their_total(node: Node, difference: Node) -> None:
    """Put softmax in the place of exp(x - logsumexp(x))."""
    value, total = difference.args
    if not isinstance(value, Node) or not isinstance(total, Node) or aten_name(total) != "logsumexp":
        return
    dims = total.args[1]
    if total.args[0] is not value or not isinstance(dims, tuple | list) or len(dims) != 1:
        return
    rank = len(_shape(value))
    dim = int(str(dims[0])) % rank
    if len(_shape(total)) == rank and constant_size(_shape(total)[dim]) == 1:  # the dimension was kept
        supersede(node, _call(node, aten.softmax.int, value, dim - rank))
        _erase_unread(difference)


def _erase_unread(node: Node) -> None:
    """Erase a node that nobody reads, and upstream whatever nobody reads then."""
    queue = [node]
    while queue:
        part = queue.pop()
        if not part.users and part.op == "call_function":
            sources = part.all_input_nodes
            erase(part)
            queue += sources


def _summed_dimension(powers: Node, total: Node) -> int | None:
    """Return the dimension, counted from the last as -1, that ``total`` sums ``powers`` over and keeps."""
    if aten_name(total) != "sum" or total.kwargs or total.args[0] is not powers or len(total.args) != 3:
        return None
    dims, keep = total.args[1:]
    if not keep or not isinstance(dims, tuple | list) or len(dims) != 1:
        return None
    rank = len(_shape(powers))
    return int(str(dims[0])) % rank - rank


def _unshifted(exponent: Node, dim: int) -> Node:
    """Return x of ``x - c`` where c is the same along the dimension, else the exponent itself."""
    if aten_name(exponent) != "sub" or exponent.kwargs:
        return exponent
    value, shift = exponent.args[:2]
    if not isinstance(value, Node) or not isinstance(shift, Node) or not _same(value, exponent):
        return exponent
    sizes = _shape(shift)
    constant = len(sizes) < -dim or constant_size(sizes[dim]) == 1
    return value if constant else exponent


def _same(left: Node, right: Node) -> bool:
    """Whether two nodes have one shape; symbols are compared as text, which adds no guard."""
    return list(map(str, _shape(left))) == list(map(str, _shape(right)))


def _shape(node: Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _call(before: Node, function: Any, *args: Any) -> Node:
    """Insert a call that is named after the node that it serves and what it does."""
    return call(before, function, args, f"{before.name}_{function._schema.name.partition('::')[2]}")
