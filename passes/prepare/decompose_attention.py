"""Write fused attention as matmul, softmax, matmul, so that scores and map are nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.errors import PostconditionError
from ti_fx.ir import leaves, roles
from ti_fx.ir.edit import call, call_module, erase, register
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Fused attention becomes the nodes that its documentation defines it by; attention that is not fused is left.

    before:  %context = ScaledDotProductAttention{p}(%q, %k, %v, %mask)

    after:   %kt = transpose(%k, -2, -1)          1. GQA: keys and values are repeated for their query heads
             %products = matmul(%q, %kt)          2. scale: 1 / sqrt(head size) unless given
             %scaled = mul(%products, scale)
             %scores = add(%scaled, %mask)        3. masks: added; boolean ones fill the lowest number in
             %map = softmax(%scores, -1)
             %rows = zero_masked_rows(%map, %mask)   4. a query whose mask hides every key has a context of zero
             %dropped = Dropout{p}(%rows)         5. dropout, in training only
             %context = matmul(%dropped, %v)

    Causal attention alone hides no query's every key, and has no such node.

    Other systems: torch's ``_scaled_dot_product_attention_math``, ONNX's function body of Attention.
    """

    takes = (CAPTURED, PREPARED)
    gives = PREPARED

    def apply(self, gm: GraphModule) -> None:
        """Rewrite every fused attention node, of student and teacher."""
        for node in fused(gm):
            _decompose(gm, node)

    def ensures(self, gm: GraphModule) -> None:
        """No fused attention is left."""
        for node in fused(gm):
            raise PostconditionError(f"decompose-attention left %{node.name}")


def fused(gm: GraphModule) -> list[Node]:
    """Return the fused attention nodes."""
    return [
        node
        for node in gm.graph.find_nodes(op="call_module")
        if isinstance(_leaf(gm, node), leaves.ScaledDotProductAttention)
    ]


def _leaf(gm: GraphModule, node: Node) -> nn.Module:
    module = gm.get_submodule(str(node.target))
    return module.leaf if isinstance(module, leaves.Frozen) else module


def _decompose(gm: GraphModule, node: Node) -> None:
    leaf = _leaf(gm, node)
    assert isinstance(leaf, leaves.ScaledDotProductAttention)
    role = roles.role(node)
    assert role is not None
    name = node.name.removesuffix("_t") if role == "teacher" else node.name
    suffix = "_t" if role == "teacher" else ""

    def insert(function: Any, args: tuple[Any, ...], part: str, **kwargs: Any) -> Node:
        made = call(node, function, args, f"{name}_{part}{suffix}", role, kwargs)
        if twin := roles.fact(node, "twin"):
            roles.record(made, twin=f"{twin}_{part}")
        return made

    query, key, value, *rest = node.args
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    if leaf.enable_gqa:
        repeats = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
        key = insert(aten.repeat_interleave.self_int, (key, int(repeats), -3), "key")
        value = insert(aten.repeat_interleave.self_int, (value, int(repeats), -3), "value")
    scale = leaf.scale if leaf.scale is not None else 1 / math.sqrt(int(query.meta["val"].shape[-1]))
    transposed = insert(aten.transpose.int, (key, -2, -1), "key_transposed")
    products = insert(aten.matmul.default, (query, transposed), "products")
    scores = insert(aten.mul.Tensor, (products, scale), "scaled")
    mask = rest[0] if rest else None
    if leaf.is_causal:
        mask = insert(leaves.causal_mask, (query, key), "causal")
    if isinstance(mask, Node):
        scores = insert(leaves.add_mask, (scores, mask), "scores")
    probabilities = insert(aten.softmax.int, (scores, -1), "map")
    if isinstance(mask, Node) and not leaf.is_causal:
        probabilities = insert(leaves.zero_masked_rows, (probabilities, mask), "rows")
    if role == "student" and leaf.dropout_p:
        probabilities = _dropout(gm, node, leaf.dropout_p, probabilities)
    context = insert(aten.matmul.default, (probabilities, value), "context")
    node.replace_all_uses_with(context)
    final, facts = node.name, roles.fact(node, "twin")
    erase(node)
    gm.graph._graph_namespace._used_names.discard(context.name)
    context._rename(final)
    if facts:
        roles.record(context, twin=facts)


def _dropout(gm: GraphModule, node: Node, probability: float, value: Node) -> Node:
    target = f"leaves.{node.name}_dropout"
    leaf = nn.Dropout(probability)
    leaf.train(gm.training)
    register(gm, target, leaf)
    return call_module(node, target, (value,), f"{node.name}_dropped")
