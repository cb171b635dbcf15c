"""Give the student norms of its own before attention's output projection and before the feed-forward's last one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.errors import PostconditionError, PreconditionError
from ti_fx.find.attention import find_attention
from ti_fx.find.feed_forward import find_feed_forward
from ti_fx.find.walk import projection_input, projection_weight
from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name, call, get_attr, register, replace_input
from ti_fx.ir.inserted import quantiser_of, source_of
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED

SUB_NORMS = "sub_norms."  # before the names of their weights
aten = torch.ops.aten


@dataclass(frozen=True)
class SubNorms(Pass):
    """What these projections read is normalised first: ``x · w / sqrt(mean x² + epsilon)`` over the features.

    before:  %out = linear(%merged, %wo_q)           after:  %square = pow(%merged, 2)  #student
                                                             ...
                                                             %normed = mul(%scaled, %w)
                                                             %out = linear(%normed, %wo_q)

    1. the output projection of each attention block, and ``down`` of each feed-forward block, found by data flow
    2. a norm stands before the quantiser of activations; its weight is a Parameter of the student, ones at first, named
       after the projection's: ``sub_norms.<its parameter>``
    3. the teacher has none. What is normalised stands for what was read, so losses and interventions follow

    The student computes other numbers than its teacher from the first step on: it is trained, not only rounded.

    Source: SubLN of BitNet Distillation, arXiv 2510.13998, section 3.1, as in BitNet b1.58.

    Attributes:
        epsilon: added to the mean square.
    """

    takes = (CAPTURED, PREPARED)
    gives = PREPARED

    epsilon: float = 1e-6

    def requires(self, gm: GraphModule) -> None:
        """Blocks whose projections read features that a norm is taken over."""
        if any(roles.fact(node, "intervened") for node in gm.graph.nodes):
            raise PreconditionError(f"{self} comes before an intervention; undo it with the pass intervene")
        places = _places(gm)
        if not places:
            raise PreconditionError(f"{self} finds no attention or feed-forward block")
        for projection, where in places.items():
            source = source_of(projection_input(projection))
            between = projection_input(projection)
            weight = projection_weight(projection)
            if weight is None or aten_name(projection) not in ("linear", "addmm", "mm", "matmul"):
                raise PreconditionError(
                    f"{self} can't tell the features that %{projection.name} reads ({where}): it is no linear layer"
                )
            if between is not source and len(between.users) > 1:
                raise PreconditionError(
                    f"{self}: %{between.name} is read by others than %{projection.name} ({where}); run it before "
                    "quantize-activations"
                )

    def apply(self, gm: GraphModule) -> None:
        """Insert a norm for each projection that has none, and set the epsilon of each."""
        for projection in _places(gm):
            reader = projection_input(projection)
            if quantiser_of(reader) is None:
                reader = projection
            source = source_of(projection_input(projection))
            weight = projection_weight(projection)
            assert weight is not None
            if roles.fact(source, "sub_norm"):
                _sum_of(source).args = (_sum_of(source).args[0], float(self.epsilon))
                continue
            replace_input(reader, source, _norm(gm, source, reader, weight, self.epsilon))

    def ensures(self, gm: GraphModule) -> None:
        """Each projection reads a norm."""
        for projection in _places(gm):
            if not roles.fact(source_of(projection_input(projection)), "sub_norm"):
                raise PostconditionError(f"sub-norms left what %{projection.name} reads")


def _places(gm: GraphModule) -> dict[Node, str]:
    """Return the student's projections that read a norm, and where each is."""
    return dict(_found(gm))


def _found(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    for site in find_attention(gm):
        if site.output is not None:
            yield site.output, site.where
    for block in find_feed_forward(gm):
        yield block.down, block.where


def _norm(gm: GraphModule, source: Node, before: Node, weight: Node, epsilon: float) -> Node:
    value = source.meta["val"]
    target = f"{SUB_NORMS}{weight.target}"
    register(
        gm, target, nn.Parameter(torch.ones(int(value.shape[-1]), dtype=value.dtype, device=value.device))
    )
    name = f"{before.name}_norm"
    read = get_attr(before, target, f"{name}_weight", "student")
    square = call(before, aten.pow.Tensor_Scalar, (source, 2), f"{name}_square", "student")
    mean = call(before, aten.mean.dim, (square, [-1], True), f"{name}_mean", "student")
    positive = call(before, aten.add.Tensor, (mean, float(epsilon)), f"{name}_positive", "student")
    inverse = call(before, aten.rsqrt.default, (positive,), f"{name}_inverse", "student")
    scaled = call(before, aten.mul.Tensor, (source, inverse), f"{name}_scaled", "student")
    normed = call(before, aten.mul.Tensor, (read, scaled), name, "student")
    roles.record(normed, sub_norm=target)
    if roles.twin_of(gm.graph):
        roles.stands_for(normed, source)
    return normed


def _sum_of(normed: Node) -> Node:
    """Return the node of a norm that adds epsilon."""
    scaled = normed.args[1]
    assert isinstance(scaled, Node)
    inverse = scaled.args[1]
    assert isinstance(inverse, Node)
    return inverse.all_input_nodes[0]
