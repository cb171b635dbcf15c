"""Complex numbers, which ONNX lacks, become pairs of real ones along a last dimension of their own.

So written are the rotary positions of some models (DeepSeek-V2, Llama 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.errors import ExportError
from ti_fx.ir.edit import aten_name, call, supersede
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitComplex(Pass):
    """Everything between real inputs and real outputs that is complex is computed part by part.

    before:  %t = view_as_complex(%pairs) * polar(%ones, %angles)      after:  %table = stack(cos, sin of %angles)
             view_as_real(%t)                                                  %pairs * %table, part by part
    """

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Rewrite every complex node.

        Raises:
            ExportError: an operator has no rule here, or a complex number is returned; names the node.
        """
        pairs: dict[Node, Node] = {}
        for node in list(gm.graph.nodes):
            name = aten_name(node)
            if name == "view_as_real":
                supersede(node, call(node, aten.alias.default, (pairs[node.args[0]],)))
            elif _is_complex(node):
                if name not in _RULES:
                    raise _refusal(node)
                pairs[node] = _RULES[name](node, pairs)
        for node in reversed(pairs):
            for reader in node.users:
                raise _refusal(reader)
            gm.graph.erase_node(node)


def _refusal(node: Node) -> ExportError:
    return ExportError(
        f"%{node.name} ({node.target}) computes with complex numbers, which ONNX lacks; write it with real ones"
    )


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.is_complex()


def _polar(node: Node, pairs: dict[Node, Node]) -> Node:
    length, angle = node.args
    parts = [
        call(node, aten.mul.Tensor, (length, call(node, function, (angle,))))
        for function in (aten.cos.default, aten.sin.default)
    ]
    return call(node, aten.stack.default, (parts, -1))


def _as_complex(node: Node, pairs: dict[Node, Node]) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _same(node: Node, pairs: dict[Node, Node]) -> Node:
    return pairs[node.args[0]]  # type: ignore[index]


def _product(node: Node, pairs: dict[Node, Node]) -> Node:
    left, right = node.args
    if not _is_complex(left):
        left, right = right, left
    pair = pairs[left]  # type: ignore[index]
    if not _is_complex(right):
        factor = call(node, aten.unsqueeze.default, (right, -1)) if isinstance(right, Node) else right
        return call(node, aten.mul.Tensor, (pair, factor))
    (a, b), (c, d) = (
        [call(node, aten.select.int, (one, -1, index)) for index in (0, 1)]
        for one in (pair, pairs[right])  # type: ignore[index]
    )
    ac, bd, ad, bc = (call(node, aten.mul.Tensor, (x, y)) for x, y in ((a, c), (b, d), (a, d), (b, c)))
    parts = [call(node, aten.sub.Tensor, (ac, bd)), call(node, aten.add.Tensor, (ad, bc))]
    return call(node, aten.stack.default, (parts, -1))


def _along(node: Node, pairs: dict[Node, Node]) -> Node:
    """Do the same along one of the other dimensions, which count from the front."""
    source, dim, *others = node.args
    rank = source.meta["val"].dim() + (aten_name(node) == "unsqueeze")  # type: ignore[union-attr]
    assert callable(node.target)
    return call(node, node.target, (pairs[source], int(dim) % rank, *others))  # type: ignore[index, arg-type]


_RULES: dict[str, Callable[[Node, dict[Node, Node]], Node]] = {
    "polar": _polar,
    "view_as_complex": _as_complex,
    "mul": _product,
    "unsqueeze": _along,
    "slice": _along,
    "select": _along,
    **dict.fromkeys(("to", "clone", "contiguous", "alias", "detach"), _same),
}
