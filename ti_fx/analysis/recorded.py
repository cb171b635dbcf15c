"""Runs a graph node by node on one batch and keeps the values of some nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ti_fx.errors import InputError
from ti_fx.ir import roles
from ti_fx.ir.edit import fork, mode
from ti_fx.ir.pipeline import Pipeline
from ti_fx.passes import Intervene


class Recorder(Interpreter):
    """Keeps the values of the wanted nodes.

    Attributes:
        found: their values after :meth:`run`, by node.
    """

    def __init__(self, gm: GraphModule, wanted: Iterable[Node]) -> None:
        super().__init__(gm)
        self.wanted = set(wanted)
        self.found: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if n in self.wanted:
            self.found[n] = result
        return result


def run(recorder: Recorder, batch: Mapping[str, Tensor]) -> Any:
    """Run a graph in eval mode, without gradients, and return what it returns.

    Args:
        recorder: of the graph.
        batch: the graph's inputs by name; others are left out.

    Raises:
        InputError: the batch lacks an input.
    """
    gm = recorder.module
    assert isinstance(gm, GraphModule)
    inputs = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    missing = [name for name in inputs if name not in batch]
    if missing:
        raise InputError(f"the batch lacks {', '.join(missing)}; the graph's inputs are {', '.join(inputs)}")
    with torch.no_grad(), mode(gm, training=False):
        return recorder.run(*(batch[name] for name in inputs), enable_io_processing=False)


def with_teacher(gm: GraphModule) -> GraphModule:
    """Return a graph whose student reads no value of the teacher: the graph itself, or a fork without interventions.

    Raises:
        InputError: there is no teacher.
    """
    if not roles.twin_of(gm.graph):
        raise InputError(
            "the graph has no teacher to compare with; run duplicate-teacher, or give reference="
        )
    if any(roles.fact(node, "intervened") for node in gm.graph.nodes):
        gm = fork(gm)
        Pipeline(Intervene())(gm)
    return gm
