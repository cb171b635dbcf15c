"""Finds the vectors of each head that an attention block multiplies: queries by keys, and maps by values."""

from __future__ import annotations

from typing import NamedTuple

from torch.fx import GraphModule, Node

from ti_fx.find.attention import AttentionSite
from ti_fx.find.walk import Walk, is_float, operands
from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name

_PLAIN = frozenset(["matmul", "bmm", "baddbmm"])  # of (..., tokens, features) by (..., features, tokens)


class HeadVectors(NamedTuple):
    """The factors of a block's products, nodes of the student.

    Attributes:
        query, value: shape ``(..., tokens, features)``.
        key: shape ``(..., features, tokens)``: as the product with the queries reads it.
    """

    query: Node
    key: Node
    value: Node


def head_vectors(gm: GraphModule, sites: list[AttentionSite]) -> list[HeadVectors | None]:
    """Return each block's factors; None where its products are not two plain matrix products.

    A prepared graph is read on its teacher subgraph, which no pass rewires.
    """
    teacher, student = roles.twin_of(gm.graph), roles.twins(gm.graph)
    walk = Walk(gm, "teacher" if teacher else "student")
    found: list[HeadVectors | None] = []
    for site in sites:
        vectors = None
        if site.scores is not None and site.map is not None:
            scores, map_, context = (
                teacher.get(node, node) for node in (site.scores, site.map, site.context)
            )
            vectors = _factors(walk, scores, map_, context)
        found.append(vectors and HeadVectors(*(student.get(node, node) for node in vectors)))
    return found


def _factors(walk: Walk, scores: Node, map_: Node, context: Node) -> HeadVectors | None:
    products = walk.backward(
        scores, walk.is_activation_product, lambda node: node in walk.computed and is_float(node)
    )
    if not products or any(aten_name(node) not in _PLAIN for node in (products[0], context)):
        return None
    query, key = operands(products[0])
    weights, value = operands(context)
    if not (weights is map_ or walk.reaches(map_, weights)):
        return None  # values by a transposed map
    return HeadVectors(query, key, value)
