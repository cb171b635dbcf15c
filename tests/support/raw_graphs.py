"""Graphs as torch.export returns them, before any pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.frontend.exported_graph import exported_graph
from ti_fx.ir.facts import record_facts, record_sizes
from ti_fx.ir.pipeline import Pass, Pipeline
from ti_fx.ir.shapes import guard_count
from ti_fx.passes.normalise import NORMALISE


def raw_graph(
    model: nn.Module, *, baked: Mapping[str, Tensor] | None = None, **inputs: Tensor
) -> GraphModule:
    """Export a model whose inputs share the size of their first dimension, the batch."""
    shapes = {name: {0: torch.export.Dim.AUTO} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    gm = exported_graph(program, model, baked or {})
    first = next(node for node in gm.graph.find_nodes(op="placeholder") if node.target == next(iter(inputs)))
    record_sizes(gm, names={str(first.meta["val"].shape[0]): "batch"})
    return gm


def normalised_up_to(gm: GraphModule, one: type[Pass]) -> GraphModule:
    """Run the passes of NORMALISE that come before one."""
    kinds = [type(each) for each in NORMALISE.passes]
    Pipeline(*NORMALISE.passes[: kinds.index(one)])(gm)
    return gm


def normalised(gm: GraphModule) -> GraphModule:
    """Run all passes of NORMALISE, after which the graph counts as captured."""
    NORMALISE(gm)
    record_facts(gm, guards=guard_count(gm))
    return gm
