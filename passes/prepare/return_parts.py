"""Return the means that the losses are sums of, which a trainer weighs by how much each was taken over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from ti_fx.errors import PreconditionError
from ti_fx.ir import moved
from ti_fx.ir.outputs import prepared_result
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PHASE, PREPARED
from ti_fx.numerics import losses


@dataclass(frozen=True)
class Part:
    """One mean among the losses.

    Attributes:
        term: the loss that it belongs to (``scores``).
        weight: of the term, in the loss.
        node: the mean.
    """

    term: str
    weight: float
    node: Node


@dataclass(frozen=True)
class ReturnParts(Pass):
    """The graph returns the means beside their sums.

    before:  return {loss: %loss, losses: {scores: %loss_scores}, outputs: %outputs}
    after:   return {loss: %loss, losses: {scores: %loss_scores}, outputs: %outputs, parts: {scores: (%loss_scores_0,)}}

    Weights and variances that move are returned with them.

    For the fork of one phase. A mean over a micro-batch counts for as much as the micro-batch has of what it is taken
    over, so the sum of two means is not yet the loss of both batches.
    """

    takes = (PREPARED, PHASE)

    def requires(self, gm: GraphModule) -> None:
        """A graph with losses."""
        if prepared_result(gm) is None:
            raise PreconditionError("return-parts needs losses", missing="distill")

    def apply(self, gm: GraphModule) -> None:
        """Add the parts to what is returned."""
        result = prepared_result(gm)
        assert result is not None
        found: dict[str, tuple[Node, ...]] = {}
        for part in loss_parts(gm):
            found[part.term] = (*found.get(part.term, ()), part.node)
        weights, variances = moved.scheduled(gm) or None, moved.log_variances(gm) or None
        result = result._replace(parts=found, weights=weights, log_variances=variances)
        gm.graph.output_node().args = (result.structure(),)


def loss_parts(gm: GraphModule) -> list[Part]:
    """Return the means that the graph's loss is the weighted sum of, in order.

    A loss that a pass of one's own computes in another way is one part, of the term ``loss``.
    """
    result = prepared_result(gm)
    if result is None or result.loss.target is losses.nothing:
        return []
    weights = moved.weights(result)
    if not weights:
        return [Part("loss", 1.0, result.loss)]
    found = []
    for name, weight in weights.items():
        term = result.losses[name]
        parts: Any = term.args[0] if term.target is losses.total else (term,)
        found += [Part(name, moved.number(weight), part) for part in parts]
    return found
